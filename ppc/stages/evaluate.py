"""Score label maps against the dataset's masks: one confusion matrix a split, divided once (METHOD 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ppc.artifacts import Progress
from ppc.data import Dataset
from ppc.figures import read_palette_png
from ppc.metrics import Counts, confusion, iou, miou
from ppc.places import StoragePath
from ppc.stages.context import StageContext
from ppc.stages.products import PRODUCTS, products_of, splits_of


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    folder: StoragePath  # with ID.png label maps
    dataset: Dataset
    split: str


def run(context: StageContext) -> dict[str, Any]:
    """IoU of each product on each split that has masks. The split is in the metric's name."""
    cfg, dataset = context.cfg, context.dataset
    made = [
        (name, split)
        for name in products_of(context.inputs)
        for split in splits_of(name, cfg)
        if dataset.has_masks(split)
    ]
    ids = {split: list(dict.fromkeys(dataset.ids(split))) for _, split in made}  # each once, as the curve counts them
    total = sum(len(ids[split]) for _, split in made)
    progress = Progress(context.folder / "progress.json", total=total, unit="image", used=context.rt.meter.read)
    result: dict[str, Any] = {"metrics": {}, "per_class_iou": {}, "confusion": {}, "counts": {}}
    result["counts"] = {split: len(ids[split]) for split in ids}
    before = 0
    for product, split in made:
        stage, folder = PRODUCTS[product]
        shared = Shared(context.inputs[stage] / folder, dataset, split)
        conf = np.zeros((dataset.num_classes + 1,) * 2, np.int64)
        context.rt.map(count_chunk, shared, ids[split], cfg.runtime, partial(_add, conf, progress, before))
        absent = cfg.seeds.absent_classes
        result["metrics"][f"{product}_miou_{split}"] = miou(conf, absent=absent)
        per_class = iou(conf, absent=absent)
        result["per_class_iou"][f"{product}_{split}"] = [None if np.isnan(x) else float(x) for x in per_class]
        result["confusion"][f"{product}_{split}"] = conf.tolist()
        before += len(ids[split])
    return result


def _add(conf: Counts, progress: Progress, before: int, done: int, part: Counts) -> None:
    conf += part
    progress.update(before + done)


def count_chunk(shared: Shared, ids: Sequence[str], device: torch.device) -> Counts:
    """Confusion counts of some images, added up."""
    total = np.zeros((shared.dataset.num_classes + 1,) * 2, np.int64)
    for image_id in ids:
        predicted = read_palette_png(shared.folder / f"{image_id}.png")
        mask = shared.dataset.mask(image_id, split=shared.split)
        total += confusion(predicted, mask, shared.dataset.num_classes + 1)
    return total
