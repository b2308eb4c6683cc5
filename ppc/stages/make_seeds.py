"""CAMs of every image, the whole background-score curve in one pass, and the seeds at the score that was chosen.

Products: `cams/ID.npz` (keys K, cam (K,H,W) float32 of the image's own classes), `seeds/ID.png`, `overlays/ID.png`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppc.artifacts import Progress, StageDir
from ppc.cam import NormRule, merge_scales, seed_from_cam
from ppc.config import TrialConfig
from ppc.data import Dataset
from ppc.data.labels import DataError
from ppc.figures import overlay, palette_png
from ppc.methods import METHODS, ClassMaps, class_maps
from ppc.metrics import (
    OFFICIAL_THRESHOLDS,
    SILENT,
    Counts,
    choose_bg_score,
    curve_counts,
    curve_miou,
    silent_counts,
)
from ppc.nets import CamNet
from ppc.places import StoragePath, atomic_write, read_bytes
from ppc.seeding import derive_rng
from ppc.stages.context import StageContext
from ppc.stages.train_cam import load_net

Item = tuple[str, str]  # split, image id
VAL_SUBSET = "val_subset images"  # name of their sum, among the names of splits


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    cfg: TrialConfig
    folder: StageDir
    weights: StoragePath
    dataset: Dataset
    subset: frozenset[Item] = frozenset()  # the images of protocol val_subset
    bg_score: float = 0.0
    overlays: frozenset[str] = frozenset()


def run(context: StageContext) -> dict[str, Any]:
    """Infer, count, choose the score, write the seeds."""
    cfg, dataset, folder = context.cfg, context.dataset, context.folder
    items = images_of(cfg, dataset)
    refuse_two_tag_sets(items, dataset)
    progress = Progress(folder / "progress.json", total=2 * len(items), unit="image", used=context.rt.meter.read)
    subset = frozenset(val_subset(cfg, dataset)) if cfg.seeds.protocol == "val_subset" else frozenset()
    shared = Shared(cfg, folder, context.inputs["train_cam"] / "weights.pt", dataset, subset)
    counts: dict[str, Counts] = {}  # one sum a curve, however many images there are

    def add(done: int, part: dict[str, Counts]) -> None:
        add_counts(counts, part)
        progress.update(done)

    context.rt.map(infer_chunk, shared, items, cfg.runtime, add, use_gpu=True)
    curves = {split: counts[split] for split in cfg.seeds.splits if dataset.has_masks(split)}
    score = chosen_score(cfg, dataset, counts)
    first = dataset.ids(cfg.seeds.splits[0])
    drawn = frozenset(first[:: max(1, len(first) // max(1, cfg.seeds.overlays))][: cfg.seeds.overlays])
    shared = Shared(cfg, folder, shared.weights, dataset, subset, score, drawn)
    context.rt.map(seed_chunk, shared, items, cfg.runtime, lambda done, _: progress.update(len(items) + done))
    absent = cfg.seeds.absent_classes
    return {
        "metrics": {"bg_score": score, **silent_shares(counts, cfg.seeds.splits)},
        "protocol": cfg.seeds.protocol,
        "absent_classes": absent,
        "overlays": sorted(drawn),
        "curves": {
            split: {"thresholds": list(OFFICIAL_THRESHOLDS), "miou": curve_miou(total, absent=absent).tolist()}
            for split, total in curves.items()
        },
    }


def silent_shares(counts: dict[str, Counts], splits: Sequence[str]) -> dict[str, float]:
    """`silent_maps_SPLIT` of the splits that have a map: the share of their maps that are nowhere above 0."""
    found = {
        f"{SILENT}{split}": counts[f"{SILENT}{split}"].tolist() for split in splits if f"{SILENT}{split}" in counts
    }
    return {name: silent / maps for name, (silent, maps) in found.items() if maps}


def images_of(cfg: TrialConfig, dataset: Dataset) -> list[Item]:
    """All (split, id) that get a CAM: the splits of the seeds, and the drawn images of protocol val_subset."""
    items = [(split, image_id) for split in cfg.seeds.splits for image_id in dataset.ids(split)]
    if cfg.seeds.protocol == "val_subset":
        items += val_subset(cfg, dataset)
    return list(dict.fromkeys(items))


def refuse_two_tag_sets(items: Sequence[Item], dataset: Dataset) -> None:
    """DataError for an image of several splits whose masks give it other tags in each: it has one CAM, of its tags."""
    splits: dict[str, list[str]] = {}
    for split, image_id in items:
        splits.setdefault(image_id, []).append(split)
    for image_id, of_image in splits.items():
        labels = [dataset.image_label(image_id, split=split) for split in of_image] if len(of_image) > 1 else []
        if any(not np.array_equal(label, labels[0]) for label in labels):
            names = [[dataset.class_names[k] for k in np.flatnonzero(label)] for label in labels]
            told = ", ".join(f"{split}: {' '.join(tags)}" for split, tags in zip(of_image, names, strict=True))
            remedy = "make seeds of one of these splits (seeds.splits), or take the tags from elsewhere (data.labels)"
            raise DataError(dataset.root, f"{image_id} has other tags in each split ({told})", remedy)


def val_subset(cfg: TrialConfig, dataset: Dataset) -> list[Item]:
    """The images whose masks choose the score under protocol val_subset: the same for all trials of a dataset."""
    split = cfg.seeds.val_subset_split
    ids = sorted(dataset.ids(split))
    number = min(cfg.seeds.val_subset_images, len(ids))
    return [(split, image_id) for image_id in sorted(derive_rng("val_subset").sample(ids, number))]


def chosen_score(cfg: TrialConfig, dataset: Dataset, counts: dict[str, Counts]) -> float:
    """The background score by the protocol of the config, from the summed curve counts of each split and VAL_SUBSET.

    ValueError when the masks it needs are not there.
    """
    seeds = cfg.seeds
    if seeds.protocol == "fixed":
        return seeds.bg_score
    split = seeds.val_subset_split if seeds.protocol == "val_subset" else cfg.data.train_split
    if not dataset.has_masks(split):
        raise ValueError(f"seeds.protocol {seeds.protocol} needs masks of split {split}; use seeds.protocol fixed")
    chosen = counts[VAL_SUBSET if seeds.protocol == "val_subset" else split]
    curve = curve_miou(chosen, absent=seeds.absent_classes)
    return choose_bg_score(OFFICIAL_THRESHOLDS, curve)


def seedless(cfg: TrialConfig, dataset: Dataset) -> str | None:
    """What to say when images of the training split get no CAM here; None when all get one."""
    seeded = {image_id for _, image_id in images_of(cfg, dataset)}
    ids = dataset.ids(cfg.data.train_split)
    without = [image_id for image_id in ids if image_id not in seeded]
    if not without:
        return None
    return (
        f"the seeds are of [{', '.join(cfg.seeds.splits)}], but training on them is on data.train_split "
        f"{cfg.data.train_split}: {len(without)} of its {len(ids)} images have none, the first is {without[0]}; "
        f"add {cfg.data.train_split} to seeds.splits"
    )


def add_counts(totals: dict[str, Counts], part: dict[str, Counts]) -> None:
    """Add counts to totals of the same names; integers, so their order does not matter."""
    for name, counts in part.items():
        totals[name] = totals[name] + counts if name in totals else counts


def infer_chunk(shared: Shared, items: Sequence[Item], device: torch.device) -> dict[str, Counts]:
    """Make the CAMs of some images that are not there yet; the summed curve counts of those with a mask.

    The sums are by split, and of the images in `shared.subset` under VAL_SUBSET; under SILENT those of silent maps.
    """
    dataset, cfg = shared.dataset, shared.cfg
    totals: dict[str, Counts] = {}
    scored = {split for split in {split for split, _ in items} if dataset.has_masks(split)}  # it reads the whole list
    for split, image_id in items:
        path = shared.folder / "cams" / f"{image_id}.npz"
        loaded = read_cam(path)
        if loaded is None:
            net, normalisation = load_net(cfg.model_dump_json(), dataset.num_classes, shared.weights, device)
            keys = np.flatnonzero(dataset.image_label(image_id, split=split))
            image = dataset.image(image_id)
            views = [normalisation.apply(view) for view in scaled(image, cfg.seeds.scales)]
            maps = class_maps(cfg.method.name, plain=cfg.seeds.map == "cam")
            cam = infer_cam(net, views, keys, image.shape[:2], maps, device, rule=merge_rule(cfg))
            with atomic_write(path) as handle:
                np.savez(handle, keys=keys, cam=cam)
            loaded = keys, cam
        add_counts(totals, {f"{SILENT}{split}": silent_counts(loaded[1])})
        if split in scored:
            keys, cam = loaded
            mask = dataset.mask(image_id, split=split)
            counts = curve_counts(
                cam, keys, mask, thresholds_T=OFFICIAL_THRESHOLDS, num_classes=dataset.num_classes + 1
            )
            add_counts(totals, {split: counts})
            if (split, image_id) in shared.subset:
                add_counts(totals, {VAL_SUBSET: counts})
    return totals


def scaled(image_HW3: Any, scales: Sequence[float]) -> list[Any]:
    """The image at each scale, bicubic, sides rounded (METHOD 3)."""
    height, width = image_HW3.shape[:2]
    image = Image.fromarray(image_HW3)
    sizes = [(max(1, round(width * s)), max(1, round(height * s))) for s in scales]
    return [
        image_HW3 if size == (width, height) else np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        for size in sizes
    ]


def merge_rule(cfg: TrialConfig) -> NormRule:
    """How the maps of an image's scales become its CAM."""
    return METHODS[cfg.method.name].merge_rule if cfg.seeds.merge == "method" else cfg.seeds.merge


@torch.inference_mode()
def infer_cam(
    net: CamNet,
    views: Sequence[Tensor],
    keys: Any,
    size: tuple[int, int],
    read: ClassMaps,
    device: torch.device,
    *,
    rule: NormRule,
) -> Any:
    """Multi-scale and mirrored CAM (K,H,W) float32 of an image's own classes (METHOD 3, 4.3)."""
    index = torch.as_tensor(keys, device=device)
    maps: list[Tensor] = []
    for view in views:
        pair = torch.stack([view, view.flip(-1)]).to(device)
        maps += list(read(net(pair), (pair.shape[2], pair.shape[3]))[:, index])
    return merge_scales(maps, size=size, rule=rule).cpu().numpy()


def read_cam(path: StoragePath) -> tuple[Any, Any] | None:
    """Keys and CAM of an image, or None when the file is missing or broken."""
    try:
        return decode_cam(read_bytes(path))
    except FileNotFoundError:
        return None


def decode_cam(data: bytes) -> tuple[Any, Any] | None:
    """`read_cam` of a file's contents."""
    try:
        with np.load(BytesIO(data)) as stored:
            return stored["keys"], stored["cam"]
    except (EOFError, ValueError, KeyError, OSError, BadZipFile, zlib.error):
        return None


def whole_cam(seeds: StageDir, image_id: str) -> tuple[Any, Any]:
    """Keys and CAM of an image from a finished stage. ValueError when it is not there."""
    loaded = read_cam(seeds / "cams" / f"{image_id}.npz")
    if loaded is None:
        raise ValueError(f"{seeds / 'cams'} has no whole CAM of {image_id}; delete {seeds.path}")
    return loaded


def seed_chunk(shared: Shared, items: Sequence[Item], device: torch.device) -> None:
    """Write the seeds of some images at the chosen score, and the overlays of the fixed set."""
    for _, image_id in items:
        keys, cam = whole_cam(shared.folder, image_id)
        palette_png(seed_from_cam(cam, keys, bg_score=shared.bg_score), shared.folder / "seeds" / f"{image_id}.png")
        if image_id in shared.overlays:
            heat = cam.max(0) if len(cam) else np.zeros(shared.dataset.image_size(image_id), np.float32)
            drawn = overlay(shared.dataset.image(image_id), np.clip(heat, 0, 1))
            with atomic_write(shared.folder / "overlays" / f"{image_id}.png") as handle:
                Image.fromarray(drawn).save(handle, "PNG")
