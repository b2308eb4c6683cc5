"""What types cannot say of a trial: names of registries, sizes that must fit together, what its dataset must have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from ppc.backbones import BACKBONES, backbone_problem
from ppc.base_config import OptimConfig
from ppc.config import SALIENCY, TrialConfig
from ppc.crf import PRESETS
from ppc.data import Dataset
from ppc.deeplab import SEG_HEADS
from ppc.metrics import SILENT
from ppc.names import nearest
from ppc.net_config import SAME, OwnBackbone
from ppc.stages import (
    NETS,
    OPTIM,
    plan_stages,
)
from ppc.stages.make_seeds import seedless
from ppc.stages.products import products_of, splits_of
from ppc.stages.train_irn import problems as irn_problems
from ppc.stages.train_psa import problems as psa_problems


def nets_of(cfg: TrialConfig) -> list[str]:
    """The nets that a trial trains, as `TrialConfig.backbone_of` knows them."""
    return [net for stage, net in NETS.items() if stage in cfg.stages]


def weights_of(cfg: TrialConfig) -> dict[str, str | None]:
    """The weight files that a trial's nets begin with, by section."""
    return {section_of(cfg, net): cfg.backbone_of(net).weights for net in nets_of(cfg)}


def section_of(cfg: TrialConfig, net: str) -> str:
    """Dotted name of the section that says what a net's backbone is."""
    return "backbone" if cfg.backbone_of(net) is cfg.backbone else f"{net}.backbone"


def check_trial(cfg: TrialConfig) -> Iterator[tuple[str, str]]:
    """What types cannot say, as (dotted field, problem): names of registries, sizes that must fit together."""
    yield from _check_nets(cfg)
    if cfg.crf.preset not in PRESETS:
        yield "crf.preset", f"no preset {cfg.crf.preset!r}; there are {', '.join(PRESETS)}"
    yield from _check_segmentation(cfg)
    if cfg.views.target_px is not None and cfg.views.target_px > cfg.train.crop_px:
        yield "views.target_px", f"{cfg.views.target_px} is larger than train.crop_px {cfg.train.crop_px}"
    two_cells = 2 * cfg.backbone.output_stride
    if cfg.method.name == "eps_seam" and (cfg.views.target_px or cfg.train.crop_px) < two_cells:
        problem = f"is fewer than two cells of backbone.output_stride {cfg.backbone.output_stride} ({two_cells} pixels)"
        yield "views.target_px", f"{problem}: eps_seam's losses take a quarter of the cells"
    if cfg.contrast.negatives == "ranks" and cfg.contrast.negative_rank_from >= cfg.contrast.negative_rank_to:
        yield "contrast.negative_rank_from", "must be smaller than contrast.negative_rank_to"
    if "make_seeds" in cfg.stages and cfg.seeds.protocol == "best_on_train":
        if cfg.data.train_split not in cfg.seeds.splits:
            listed = ", ".join(cfg.seeds.splits)
            yield (
                "seeds.protocol",
                f"best_on_train takes the score from the masks of data.train_split {cfg.data.train_split}, which is "
                f"not among seeds.splits [{listed}]: add it there, or take protocol fixed or val_subset",
            )
    if cfg.data.name != "scenes" and cfg.data.root is None:
        yield "data.root", "name the folder of the dataset, for instance --set data.root=VOC2012"
    yield from psa_problems(cfg)
    yield from irn_problems(cfg)
    try:
        plan_stages(cfg, {})
    except ValueError as error:
        yield "stages", str(error)


def _check_segmentation(cfg: TrialConfig) -> Iterator[tuple[str, str]]:
    """Names of the head and the CRF, and masks that are made for splits other than the one they train on."""
    own, train = cfg.segmentation, cfg.data.train_split
    if own.head not in SEG_HEADS:
        yield "segmentation.head", f"no head {own.head!r}; there are {', '.join(SEG_HEADS)}"
    if own.test.crf is not None and own.test.crf not in PRESETS:
        yield "segmentation.test.crf", f"no preset {own.test.crf!r}; there are {', '.join(PRESETS)}, and null: no CRF"
    elif own.test.crf is not None and PRESETS[own.test.crf].classes == "present":
        whole = ", ".join(name for name, params in PRESETS.items() if params.classes == "all")
        yield (
            "segmentation.test.crf",
            f"{own.test.crf} is for the classes of an image's tags, which predictions have not: take one of {whole}",
        )
    if "train_seg" in cfg.stages and own.masks != "truth" and train not in splits_of(own.masks, cfg):
        made = ", ".join(splits_of(own.masks, cfg))
        yield (
            "segmentation.masks",
            f"{own.masks} is made for seeds.splits [{made}], but the net trains on data.train_split {train}: add "
            f"{train} to seeds.splits",
        )


def _check_nets(cfg: TrialConfig) -> Iterator[tuple[str, str]]:
    """Backbones that cannot be built, and batches that the workers cannot share."""
    for section in dict.fromkeys(["backbone", *(section_of(cfg, net) for net in nets_of(cfg))]):
        backbone = cfg.backbone if section == "backbone" else cfg.backbone_of(section.partition(".")[0])
        name = backbone.name
        if name not in BACKBONES and not name.startswith("timm:"):
            yield f"{section}.name", f"no backbone {name!r}; there are {', '.join(BACKBONES)} and timm:MODEL"
        elif problem := backbone_problem(name, backbone.output_stride):
            path, _, text = problem.partition(": ")  # it begins with the field
            yield path.replace("backbone", section, 1), text
    for stage, section in OPTIM.items():
        batch_size = optim_of(cfg, section).batch_size
        if (stage in cfg.stages or stage == "train_cam") and batch_size % cfg.runtime.workers:
            yield f"{section}.batch_size", f"{batch_size} is not a multiple of runtime.workers {cfg.runtime.workers}"
    for net in ("psa", "irn", "segmentation"):
        own = getattr(cfg, net).backbone
        if own.name == SAME and own != OwnBackbone():
            yield f"{net}.backbone.name", f"is {SAME}, so nothing else of {net}.backbone is looked at: name a backbone"


def optim_of(cfg: TrialConfig, section: str) -> OptimConfig:
    """The section of that dotted name, which says how a net is trained."""
    value: Any = cfg
    for part in section.split("."):
        value = getattr(value, part)
    assert isinstance(value, OptimConfig)
    return value


def check_data(cfg: TrialConfig, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """What a config asks of its dataset and does not get, as (dotted field, problem): splits, sizes, masks."""
    seeds, wrong = cfg.seeds, list(_check_splits(cfg, dataset))
    if wrong:
        yield from wrong
        return
    images = len(dataset.ids(cfg.data.train_split))
    if cfg.method.name in SALIENCY and not dataset.has_saliency:
        yield "method.name", f"{cfg.method.name} needs saliency maps: {dataset.saliency_place}"
    for stage, section in OPTIM.items():
        batch_size = optim_of(cfg, section).batch_size
        if stage in cfg.stages and batch_size > images:
            yield f"{section}.batch_size", f"{batch_size} is more than the {images} images of {cfg.data.train_split}"
    if {"train_psa", "train_irn"} & {*cfg.stages} and (problem := seedless(cfg, dataset)) is not None:
        yield "seeds.splits", problem
    if "train_seg" in cfg.stages and cfg.segmentation.masks == "truth":
        if not dataset.has_masks(cfg.data.train_split):
            yield "segmentation.masks", f"truth needs masks of split {cfg.data.train_split}, and it has none"
    judge = {"best_on_train": cfg.data.train_split, "val_subset": seeds.val_subset_split}.get(seeds.protocol)
    if "make_seeds" in cfg.stages and judge is not None and not dataset.has_masks(judge):
        yield "seeds.protocol", f"{seeds.protocol} needs masks of split {judge}; use seeds.protocol fixed"


def _check_splits(cfg: TrialConfig, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Splits that are not there, and lists that name an image twice: it would be trained on and scored twice."""
    seeds, there = cfg.seeds, dataset.splits()
    needed = {"data.train_split": [cfg.data.train_split], "seeds.splits": list(seeds.splits)}
    if seeds.protocol == "val_subset":
        needed["seeds.val_subset_split"] = [seeds.val_subset_split]
    if "predict_seg" in cfg.stages:
        needed["segmentation.test.splits"] = list(cfg.segmentation.test.splits)
    looked_at = set[str]()
    for field, splits in needed.items():
        for split in splits:
            if split not in there:
                yield field, f"no split {split!r} in {dataset.root}{nearest(split, there)}"
            elif split in looked_at:
                continue
            elif twice := [image_id for image_id, times in Counter(dataset.ids(split)).items() if times > 1]:
                place = dataset.list_path(split)
                yield field, f"{place} lists {', '.join(twice[:3])} more than once: list every image once"
            looked_at.add(split)


def metrics_of(cfg: TrialConfig, dataset: Dataset | None = None) -> list[str]:
    """The metrics that a trial's stages and splits give, the one that says most last; without a dataset those that it
    would give were there masks of all splits."""
    found = ["bg_score", *(f"{SILENT}{split}" for split in cfg.seeds.splits)] if "make_seeds" in cfg.stages else []
    if "evaluate" not in cfg.stages:
        return found
    before = cfg.stages[: cfg.stages.index("evaluate")]
    return found + [
        f"{product}_miou_{split}"
        for product in products_of(before)
        for split in reversed(splits_of(product, cfg))
        if dataset is None or dataset.has_masks(split)
    ]
