"""Every field of a trial, once: type, unit, default and source. Those of a study are in `study_config`.

A trial's sections fall in two kinds. `runtime` says how a trial is run (workers, GPUs, threads) and never decides a
number; it is left out of every content key. All other sections decide numbers and are part of the keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ppc.base_config import BackboneConfig, Fraction, OptimConfig, Section
from ppc.net_config import SAME, IrnConfig, PsaConfig, SegmentationConfig

DEFAULT_STAGES = ("train_cam", "make_seeds", "refine_crf", "evaluate")


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
    negative_rank_from: Fraction = Field(
        3 / 21, ge=0, le=1, description="first rank kept, counted from 0, as a share of the classes"
    )
    negative_rank_to: Fraction = Field(
        13 / 21, ge=0, le=1, description="the rank after the last one kept, as a share of the classes"
    )
    negative_pool: Fraction = Field(0.6, gt=0, le=1, description="random_half: hardest share of the negatives")
    negative_sample: Fraction = Field(0.5, gt=0, le=1, description="random_half: share of the pool that is drawn")
    hard_pixels: Literal["all", "official", "paper"] = Field("official", description="6.6 #9: hard pixel sampling")
    hard_pool: Fraction = Field(
        0.6, gt=0, le=1, description="official: hardest share of a class's pixels that can be drawn"
    )
    intra_mean: Literal["class", "pixel"] = Field("class", description="6.6 #10: mean over classes, or over all pixels")
    view_reduction: Literal["mean", "sum"] = Field("mean", description="6.6 #7: the two views' terms")
    start_after: Fraction = Field(
        0, ge=0, lt=1, description="share of the steps that the baseline trains alone, before the terms count"
    )

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


class TrainConfig(OptimConfig):
    """Training of the CAM net (METHOD 1.2)."""

    resize_long_px: tuple[int, int] = Field(
        (448, 768), description="range of the long side, pixels, both ends included"
    )
    color_jitter: bool = Field(True, description="brightness, contrast, saturation and hue vary at random")

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
    map: Literal["method", "cam"] = Field(
        "method",
        description="what is read out: the map of the method (seam: the PCM's; eps: a softmax), or the CAM itself",
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
        "seed", description="constant background that it starts from; seed: the score chosen for the seeds"
    )
    bg_power: float | None = Field(
        None, gt=0, description="in place of bg_score, a background of (1 - highest class)^bg_power; 8 for PPC-EPS (7)"
    )


class RuntimeConfig(Section):
    """How a trial is run. Never part of a key: numbers depend on it to rounding alone."""

    workers: int = Field(1, ge=1, description="training processes of a trial")
    cpus_per_worker: float = Field(1, gt=0, description="CPUs that a training worker holds")
    gpus_per_worker: float = Field(0, ge=0, description="a fraction shares a GPU between trials")
    loader_workers: int = Field(0, ge=0, description="data loading processes a training worker")
    engine: Literal["auto", "task", "train"] = Field(
        "auto", description="train: Ray Train; task: one Ray task; auto: train for GPUs or several workers"
    )
    checkpoint_every_epochs: int = Field(1, ge=1, description="a kill costs at most so many epochs")
    log_every_steps: int = Field(10, ge=1, description="steps of a point in the journal, their mean")
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
            return chosen.model_dump(mode="json", exclude=chosen.unread())
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
            if self.contrast.start_after == 0:
                unread.add("start_after")  # trials from before it was there keep their keys
            if self.method.name in ONE_VIEW:
                unread.add("map_source")  # there is no refined map
        elif section == "crf":  # trials from before there was a power keep their keys
            unread.add("bg_power" if self.crf.bg_power is None else "bg_score")
        elif section == "seeds":
            unread |= self._unread_seeds()
        return unread

    def _unread_seeds(self) -> set[str]:
        # `overlays` decides no number and stays in the key all the same: a finished stage is not run again, so a trial
        # that asks for other overlays than the one before it would not get them.
        unread: set[str] = set()
        if self.seeds.merge == "method":
            unread.add("merge")  # the method decides
        if self.seeds.map == "method" or self.method.name == "cam":
            unread.add("map")  # one and the same
        if self.seeds.protocol != "fixed":
            unread.add("bg_score")
        if self.seeds.protocol != "val_subset":
            unread |= {"val_subset_split", "val_subset_images"}
        return unread
