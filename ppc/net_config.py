"""Fields of the nets beside the CAM net: AffinityNet, IRNet and the segmentation net, and of what is done with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ppc.base_config import BackboneConfig, Fraction, OptimConfig, Section

SAME = "same"


class OwnBackbone(BackboneConfig):
    """The feature extractor of a net that is not the CAM net."""

    name: str = Field(SAME, description="a name of BACKBONES, or timm:MODEL; same: all of section `backbone`")


class PsaLabelsConfig(Section):
    """Affinity labels: what two CRFs agree on, one from a strong and one from a weak background (METHOD 8)."""

    bg_power_low: float = Field(
        4.0, gt=0, description="of background scores (1 - highest class)^power; the low one trusts foreground alone"
    )
    bg_power_high: float = Field(24.0, gt=0, description="the high one trusts background alone; PSA: 32")
    crf: str = Field(
        "ppc_aff", description="a name of crf.PRESETS; psa, seam: psa_soft, from scores; ppc: ppc_aff, from labels"
    )

    @model_validator(mode="after")
    def _ordered(self) -> PsaLabelsConfig:
        if self.bg_power_low > self.bg_power_high:
            raise ValueError(f"bg_power_low {self.bg_power_low} is more than bg_power_high {self.bg_power_high}")
        return self


class PsaWalkConfig(Section):
    """The random walk over AffinityNet's affinities (METHOD 8)."""

    background: Literal["power", "constant"] = Field(
        "constant", description="score of the background: (1 - highest class)^bg_power (psa, seam), or bg_score (ppc)"
    )
    bg_power: float = Field(16.0, gt=0, description="psa: 16, seam: 6")
    bg_score: Fraction = Field(0.27, ge=0, lt=1, description="score of a constant background")
    beta: float = Field(8.0, gt=0, description="power of an affinity")
    log2_steps: int = Field(6, ge=0, le=16, description="the walk takes 2^log2_steps steps; psa: 8, seam, ppc: 6")
    fit_radius: bool = Field(
        True, description="a smaller radius on a grid below 2 * radius + 1 cells (seam, ppc); false: an error there"
    )
    crf: str | None = Field(None, description="a name of crf.PRESETS for a CRF after the walk (seam_aff); null: none")

    def unread(self) -> set[str]:
        """What the other background takes."""
        return {"bg_score"} if self.background == "power" else {"bg_power"}


PSA_PRESETS: dict[str, dict[str, Any]] = {
    "psa": {
        "labels": {"bg_power_low": 4.0, "bg_power_high": 32.0, "crf": "psa_soft"}, "train": {"learning_rate": 0.1},
        "walk": {"background": "power", "bg_power": 16.0, "log2_steps": 8, "fit_radius": False},
    },
    "seam": {
        "labels": {"bg_power_low": 4.0, "bg_power_high": 24.0, "crf": "psa_soft"}, "train": {"learning_rate": 0.01},
        "walk": {"background": "power", "bg_power": 6.0, "log2_steps": 6, "fit_radius": True},
    },
    "ppc": {
        "labels": {"bg_power_low": 4.0, "bg_power_high": 24.0, "crf": "ppc_aff"}, "train": {"learning_rate": 0.01},
        "walk": {"background": "constant", "bg_score": 0.27, "log2_steps": 6, "fit_radius": True},
    },
}  # fmt: skip


class PsaConfig(Section):
    """PSA: affinity labels, AffinityNet, and the random walk over its affinities (METHOD 8)."""

    preset: Literal["psa", "seam", "ppc"] = Field(
        "ppc",
        description="whose settings fill the fields below that are not given, in labels, train and walk too; the "
        "official code of ppc takes one power for all, so its low and high are seam's, on which it builds",
    )
    backbone: OwnBackbone = Field(default_factory=OwnBackbone)
    labels: PsaLabelsConfig = Field(default_factory=PsaLabelsConfig)
    radius: int = Field(5, ge=2, le=32, description="pairs are cells less than this apart, in cells of 8 pixels")
    color_jitter: bool = Field(True, description="brightness, contrast, saturation and hue vary at random")
    train: OptimConfig = Field(default_factory=OptimConfig)
    walk: PsaWalkConfig = Field(default_factory=PsaWalkConfig)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") not in list(PSA_PRESETS):  # it may be unhashable
            return values
        filled = dict(values)
        for name, fields in PSA_PRESETS[values["preset"]].items():
            given = values.get(name, {})
            filled[name] = {**fields, **given} if isinstance(given, dict) else given
        return filled


class IrnLabelsConfig(Section):
    """IRN's labels: the classes that a CAM is sure of, and the background that it is sure of (METHOD 10)."""

    fg_score: Fraction = Field(0.30, gt=0, lt=1, description="background score above which a pixel has its class")
    bg_score: Fraction = Field(0.05, gt=0, lt=1, description="background score below which a pixel is background")
    crf_preset: str = Field("irn_label", description="a name of crf.PRESETS, of the CRF after both scores")

    @model_validator(mode="after")
    def _ordered(self) -> IrnLabelsConfig:
        if self.bg_score > self.fg_score:
            raise ValueError(f"bg_score {self.bg_score} is above fg_score {self.fg_score}: no pixel would be unsure")
        return self


class IrnTrainConfig(OptimConfig):
    """Training of IRNet's two branches over a fixed backbone (METHOD 1.2)."""

    epochs: int = Field(3, ge=1, description="times that each image is seen")
    batch_size: int = Field(32, ge=1, description="images of the global batch, over all workers")
    crop_px: int = Field(512, ge=32, description="side of a crop, pixels; a multiple of 16")
    learning_rate: float = Field(0.1, gt=0, description="of the edge branch's weights")
    new_layer_lr_mult: float = Field(10.0, gt=0, description="of the displacement branch")
    bias_lr_mult: float = Field(1.0, gt=0, description="of biases and GroupNorm; all weights decay, these too")
    weight_decay: float = Field(1e-4, ge=0, description="of weights and biases")


class IrnWalkConfig(Section):
    """The random walk over IRNet's boundaries (METHOD 10)."""

    radius: int = Field(5, ge=2, description="reach of a step, cells of 4 pixels; all pairs nearer than it")
    beta: float = Field(10.0, gt=0, description="power of the affinities")
    log2_steps: int = Field(8, ge=0, le=16, description="the walk takes 2^log2_steps steps")
    bg_score: Fraction = Field(0.25, ge=0, lt=1, description="background score of the walked maps over their maximum")


class IrnConfig(Section):
    """IRN: labels between classes, IRNet, and the random walk over its boundaries (METHOD 10)."""

    preset: Literal["official", "paper"] = Field(
        "official",
        description="fills train.momentum where it is not given; paper: 0.9, which the official code intends",
    )
    backbone: OwnBackbone = Field(default_factory=OwnBackbone)
    labels: IrnLabelsConfig = Field(default_factory=IrnLabelsConfig)
    radius: int = Field(10, ge=2, description="pairs nearer than it train the net, cells of 4 pixels")
    scale: tuple[float, float] = Field(
        (0.5, 1.5), description="range of the training images' scale, both ends included"
    )
    train: IrnTrainConfig = Field(default_factory=IrnTrainConfig)
    walk: IrnWalkConfig = Field(default_factory=IrnWalkConfig)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "paper":
            train = values.get("train", {})
            if isinstance(train, dict):
                return {**values, "train": {"momentum": 0.9, **train}}
        return values

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"expected 0 < low <= high, got {value}")
        return value


class SegTestConfig(Section):
    """Prediction of the segmentation net (METHOD 11)."""

    splits: tuple[str, ...] = Field(("val",), min_length=1, description="splits that are predicted")
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 0.75, 1.0, 1.25, 1.5, 1.75), min_length=1, description="input scales, whose logits are averaged"
    )
    flip: bool = Field(True, description="each scale with its mirror")
    crf: str | None = Field("deeplab_test", description="a name of crf.PRESETS; null: no CRF")


class SegOptimConfig(OptimConfig):
    """Training of the segmentation net (METHOD 11): its defaults, 19 epochs of train_aug being 20,102 steps."""

    epochs: int = Field(19, ge=1, description="times that each image is seen")
    batch_size: int = Field(10, ge=1, description="images of the global batch, over all workers")
    learning_rate: float = Field(0.001, gt=0, description="of backbone weights; new layers 10 times, biases twice")
    momentum: Literal["official"] | float = Field(0.9, description="real momentum here, unlike that of the CAM net")


BATCH_NORM_PRESETS: dict[str, dict[str, Any]] = {
    "official": {"batch_norm": "statistics"},
    "corrected": {"batch_norm": "trained"},
}


class SegmentationConfig(Section):
    """The segmentation net, trained on pseudo masks (METHOD 11)."""

    preset: Literal["official", "corrected"] = Field(
        "official", description="fills batch_norm where it is not given: statistics (official), or trained (corrected)"
    )
    masks: Literal["seed", "mask", "psa_mask", "irn_mask", "truth"] = Field(
        "mask", description="label maps that train it; truth: those of the dataset, the upper bound"
    )
    head: str = Field("largefov", description="a name of deeplab.SEG_HEADS")
    dropout: Fraction = Field(0.5, ge=0, lt=1, description="of single values, in the head")
    batch_norm: Literal["frozen", "statistics", "trained"] = Field(
        "statistics",
        description="frozen: the backbone's runs on its stored statistics; statistics: on those of the global batch, "
        "its affine parameters stay (official); trained: these are trained too",
    )
    bn_momentum_backbone: Literal["official"] | float = Field(
        "official", description="of stored statistics; official: 0.1 for resnet101s, else 3e-4, too slow for short runs"
    )
    bn_momentum_head: Literal["official"] | float = Field(
        "official", description="of stored statistics; official: 3e-4: after a run of few hundred steps take 0.1"
    )
    scale: tuple[float, float] = Field((0.5, 1.5), description="range of the random scale of image and mask")
    hsv: bool = Field(True, description="shift hue, saturation and value at random, up to 10 levels")
    backbone: OwnBackbone = Field(default_factory=OwnBackbone)
    train: SegOptimConfig = Field(default_factory=SegOptimConfig)
    test: SegTestConfig = Field(default_factory=SegTestConfig)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in list(BATCH_NORM_PRESETS):  # it may be unhashable
            return {**BATCH_NORM_PRESETS[values["preset"]], **values}
        return values

    @field_validator("scale")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"expected 0 < low <= high, got {value}")
        return value

    @field_validator("bn_momentum_backbone", "bn_momentum_head")
    @classmethod
    def _momentum_range(cls, value: Any) -> Any:
        if value != "official" and not 0 < value <= 1:
            raise ValueError("a momentum of BatchNorm is `official` or a number in (0, 1]")
        return value
