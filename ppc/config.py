"""Every field of a trial, once: type, unit, default and source. Those of a study are in `study_config`.

A trial's sections fall in two kinds. `runtime` says how a trial is run (workers, GPUs, threads) and never decides a
number; it is left out of every content key. All other sections decide numbers and are part of the keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = float
DEFAULT_STAGES = ("train_cam", "make_seeds", "refine_crf", "evaluate")
SAME = "same"


class Section(BaseModel):
    """A frozen section: unknown keys are errors, defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def unread(self) -> set[str]:
        """Fields that the rules chosen in this section never look at; see `TrialConfig.decisive`."""
        return set()


class ScenesConfig(Section):
    """The built-in generated dataset (used when `data.name` is `scenes`)."""

    num_classes: int = Field(5, ge=1, le=12, description="foreground classes")
    num_train: int = Field(240, ge=2, description="images of split train")
    num_val: int = Field(60, ge=0, description="images of split val")
    image_px: int = Field(112, ge=32, le=512, description="longer side of an image, pixels")
    seed: int = Field(0, ge=0, description="seed of the generator; not the trial's seed")


class DataConfig(Section):
    """Which images, labels and splits. Paths do not enter a key: the fingerprint of the contents does."""

    name: Literal["scenes", "voc", "coco", "folder"] = Field(
        "scenes",
        description="dataset layout: built-in generated scenes, a VOC root, COCO 2014 as downloaded, or a folder with "
        "images/, classes.txt and tags.csv",
    )
    root: str | None = Field(None, description="folder of the dataset; scenes: made under the storage root when null")
    labels: Literal["auto", "cls_labels", "xml", "masks"] = Field(
        "auto",
        description="source of the image-level labels; auto: voc the first that exists, in this order; coco its "
        "annotations; folder its tags.csv",
    )
    train_split: str = Field("train", description="split whose images and tags train the CAM")
    on_broken: Literal["stop", "skip"] = Field(
        "stop",
        description="an image that is missing or damaged, has no label, or, in a split where any image has a mask, has "
        "none or a bad one: an error, or left out of all stages",
    )
    scenes: ScenesConfig = Field(default_factory=ScenesConfig)


class BackboneConfig(Section):
    """The feature extractor (METHOD 2)."""

    name: str = Field("tiny", description="a name of BACKBONES, or timm:MODEL")
    output_stride: Literal[8, 16] = Field(8, description="input pixels a feature pixel, per axis")
    weights: str | None = Field(None, description="file of pretrained weights; null: random. Its sha256 enters the key")
    normalisation: Literal["auto", "imagenet", "half", "caffe_bgr", "unit"] = Field(
        "auto", description="input normalisation; auto: the backbone's own"
    )


class MethodConfig(Section):
    """The baseline and the weights of its terms (METHOD 3, 4, 5, 7)."""

    name: Literal["cam", "seam", "eps", "eps_seam"] = Field(
        "seam",
        description="baseline: plain CAM; SEAM with its PCM; EPS, which needs saliency maps; EPS with SEAM's PCM and "
        "terms, on which PPC-EPS builds",
    )
    cls_weight: float = Field(1.0, ge=0, description="classification loss")
    min_pool_weight: float = Field(1.0, ge=0, description="SEAM min-pooling loss (only in its code)")
    er_weight: float = Field(1.0, ge=0, description="SEAM equivariant regularisation")
    ecr_weight: float = Field(1.0, ge=0, description="SEAM equivariant cross regularisation")
    dropout: Fraction = Field(0.5, ge=0, lt=1, description="cam, seam: channel dropout before the CAM layer")
    saliency_weight: float = Field(1.0, ge=0, description="eps, eps_seam: saliency loss of the CAM")
    saliency_refined_weight: float = Field(1.0, ge=0, description="eps_seam: saliency loss of the refined CAM")
    saliency_overlap: Fraction = Field(
        0.4,
        ge=0,
        le=1,
        description="eps, eps_seam: tau, the share of a class's pixels on salient ground above which it is salient",
    )
    saliency_fg_weight: Fraction = Field(
        0.5, ge=0, le=1, description="eps, eps_seam: lambda, weight of the salient classes against the background's"
    )
    ecr_keeps: Literal["first_class", "background"] = Field(
        "first_class",
        description="eps_seam: the channel that ECR's one-hot leaves alone; the official code means the background and "
        "takes the first class",
    )


ONE_VIEW = ("cam", "eps")  # without contrast
SALIENCY = ("eps", "eps_seam")
_SEAM_FIELDS = {"min_pool_weight", "er_weight", "ecr_weight"}
_SALIENCY_FIELDS = {"saliency_weight", "saliency_overlap", "saliency_fg_weight"}
UNREAD_BY_METHOD: dict[str, set[str]] = {
    "cam": {*_SEAM_FIELDS, *_SALIENCY_FIELDS, "saliency_refined_weight", "ecr_keeps"},
    "seam": {*_SALIENCY_FIELDS, "saliency_refined_weight", "ecr_keeps"},
    "eps": {*_SEAM_FIELDS, "saliency_refined_weight", "ecr_keeps", "dropout"},
    "eps_seam": {"dropout"},
}

OFFICIAL: dict[str, Any] = {
    "prototype_pixels": "all", "absent_classes": "keep", "bg_prototype_weight": "constant", "map_norm": "minmax",
    "negatives": "ranks", "hard_pixels": "official", "intra_mean": "class", "view_reduction": "mean",
}  # fmt: skip
PAPER: dict[str, Any] = {
    "prototype_pixels": "assigned", "absent_classes": "drop", "bg_prototype_weight": "one_minus_fg", "map_norm": "max",
    "negatives": "random_half", "hard_pixels": "paper", "intra_mean": "pixel", "view_reduction": "sum",
}  # fmt: skip
PRESETS = {"official": OFFICIAL, "paper": PAPER}


class ContrastConfig(Section):
    """Pixel-to-prototype contrast (METHOD 6). Defaults: what the official code does; `preset: paper` is METHOD 6.7."""

    preset: Literal["official", "paper"] = Field("official", description="fills the fields below that are not given")
    prototype_top_k: int = Field(32, ge=0, description="K: CAM pixels a prototype, of the whole batch; 0: no contrast")
    temperature: float = Field(0.1, gt=0, description="tau of the softmax over prototypes")
    cross_prototype_weight: float = Field(0.1, ge=0, description="alpha of the cross-prototype term")
    cross_cam_weight: float = Field(0.1, ge=0, description="alpha of the cross-CAM term")
    intra_view_weight: float = Field(0.1, ge=0, description="beta of the intra-view term")
    projector_dim: int = Field(128, ge=1, description="D: channels of the projected features")
    bg_score: Fraction = Field(0.2, gt=0, lt=1, description="background score of the pseudo labels")
    map_source: Literal["refined", "cam"] = Field(
        "refined", description="map that labels and weighs pixels: PCM-refined (official), or the CAM; cam has no PCM"
    )
    map_norm: Literal["minmax", "max"] = Field(
        "minmax", description="6.6 #4: min-max with negatives, or over the maximum"
    )
    tie_rule: Literal["first_index", "random"] = Field("first_index", description="6.3: who wins a tied top-K")
    prototype_pixels: Literal["all", "assigned"] = Field("all", description="6.6 #1: candidates of a class's top-K")
    prototype_features: Literal["raw", "unit"] = Field("raw", description="6.6 #6: features averaged into a prototype")
    bg_prototype_weight: Literal["constant", "one_minus_fg"] = Field("constant", description="6.6 #3")
    absent_classes: Literal["keep", "drop"] = Field("keep", description="6.6 #2: silent classes in the denominators")
    negatives: Literal["all", "ranks", "random_half"] = Field("ranks", description="6.6 #8: semi-hard prototype mining")
    negative_rank_from: Fraction = Field(3 / 21, ge=0, le=1, description="first rank kept, as a share of the classes")
    negative_rank_to: Fraction = Field(
        13 / 21, ge=0, le=1, description="end of the ranks kept, as a share of the classes"
    )
    negative_pool: Fraction = Field(0.6, gt=0, le=1, description="random_half: hardest share of the negatives")
    negative_sample: Fraction = Field(0.5, gt=0, le=1, description="random_half: share of the pool that is drawn")
    hard_pixels: Literal["all", "official", "paper"] = Field("official", description="6.6 #9: hard pixel sampling")
    hard_pool: Fraction = Field(
        0.6, gt=0, le=1, description="official: hardest share of a class's pixels that can be drawn"
    )
    intra_mean: Literal["class", "pixel"] = Field("class", description="6.6 #10: mean over classes, or over all pixels")
    view_reduction: Literal["mean", "sum"] = Field("mean", description="6.6 #7: the two views' terms")

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in list(PRESETS):  # a list: it may be unhashable
            return {**PRESETS[values["preset"]], **values}
        return values

    @property
    def active(self) -> bool:
        """Whether any contrast term takes part."""
        weights = (self.cross_prototype_weight, self.cross_cam_weight, self.intra_view_weight)
        return self.prototype_top_k > 0 and any(w > 0 for w in weights)


class ViewsConfig(Section):
    """The target view: a transformed copy of the source view (METHOD 1.1, Table 7)."""

    target_px: int | None = Field(128, ge=16, description="side of the target view, pixels; null: not rescaled")
    flip: bool = Field(False, description="the target view is mirrored, p = 0.5")
    rotate_deg: float = Field(0.0, ge=0, le=180, description="rotation drawn from [-r, r]; paper: 20")
    translate_px: int = Field(0, ge=0, description="shift drawn from [-t, t] on both axes, pixels of the target view")


class OptimConfig(Section):
    """How a net is trained (METHOD 1.2)."""

    epochs: int = Field(8, ge=1)
    batch_size: int = Field(8, ge=1, description="images of the global batch, over all workers")
    crop_px: int = Field(448, ge=32)
    learning_rate: float = Field(0.01, gt=0, description="of backbone weights; new layers 10 times, biases twice")
    new_layer_lr_mult: float = Field(10.0, gt=0)
    bias_lr_mult: float = Field(2.0, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    momentum: Literal["official"] | float = Field(
        "official", description="official: the official code's effective value, which is its weight_decay (METHOD 1.2)"
    )
    poly_power: float = Field(0.9, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"

    @field_validator("momentum")
    @classmethod
    def _momentum_range(cls, value: Any) -> Any:
        if value != "official" and not 0 <= value < 1:
            raise ValueError("momentum is `official` or a number in [0, 1)")
        return value


class TrainConfig(OptimConfig):
    """Training of the CAM net (METHOD 1.2)."""

    resize_long_px: tuple[int, int] = Field(
        (448, 768), description="range of the long side, pixels, both ends included"
    )
    color_jitter: bool = True

    @field_validator("resize_long_px")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 16 <= value[0] <= value[1]:
            raise ValueError(f"expected 16 <= low <= high, got {value}")
        return value


class SeedsConfig(Section):
    """CAM inference, the background-score curve and the protocol that picks the score (METHOD 3, 4.3, 12)."""

    splits: tuple[str, ...] = Field(
        ("train",), min_length=1, description="splits that get seeds, each scored on its own"
    )
    scales: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5, 1.0, 1.5, 2.0), min_length=1, description="input scales, each with its mirror"
    )
    merge: Literal["method", "irn"] = Field(
        "method", description="how their maps become a CAM: as the method does, or as IRN does"
    )
    protocol: Literal["fixed", "best_on_train", "val_subset"] = Field(
        "best_on_train",
        description="who picks the background score: nobody; the masks of data.train_split, which must be one of "
        "splits; the masks of a drawn subset",
    )
    bg_score: Fraction = Field(0.26, ge=0, lt=1, description="the score of protocol fixed")
    val_subset_split: str = Field("val", description="split of protocol val_subset")
    val_subset_images: int = Field(50, ge=1, description="images drawn for protocol val_subset")
    absent_classes: Literal["zero", "skip"] = Field("zero", description="IoU of a class in neither masks nor seeds")
    overlays: int = Field(4, ge=0, description="images of the first split whose CAM is drawn")


class CrfConfig(Section):
    """Dense CRF on the seeds (METHOD 6.5, 9)."""

    @field_validator("bg_score")
    @classmethod
    def _score_range(cls, value: Any) -> Any:
        if value != "seed" and not 0 <= value < 1:
            raise ValueError("bg_score is `seed` or a number in [0, 1)")
        return value

    preset: str = Field("ppc_seed", description="a name of crf.PRESETS")
    bg_score: Literal["seed"] | float = Field(
        "seed", description="score of the label map it starts from; seed: as chosen"
    )


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
    bg_score: Fraction = Field(0.27, ge=0, lt=1)
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
    color_jitter: bool = True
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

    epochs: int = Field(3, ge=1)
    batch_size: int = Field(32, ge=1, description="images of the global batch, over all workers")
    crop_px: int = Field(512, ge=32, description="side of a crop, pixels; a multiple of 16")
    learning_rate: float = Field(0.1, gt=0, description="of the edge branch's weights")
    new_layer_lr_mult: float = Field(10.0, gt=0, description="of the displacement branch")
    bias_lr_mult: float = Field(1.0, gt=0, description="of biases and GroupNorm; all weights decay, these too")
    weight_decay: float = Field(1e-4, ge=0)


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

    epochs: int = Field(19, ge=1)
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


class RuntimeConfig(Section):
    """How a trial is run. Never part of a key: numbers depend on it to rounding alone."""

    workers: int = Field(1, ge=1, description="training processes of a trial")
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0, description="a fraction shares a GPU between trials")
    loader_workers: int = Field(0, ge=0, description="data loading processes a training worker")
    engine: Literal["auto", "task", "train"] = Field(
        "auto", description="train: Ray Train; task: one Ray task; auto: train for GPUs or several workers"
    )
    checkpoint_every_epochs: int = Field(1, ge=1)
    log_every_steps: int = Field(10, ge=1)
    images_per_task: int = Field(16, ge=1, description="images of one Ray task of a per-image stage")
    max_failures: int = Field(2, ge=0, description="times a dead worker is started again from its checkpoint")
    resource_wait_s: float = Field(60, ge=0, description="how long a trial waits for resources the cluster has not got")


LATER = {"psa": "walk", "irn": "walk", "segmentation": "test"}  # of a net's section: what its training does not look at


class TrialConfig(Section):
    """One configuration with one seed: everything that decides a result, and how to run it."""

    seed: int = Field(0, ge=0, description="seed of initialisation, order, augmentation, dropout and draws")
    stages: tuple[str, ...] = Field(DEFAULT_STAGES, min_length=1, description="stages in order")
    data: DataConfig = Field(default_factory=DataConfig)
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    method: MethodConfig = Field(default_factory=MethodConfig)
    contrast: ContrastConfig = Field(default_factory=ContrastConfig)
    views: ViewsConfig = Field(default_factory=ViewsConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    seeds: SeedsConfig = Field(default_factory=SeedsConfig)
    crf: CrfConfig = Field(default_factory=CrfConfig)
    psa: PsaConfig = Field(default_factory=PsaConfig)
    irn: IrnConfig = Field(default_factory=IrnConfig)
    segmentation: SegmentationConfig = Field(default_factory=SegmentationConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    def backbone_of(self, net: str) -> BackboneConfig:
        """The backbone of a net's section: `backbone` itself is the CAM net's, and that of all that say `same`."""
        own: BackboneConfig = self.backbone if net == "backbone" else getattr(self, net).backbone
        return self.backbone if own.name == SAME else own

    def decisive(self, section: str) -> Any:
        """What of a section decides results, as plain data; the rest of the config does not enter a key.

        A section of a net (`psa`) is what decides the trained net: what is done with it later is a section of its own
        (`psa.walk`).
        """
        if section == "seed":
            return self.seed
        if section == "evaluate":
            return {"absent_classes": self.seeds.absent_classes}
        if section in LATER:
            skipped = {"backbone", LATER[section]} | self._unread(section)
            backbone = self.backbone_of(section).model_dump(mode="json", exclude={"weights"})  # see `weights_name`
            return {**getattr(self, section).model_dump(mode="json", exclude=skipped), "backbone": backbone}
        if "." in section:
            net, later = section.split(".")
            chosen: Section = getattr(getattr(self, net), later)
            return chosen.model_dump(mode="json", exclude=self._unread(section) | chosen.unread())
        if section == "contrast" and not self.contrast.active:
            return {"active": False}
        if section == "views" and not self.contrast.active and self.method.name in ONE_VIEW:
            return {"target": False}  # it looks at the source view alone
        data = getattr(self, section).model_dump(mode="json")
        if section == "data":
            found = {"train_split": data["train_split"]}  # the contents are in the fingerprint
            return found | ({"on_broken": "skip"} if self.data.on_broken == "skip" else {})
        return {name: value for name, value in data.items() if name not in self._unread(section)}

    def _unread_of_net(self, section: str) -> set[str]:
        """As `_unread`, of a net that is not the CAM net."""
        frozen = section == "segmentation" and self.segmentation.batch_norm == "frozen"
        return {"preset", "bn_momentum_backbone"} if frozen else {"preset"}

    def _unread(self, section: str) -> set[str]:
        """Fields of a section that the rules chosen here never look at: trials that differ in them alone are one."""
        unread: set[str] = set()
        if section in LATER:
            unread |= self._unread_of_net(section)
        elif section == "backbone":
            unread.add("weights")  # its sha256 is in the fingerprint
        elif section == "method":
            unread |= UNREAD_BY_METHOD[self.method.name]
        elif section == "contrast":
            unread.add("preset")
            if self.contrast.negatives != "ranks":
                unread |= {"negative_rank_from", "negative_rank_to"}
            if self.contrast.negatives != "random_half":
                unread |= {"negative_pool", "negative_sample"}
            if self.contrast.hard_pixels != "official":
                unread.add("hard_pool")
            if self.method.name in ONE_VIEW:
                unread.add("map_source")  # there is no refined map
        elif section == "seeds":
            unread |= self._unread_seeds()
        return unread

    def _unread_seeds(self) -> set[str]:
        # `overlays` decides no number and stays in the key all the same: a finished stage is not run again, so a trial
        # that asks for other overlays than the one before it would not get them.
        unread: set[str] = set()
        if self.seeds.merge == "method":
            unread.add("merge")  # the method decides
        if self.seeds.protocol != "fixed":
            unread.add("bg_score")
        if self.seeds.protocol != "val_subset":
            unread |= {"val_subset_split", "val_subset_images"}
        return unread
