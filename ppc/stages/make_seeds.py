"""CAMs of every image, the whole background-score curve in one pass, and the seeds at the score that was chosen.

Products: `cams/ID.npz` (keys K, cam (K,H,W) float32 of the image's own classes), `seeds/ID.png`, `overlays/ID.png`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ppc.artifacts import Progress, StageDir, atomic_write
from ppc.cam import merge_scales, seed_from_cam
from ppc.config import TrialConfig
from ppc.data import VocLayout
from ppc.figures import overlay, palette_png
from ppc.methods import METHODS
from ppc.metrics import OFFICIAL_THRESHOLDS, choose_bg_score, curve_counts, curve_miou
from ppc.nets import CamNet
from ppc.seeding import derive_rng
from ppc.stages.context import StageContext
from ppc.stages.train_cam import load_net


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    cfg: TrialConfig
    folder: StageDir
    weights: Path
    dataset: VocLayout
    bg_score: float = 0.0
    overlays: frozenset[str] = frozenset()


Item = tuple[str, str]  # split, image id


def run(context: StageContext) -> dict[str, Any]:
    """Infer, count, choose the score, write the seeds."""
    cfg, dataset, folder = context.cfg, context.dataset, context.folder
    items = images_of(cfg, dataset)
    progress = Progress(folder / "progress.json", total=2 * len(items), unit="image")
    shared = Shared(cfg, folder, context.inputs["train_cam"] / "weights.pt", dataset)
    parts = context.rt.map(infer_chunk, shared, items, cfg.runtime, progress.update, use_gpu=True)
    counts = dict(zip(items, parts, strict=True))
    curves = {
        split: np.sum([counts[split, image_id] for image_id in dataset.ids(split)], axis=0)
        for split in cfg.seeds.splits
        if dataset.has_masks(split)
    }
    score = chosen_score(cfg, dataset, counts)
    first = dataset.ids(cfg.seeds.splits[0])
    drawn = frozenset(first[:: max(1, len(first) // max(1, cfg.seeds.overlays))][: cfg.seeds.overlays])
    shared = Shared(cfg, folder, shared.weights, dataset, score, drawn)
    context.rt.map(seed_chunk, shared, items, cfg.runtime, lambda done: progress.update(len(items) + done))
    absent = cfg.seeds.absent_classes
    return {
        "metrics": {"bg_score": score},
        "protocol": cfg.seeds.protocol,
        "absent_classes": absent,
        "overlays": sorted(drawn),
        "curves": {
            split: {"thresholds": list(OFFICIAL_THRESHOLDS), "miou": curve_miou(total, absent=absent).tolist()}
            for split, total in curves.items()
        },
    }


def images_of(cfg: TrialConfig, dataset: VocLayout) -> list[Item]:
    """All (split, id) that get a CAM: the splits of the seeds, and the drawn images of protocol val_subset."""
    items = [(split, image_id) for split in cfg.seeds.splits for image_id in dataset.ids(split)]
    if cfg.seeds.protocol == "val_subset":
        items += val_subset(cfg, dataset)
    return list(dict.fromkeys(items))


def val_subset(cfg: TrialConfig, dataset: VocLayout) -> list[Item]:
    """The images whose masks choose the score under protocol val_subset: the same for all trials of a dataset."""
    split = cfg.seeds.val_subset_split
    ids = sorted(dataset.ids(split))
    number = min(cfg.seeds.val_subset_images, len(ids))
    return [(split, image_id) for image_id in sorted(derive_rng("val_subset").sample(ids, number))]


def chosen_score(cfg: TrialConfig, dataset: VocLayout, counts: dict[Item, Any]) -> float:
    """The background score by the protocol of the config. ValueError when the masks it needs are not there."""
    seeds = cfg.seeds
    if seeds.protocol == "fixed":
        return seeds.bg_score
    split = seeds.val_subset_split if seeds.protocol == "val_subset" else seeds.splits[0]
    if not dataset.has_masks(split):
        raise ValueError(f"seeds.protocol {seeds.protocol} needs masks of split {split}; use seeds.protocol fixed")
    chosen = val_subset(cfg, dataset) if seeds.protocol == "val_subset" else [(split, i) for i in dataset.ids(split)]
    curve = curve_miou(np.sum([counts[item] for item in chosen], axis=0), absent=seeds.absent_classes)
    return choose_bg_score(protocol="best", fixed=seeds.bg_score, thresholds_T=OFFICIAL_THRESHOLDS, miou_T=curve)


def infer_chunk(shared: Shared, items: Sequence[Item]) -> list[Any]:
    """CAMs of some images, and their curve counts (None without a mask). A CAM that is there is not made again."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset, cfg = shared.dataset, shared.cfg
    results = []
    for split, image_id in items:
        path = shared.folder / "cams" / f"{image_id}.npz"
        loaded = read_cam(path)
        if loaded is None:
            net, normalisation = load_net(cfg.model_dump_json(), dataset.num_classes, shared.weights, device)
            keys = np.flatnonzero(dataset.image_label(image_id, split=split))
            image = dataset.image(image_id)
            views = [normalisation.apply(view) for view in scaled(image, cfg.seeds.scales)]
            cam = infer_cam(net, views, keys, image.shape[:2], cfg.method.name, device)
            with atomic_write(path) as handle:
                np.savez(handle, keys=keys, cam=cam)
            loaded = keys, cam
        counts = None
        if dataset.has_masks(split):
            keys, cam = loaded
            mask = dataset.mask(image_id, split=split)
            counts = curve_counts(
                cam, keys, mask, thresholds_T=OFFICIAL_THRESHOLDS, num_classes=dataset.num_classes + 1
            )
        results.append(counts)
    return results


def scaled(image_HW3: Any, scales: Sequence[float]) -> list[Any]:
    """The image at each scale, bicubic, sides rounded (METHOD 3)."""
    height, width = image_HW3.shape[:2]
    image = Image.fromarray(image_HW3)
    sizes = [(max(1, round(width * s)), max(1, round(height * s))) for s in scales]
    return [
        image_HW3 if size == (width, height) else np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        for size in sizes
    ]


@torch.inference_mode()
def infer_cam(
    net: CamNet, views: Sequence[Tensor], keys: Any, size: tuple[int, int], method: str, device: torch.device
) -> Any:
    """Multi-scale and mirrored CAM (K,H,W) float32 of an image's own classes (METHOD 3, 4.3)."""
    index = torch.as_tensor(keys, device=device)
    maps: list[Tensor] = []
    for view in views:
        pair = torch.stack([view, view.flip(-1)]).to(device)
        maps += list(METHODS[method].class_maps(net(pair), (pair.shape[2], pair.shape[3]))[:, index])
    return merge_scales(maps, size=size, rule=METHODS[method].merge_rule).cpu().numpy()


def read_cam(path: Path) -> tuple[Any, Any] | None:
    """Keys and CAM of an image, or None when the file is missing or broken."""
    try:
        with path.open("rb") as handle, np.load(handle) as stored:  # np.load itself leaves a broken file open
            return stored["keys"], stored["cam"]
    except (EOFError, ValueError, KeyError, OSError, BadZipFile, zlib.error):
        return None


def seed_chunk(shared: Shared, items: Sequence[Item]) -> list[Any]:
    """Write the seeds of some images at the chosen score, and the overlays of the fixed set."""
    for _, image_id in items:
        loaded = read_cam(shared.folder / "cams" / f"{image_id}.npz")
        assert loaded is not None, f"no CAM of {image_id}"
        keys, cam = loaded
        palette_png(seed_from_cam(cam, keys, bg_score=shared.bg_score), shared.folder / "seeds" / f"{image_id}.png")
        if image_id in shared.overlays:
            heat = cam.max(0) if len(cam) else np.zeros(shared.dataset.image_size(image_id)[::-1], np.float32)
            drawn = overlay(shared.dataset.image(image_id), np.clip(heat, 0, 1))
            with atomic_write(shared.folder / "overlays" / f"{image_id}.png") as handle:
                Image.fromarray(drawn).save(handle, "PNG")
    return [None] * len(items)
