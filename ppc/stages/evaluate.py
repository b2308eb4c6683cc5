"""Score seeds and masks against the dataset's masks: one confusion matrix a split, divided once (METHOD 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ppc.artifacts import Progress
from ppc.data import VocLayout
from ppc.figures import read_palette_png
from ppc.metrics import Counts, confusion, iou, miou
from ppc.places import StoragePath
from ppc.stages.context import StageContext


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    folder: StoragePath  # with ID.png label maps
    dataset: VocLayout
    split: str


def run(context: StageContext) -> dict[str, Any]:
    """IoU of each product on each split that has masks. The split is in the metric's name."""
    cfg, dataset = context.cfg, context.dataset
    products = {"seed": context.inputs["make_seeds"] / "seeds"}
    if "refine_crf" in context.inputs:
        products["mask"] = context.inputs["refine_crf"] / "masks"
    splits = [split for split in cfg.seeds.splits if dataset.has_masks(split)]
    total = len(products) * sum(len(dataset.ids(split)) for split in splits)
    progress = Progress(context.folder / "progress.json", total=total, unit="image", used=context.rt.meter.read)
    result: dict[str, Any] = {"metrics": {}, "per_class_iou": {}, "confusion": {}, "counts": {}}
    before = 0
    for split in splits:
        ids = dataset.ids(split)
        result["counts"][split] = len(ids)
        for product, folder in products.items():
            shared = Shared(folder, dataset, split)
            conf = np.zeros((dataset.num_classes + 1,) * 2, np.int64)
            context.rt.map(count_chunk, shared, ids, cfg.runtime, partial(_add, conf, progress, before))
            name, absent = f"{product}_miou_{split}", cfg.seeds.absent_classes
            result["metrics"][name] = miou(conf, absent=absent)
            per_class = iou(conf, absent=absent)
            result["per_class_iou"][f"{product}_{split}"] = [None if np.isnan(x) else float(x) for x in per_class]
            result["confusion"][f"{product}_{split}"] = conf.tolist()
            before += len(ids)
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
