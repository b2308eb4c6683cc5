"""What a study will cost: measured seconds times what there is to do, and files that stay. Shared stages count once.

A rate is of finished work alone: of stages on this storage that did the same (`like`), or of `measure`. A unit is a
step of training, or an image of a stage that works image by image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ppc.artifacts import Storage, content_key, read_json, write_json
from ppc.backbones import build_backbone
from ppc.checks import optim_of, weights_of
from ppc.config import TrialConfig
from ppc.data import DataError, Dataset, open_dataset
from ppc.places import names_in
from ppc.published import VOC_IMAGES
from ppc.stages import NETS, OPTIM, STAGES, WEIGHTS, plan_stages
from ppc.stages.products import PRODUCTS, products_of, splits_of

VOC_SIZE = (375, 500)  # of most of VOC's photographs; used where the images are not there
VOC_TAGS = 1.5  # classes of an image
LABEL_SHARE = 0.03  # bytes a pixel of a palette PNG
NOT_MEASURED = "not measured: add --measure"


@dataclass(frozen=True)
class Images:
    """A dataset as far as its cost goes: images of each split, their usual size, and the classes that one shows."""

    counts: Mapping[str, int]
    height: int
    width: int
    tags: float

    def of(self, split: str) -> int:
        """Images of a split; ValueError for one that is neither there nor of VOC."""
        if split not in self.counts:
            raise ValueError(f"how many images has split {split!r}? give data.root, or one of {', '.join(self.counts)}")
        return self.counts[split]


@dataclass(frozen=True)
class Rate:
    """Seconds of wall, CPUs and GPUs that a unit takes."""

    wall_s: float
    cpu_s: float
    gpu_s: float
    source: str


@dataclass(frozen=True)
class Cost:
    """All runs of a stage that do the same; bytes are what stays and, beside it, what one run needs for a while."""

    stage: str
    like: dict[str, Any]
    runs: int
    units: int
    rate: Rate | None
    kept_bytes: float
    passing_bytes: float


# -- what there is to do


def images_of(cfg: TrialConfig) -> Images:
    """The images of a trial: those that are there, or what its config, or VOC, says of them. Makes nothing."""
    if cfg.data.name == "scenes":
        px, scenes = cfg.data.scenes.image_px, cfg.data.scenes
        return Images({"train": scenes.num_train, "val": scenes.num_val}, px, px, 1.5)
    return _voc_images(cfg.data.name, cfg.data.root, cfg.data.labels)


@lru_cache(maxsize=8)
def _voc_images(name: str, root: str | None, labels: str) -> Images:
    if root is None or not Path(root).expanduser().is_dir():
        return Images(VOC_IMAGES, *VOC_SIZE, VOC_TAGS)
    dataset = open_dataset(name, Path(root).expanduser(), labels=labels, scenes={})
    counts = {split: len(dataset.ids(split)) for split in dataset.splits()}
    return Images({**VOC_IMAGES, **counts}, *_usual_size(dataset), _tags(dataset))


def _some_ids(dataset: Dataset) -> list[str]:
    splits = dataset.splits()
    ids = dataset.ids("train" if "train" in splits else splits[0]) if splits else []
    return ids[:: max(1, len(ids) // 50)]


def _usual_size(dataset: Dataset) -> tuple[int, int]:
    sizes = []
    for image_id in _some_ids(dataset):
        try:
            sizes.append(dataset.image_size(image_id))
        except DataError:  # told by the launch
            continue
    heights, widths = (sorted(side) for side in zip(*sizes, strict=True)) if sizes else ([VOC_SIZE[0]], [VOC_SIZE[1]])
    return heights[len(heights) // 2], widths[len(widths) // 2]


def _tags(dataset: Dataset) -> float:
    try:
        found = [float(dataset.image_label(image_id).sum()) for image_id in _some_ids(dataset)]
    except DataError:
        return VOC_TAGS
    return sum(found) / len(found) if found else VOC_TAGS


def units_of(stage: str, cfg: TrialConfig, images: Images) -> int:
    """Steps of a training, or images of another stage, as its `progress.json` counts them."""
    if stage in NETS:
        optim = optim_of(cfg, OPTIM[stage])
        return optim.epochs * (images.of(cfg.data.train_split) // optim.batch_size)
    if stage == "evaluate":
        before = cfg.stages[: cfg.stages.index("evaluate")]
        return sum(images.of(split) for product in products_of(before) for split in splits_of(product, cfg))
    return 2 * seen(stage, cfg, images) if stage == "make_seeds" else seen(stage, cfg, images)  # CAMs, then seeds


def seen(stage: str, cfg: TrialConfig, images: Images) -> int:
    """Images that a stage which works image by image looks at."""
    splits = [part for part in STAGES[stage].contents(cfg) if not part.endswith(WEIGHTS)]
    seeds, chooses = cfg.seeds, cfg.seeds.val_subset_split
    if stage != "predict_seg" and seeds.protocol == "val_subset" and chooses not in seeds.splits:
        drawn = min(seeds.val_subset_images, images.of(chooses)) if stage == "make_seeds" else 0
        return drawn + sum(images.of(split) for split in seeds.splits)
    return sum(images.of(split) for split in splits)


def like(stage: str, cfg: TrialConfig) -> dict[str, Any]:
    """What decides how long a unit of a stage takes: two stages of the same are measured once."""
    net = NETS.get(stage) or {"make_seeds": "backbone", "refine_psa": "psa", "refine_irn": "irn"}.get(stage)
    net = "segmentation" if stage == "predict_seg" else net
    found: dict[str, Any] = {"gpu": cfg.runtime.gpus_per_worker > 0}
    if net is not None:
        backbone = cfg.backbone_of(net)
        found |= {"backbone": backbone.name, "output_stride": backbone.output_stride}
    if stage in NETS:
        optim = optim_of(cfg, OPTIM[stage])
        found |= {name: getattr(optim, name) for name in ("crop_px", "batch_size", "precision")}
        found |= {"workers": cfg.runtime.workers, "cpus": cfg.runtime.cpus_per_worker}
    else:
        found |= {"data": cfg.data.name} | ({"px": cfg.data.scenes.image_px} if cfg.data.name == "scenes" else {})
    if stage == "train_cam":
        found |= {"method": cfg.method.name, "contrast": cfg.contrast.active, "target_px": cfg.views.target_px}
    elif stage == "make_seeds":
        found |= {"method": cfg.method.name, "scales": list(cfg.seeds.scales)}
    elif stage == "refine_crf":
        found |= {"crf": cfg.crf.preset}
    elif stage != "evaluate":
        sections = [NETS[stage]] if stage in NETS else STAGES[stage].reads
        own = {k: v for section in sections if section != "seed" for k, v in cfg.decisive(section).items()}
        found |= {"set": content_key({k: v for k, v in own.items() if k not in ("train", "backbone", "splits")})[:8]}
    return found


# -- what a unit takes


def key_of(stage: str, what: Mapping[str, Any]) -> str:
    """Key of a rate, by what it is like."""
    return content_key([stage, dict(what)])


def measured(storage: Storage) -> dict[str, Rate]:
    """Rates by what they are like, of all finished stages of a storage; those of `measure` where there are none."""
    found = dict[str, Rate]()
    for record in read_json(storage.root / "measured.json") or []:
        found[key_of(record["stage"], record["like"])] = Rate(**record["rate"])
    for stage in STAGES:
        for key in names_in(storage.root / "stages" / stage):
            folder = storage.stage(stage, key)
            manifest, progress = folder.manifest(), read_json(folder / "progress.json")
            units = progress.get("total") if isinstance(progress, dict) else None
            if manifest is None or not manifest.get("trial") or not units:
                continue
            config = read_json(storage.trial(manifest["trial"]).path / "config.json")
            try:
                what = like(stage, TrialConfig.model_validate(config))
            except ValueError:  # of another version of this code
                continue
            found[key_of(stage, what)] = rate_of(manifest, units, f"finished {stage} {key[:8]}")
    return found


def rate_of(manifest: Mapping[str, Any], units: int, source: str) -> Rate:
    """The rate of a finished stage that did so many units."""
    cost = manifest["cost"]
    return Rate(manifest["wall_s"] / units, cost["cpu_s"] / units, cost["gpu_s"] / units, source)


def keep(storage: Storage, records: Sequence[tuple[str, dict[str, Any], Rate]]) -> None:
    """Add measured rates to those of the storage; one that is like another takes its place."""
    path = storage.root / "measured.json"
    known = {key_of(one["stage"], one["like"]): one for one in read_json(path) or []}
    for stage, what, rate in records:
        known[key_of(stage, what)] = {"stage": stage, "like": what, "rate": asdict(rate)}
    write_json(path, list(known.values()))


# -- a study


def distinct(configs: Sequence[TrialConfig]) -> Iterator[tuple[str, TrialConfig]]:
    """Each stage that has to be run, with a trial that needs it; trials that share one name it once."""
    seen = set[str]()
    for cfg in configs:
        for stage, key in plan_stages(cfg, {}):
            identity = content_key([key, cfg.data.model_dump(mode="json"), weights_of(cfg)])
            if identity not in seen:
                seen.add(identity)
                yield stage, cfg


def costs(configs: Sequence[TrialConfig], rates: Mapping[str, Rate]) -> list[Cost]:
    """The cost of all trials, a line for each stage and kind of it, in the order of the pipeline."""
    found = dict[str, Cost]()
    for stage, cfg in distinct(configs):
        images, what = images_of(cfg), like(stage, cfg)
        units, (kept, passing) = units_of(stage, cfg, images), disk_of(stage, cfg, images)
        key = key_of(stage, what)
        before = found.get(key, Cost(stage, what, 0, 0, rates.get(key), 0.0, 0.0))
        found[key] = Cost(
            stage, what, before.runs + 1, before.units + units, before.rate, before.kept_bytes + kept,
            max(before.passing_bytes, passing),
        )  # fmt: skip
    order = list(STAGES)
    return sorted(found.values(), key=lambda cost: order.index(cost.stage))


@lru_cache(maxsize=16)
def _parameters(name: str, output_stride: int) -> int:
    with torch.device("meta"):  # shapes alone
        net = build_backbone(name, output_stride=output_stride, weights=None, normalisation="auto", seed=0)
    return sum(value.numel() for value in net.state_dict().values())


def disk_of(stage: str, cfg: TrialConfig, images: Images) -> tuple[float, float]:
    """Bytes that stay of a stage, and those that it needs for a while: two checkpoints, with a momentum a weight."""
    if stage in NETS:
        backbone = cfg.backbone_of(NETS[stage])
        weights = 4.0 * _parameters(backbone.name, backbone.output_stride)
        return weights, 2 * 2 * weights
    pixels = images.height * images.width
    count = seen(stage, cfg, images)
    label = LABEL_SHARE * pixels
    if stage == "make_seeds":  # CAMs are float32 of the classes that an image shows, not compressed
        return count * (4 * images.tags * pixels + label), 0.0
    return (count * label if stage in [made for made, _ in PRODUCTS.values()] else 0.0), 0.0


# -- in words


def table(found: Sequence[Cost]) -> list[list[str]]:
    """The costs as rows of text, headings first, the sum last."""
    rows = [["stage", "runs", "units", "s a unit", "GPU h", "CPU h", "disk GB", "measured"]]
    for cost in found:
        unit, hours = ("-", ["-", "-"]) if cost.rate is None else (f"{cost.rate.wall_s:.3g}", _hours([cost]))
        source = NOT_MEASURED if cost.rate is None else cost.rate.source
        kind = ", ".join(f"{name} {value}" for name, value in cost.like.items() if name in SHOWN)
        name = f"{cost.stage} ({kind})" if kind else cost.stage
        rows.append([name, str(cost.runs), f"{cost.units:,}", unit, *hours, f"{cost.kept_bytes / 1e9:.2f}", source])
    known = [cost for cost in found if cost.rate is not None]
    less = "" if len(known) == len(found) else f"without {len(found) - len(known)} line(s) not measured"
    total = [str(sum(cost.runs for cost in found)), "", "", *_hours(known)]
    rows.append(["in all", *total, f"{sum(cost.kept_bytes for cost in found) / 1e9:.2f}", less])
    return rows


SHOWN = ("backbone", "method", "contrast", "target_px", "crop_px", "batch_size", "crf")


def _hours(found: Sequence[Cost]) -> list[str]:
    """GPU and CPU hours."""
    gpu_s, cpu_s = seconds(found)
    return [f"{gpu_s / 3600:.3g}", f"{cpu_s / 3600:.3g}"]


def seconds(found: Sequence[Cost]) -> tuple[float, float]:
    """GPU and CPU seconds of what is measured."""
    known = [(cost.units, cost.rate) for cost in found if cost.rate is not None]
    return sum(units * rate.gpu_s for units, rate in known), sum(units * rate.cpu_s for units, rate in known)


def remarks(found: Sequence[Cost]) -> list[str]:
    """What the table does not say."""
    passing = max((cost.passing_bytes for cost in found), default=0.0)
    told = [
        "Stages that trials share are counted once; what is finished already is counted too.",
        f"Disk is a computed size; while a net trains, {passing / 1e9:.2f} GB of checkpoints are beside it.",
    ]
    if labelled := [stage for stage in ("train_psa", "train_irn") if any(cost.stage == stage for cost in found)]:
        told.append(f"The CRF that makes the labels of {' and '.join(labelled)} is not counted: two an image.")
    return told
