"""A study's twins: `tiny` ends in seconds, `scenes` is the whole design on generated data, small enough for CPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ppc.loading import Kept, get, place, place_all, tiny
from ppc.schema import Raw, fields
from ppc.study_config import AxisRange, DesignConfig, StudyConfig, Twin

OTHER_NETS = ("psa", "irn", "segmentation")  # sections of the nets that are not the CAM net
OWN_BACKBONE: dict[str, Any] = {"name": "same", "weights": None, "output_stride": 8, "normalisation": "auto"}
SCENES_OPTIM: dict[str, Any] = {
    "batch_size": 8, "crop_px": 96, "learning_rate": 0.01, "momentum": 0.9, "precision": "fp32",
}  # fmt: skip
SCENES: dict[str, Any] = {  # as experiments/scenes_base.yaml; nets beside the CAM net train for a few epochs
    "data.name": "scenes", "data.root": None, "data.labels": "auto", "data.train_split": "train",
    "backbone.name": "tiny", "backbone.output_stride": 8, "backbone.weights": None, "backbone.normalisation": "auto",
    "contrast.projector_dim": 64,
    "train.epochs": 12, "train.resize_long_px": [96, 144],
    **{f"train.{name}": value for name, value in SCENES_OPTIM.items()},
    **{f"{net}.train.epochs": 4 for net in OTHER_NETS},
    **{f"{net}.train.{name}": value for net in OTHER_NETS for name, value in SCENES_OPTIM.items()},
    **{f"{net}.backbone.{name}": value for net in OTHER_NETS for name, value in OWN_BACKBONE.items()},
    # after few hundred steps the official 3e-4 leaves BatchNorm with the statistics that it began with
    "segmentation.bn_momentum_backbone": 0.1, "segmentation.bn_momentum_head": 0.1,
    "segmentation.test.splits": ["val"],
    "runtime.workers": 1, "runtime.cpus_per_worker": 1, "runtime.gpus_per_worker": 0, "runtime.loader_workers": 0,
}  # fmt: skip
# Sizes that a study gives in pixels of VOC's crop of 448, and their share at the scenes' crop of 96. The target view
# keeps more of it, 64 for 128: its features have to be a grid that prototypes can be told apart on.
SHRINK = {
    "views.target_px": 0.5,
    "views.translate_px": 0.5,
    "train.resize_long_px": 96 / 448,
    **{f"{section}.crop_px": 96 / 448 for section in ("train", *(f"{net}.train" for net in OTHER_NETS))},
}
# A walk of S steps reaches sqrt(S) radii, and the radius is the official one: so that it reaches the same share of an
# image, the steps shrink by (96/448)^2, about 2^-4. With VOC's own number a scene's masks mix to one class.
WALKS = {"psa.walk.log2_steps": -4, "irn.walk.log2_steps": -4}
SPLITS = {"train": "train", "val": "val", "train_aug": "train"}  # of VOC -> of the scenes, which have no others


def name_of(study: str, twin: Twin) -> str:
    """What a twin of a study is called."""
    return study if twin == "full" else f"{study}-{twin}"


def twin_of(*, tiny: bool, scenes: bool) -> Twin:
    """The twin that the command line names. ValueError for both."""
    if tiny and scenes:
        raise ValueError("--tiny and --scenes are two twins of a study: name one")
    return "tiny" if tiny else "scenes" if scenes else "full"


def study_of(study: StudyConfig, twin: Twin) -> StudyConfig:
    """The study as its twin is named, designed and measured; `expand` is to be given the study itself."""
    design = design_of(study.design, study.base, twin)
    found = study.model_copy(update={"name": name_of(study.name, twin), "design": design})
    if twin == "full" or on_scenes(study.base):
        return found
    columns = list(dict.fromkeys(metric_of(name) for name in study.columns))
    return found.model_copy(update={"metric": metric_of(study.metric), "columns": columns})


def metric_of(metric: str) -> str:
    """A metric on the split of the scenes that stands for its own: `seed_miou_third` is `seed_miou_train`."""
    found = re.fullmatch(r"(\w+?)(_miou_|_maps_)(.+)", metric)  # mIoU, and the share of silent maps
    if found is None:
        return metric
    product, kind, split = found.groups()
    return f"{product}{kind}{SPLITS.get(split, 'val' if product == 'seg' else 'train')}"


def extras(study: StudyConfig, twin: Twin) -> Mapping[str, Any]:
    """What a study itself sets for a twin."""
    return {"full": {}, "tiny": study.tiny, "scenes": study.scenes}[twin]


def as_twin(
    raw: Mapping[str, Any], twin: Twin, extra: Mapping[str, Any] | None = None, *, keep: Kept | None = None
) -> Raw:
    """A raw trial as one of a twin; `extra` and `keep` as for `loading.tiny`."""
    if twin == "full":
        return Raw(raw)
    return tiny(raw, extra, keep=keep) if twin == "tiny" else scenes(raw, extra, keep=keep)


def on_scenes(raw: Mapping[str, Any]) -> bool:
    """Whether a raw trial is on the generated scenes as it is."""
    return bool(get(raw, "data.name", "scenes") == "scenes")


def scenes(raw: Mapping[str, Any], extra: Mapping[str, Any] | None = None, *, keep: Kept | None = None) -> Raw:
    """A raw trial on the generated scenes at their size; one that is on them already stays as it is.

    `keep`: dotted fields that a design varies; they stay, sizes scaled. `extra` has the last word.
    """
    out = Raw(raw)
    if not on_scenes(raw):
        set_here = {path: value for path, value in SCENES.items() if path in fields() and path not in (keep or {})}
        for path, value in set_here.items():
            out = place(out, path, value, "--scenes")
        for path in (*SHRINK, *WALKS, "seeds.splits", "seeds.val_subset_split"):
            if path not in set_here and (value := get(raw, path, fields()[path].default)) is not None:
                out = place(out, path, scaled(path, value), "--scenes")
    return place_all(out, extra or {}, "scenes")


def scaled(path: str, value: Any) -> Any:
    """A field's value at the size of the scenes; of a split, or splits, those that the scenes have."""
    if path in SHRINK and isinstance(value, list | tuple):
        return [scaled(path, one) for one in value]
    if path in SHRINK and isinstance(value, int | float) and not isinstance(value, bool):
        return round(value * SHRINK[path])
    if path in WALKS and isinstance(value, int) and not isinstance(value, bool):
        return max(0, value + WALKS[path])
    if path in ("data.train_split", "seeds.val_subset_split"):
        return SPLITS.get(value, "train") if isinstance(value, str) else value
    if path in ("seeds.splits", "segmentation.test.splits") and isinstance(value, list | tuple):
        found = dict.fromkeys(SPLITS[one] for one in value if one in SPLITS)
        return list(found) or ["val" if path.startswith("segmentation") else "train"]
    return value


def design_of(design: DesignConfig, base: Mapping[str, Any], twin: Twin) -> DesignConfig:
    """The design of a twin: the same variants, sizes in them scaled where the scenes have others than the base."""
    if twin != "scenes" or on_scenes(base):
        return design
    variants = [variant.model_copy(update={"set": _scaled_all(variant.set)}) for variant in design.variants]
    baseline = design.baseline
    return design.model_copy(
        update={
            "axes": Raw({path: _axis(path, axis) for path, axis in design.axes.items()}, _origin(design.axes)),
            "variants": variants,
            "exclude": [_scaled_all(entry) for entry in design.exclude],
            "baseline": _scaled_all(baseline) if isinstance(baseline, Mapping) else baseline,
        }
    )


def _origin(values: Mapping[str, Any]) -> dict[str, str]:
    return dict(getattr(values, "origin", {}))


def _scaled_all(values: Mapping[str, Any]) -> Raw:
    return Raw({path: scaled(path, value) for path, value in values.items()}, _origin(values))


def _axis(path: str, axis: list[Any] | AxisRange) -> list[Any] | AxisRange:
    if not isinstance(axis, AxisRange):
        return [scaled(path, value) for value in axis]
    if path not in (*SHRINK, *WALKS):
        return axis
    step = axis.step if axis.step is None or path in WALKS else scaled(path, axis.step) or 1
    return axis.model_copy(update={"low": scaled(path, axis.low), "high": scaled(path, axis.high), "step": step})
