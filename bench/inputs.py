"""The training input pipeline: images a second of one core, ours against PIL and torchvision one image after another.

    python bench/inputs.py [--images 64] [--repeats 5]

Read, decode, resize the long side to 448..768, mirror, jitter colours, normalise, crop or pad to 448 (METHOD 1.1: SEAM,
PPC), over GENERATED JPEGs of 375 x 500. The reference does these steps in this order with torchvision's own transforms;
its draws come from other generators. The last table says how many cores keep up with the training steps of RESULTS.md.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import cpu_ms, head, row, start, write_voc
from PIL import Image
from torch import Tensor
from torchvision.transforms import ColorJitter

from ppc.data import Dataset
from ppc.data.loader import CamTrainSet, collate
from ppc.normalisation import NORMALISATIONS

CROP_PX, LONG_PX = 448, (448, 768)
GPU_RATES = {"float32 with TF32": 58.6, "bf16": 95.7}  # images/s of a training step on an H200, RESULTS.md
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)


def make_set(dataset: Dataset, *, color_jitter: bool = True) -> CamTrainSet:
    """The images as stage train_cam reads them."""
    return CamTrainSet(
        dataset,
        "train",
        crop_px=CROP_PX,
        resize_long_px=LONG_PX,
        color_jitter=color_jitter,
        normalise=NORMALISATIONS["imagenet"].apply,
        seed=0,
    )


def ours(samples: CamTrainSet, ids: Sequence[str]) -> Tensor:
    """A batch (N,3,448,448)."""
    return collate([samples.sample(0, image_id) for image_id in ids])["image_N3HW"]


def reference(dataset: Dataset, ids: Sequence[str], rng: random.Random) -> Tensor:
    """The same with other draws."""
    return torch.stack([reference_image(dataset.image_path(image_id), rng) for image_id in ids])


def reference_image(path: Path, rng: random.Random, *, color_jitter: bool = True) -> Tensor:
    """One image (3,448,448), padded with 0."""
    image = Image.open(path).convert("RGB")
    scale = rng.randint(*LONG_PX) / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if color_jitter:
        image = ColorJitter(0.3, 0.3, 0.3, 0.1)(image)
    pixels_HW3 = (np.asarray(image, np.float32) / 255 - MEAN) / STD
    square_HW3 = np.zeros((CROP_PX, CROP_PX, 3), np.float32)
    cut = []  # of each axis: where it starts in the image and in the square, and how much is seen
    for side in (image.width, image.height):
        shift = rng.randrange(abs(side - CROP_PX) + 1)
        cut.append((shift, 0, CROP_PX) if side > CROP_PX else (0, shift, side))
    (left, to_left, width), (top, to_top, height) = cut
    seen_HW3 = pixels_HW3[top : top + height, left : left + width]
    square_HW3[to_top : to_top + height, to_left : to_left + width] = seen_HW3
    return torch.from_numpy(square_HW3.transpose(2, 0, 1).copy())


def main() -> None:
    """Print both tables, and where the time of ours goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    start("Training inputs, JPEGs of 375 x 500, crop 448")
    with tempfile.TemporaryDirectory(prefix="ppc-bench-") as folder:
        dataset = write_voc(Path(folder) / "voc", given.images)
        samples, plain, ids = make_set(dataset), make_set(dataset, color_jitter=False), dataset.ids("train")
        torch.manual_seed(0)
        calls = [
            partial(reference, dataset, ids, random.Random(0)),
            partial(ours, samples, ids),
            partial(ours, plain, ids),
            lambda: [dataset.image(image_id) for image_id in ids],
        ]
        one_by_one, all_of_it, uncoloured, read = (ms / len(ids) for ms in cpu_ms(calls, given.repeats))
    head("inputs", "an image, ms", "images/s of a core", "ratio")
    row("PIL and torchvision", one_by_one, 1000 / one_by_one, "1")
    row("ours", all_of_it, 1000 / all_of_it, one_by_one / all_of_it)
    row("of that: read and decode", read, "", "")
    row("colour jitter", all_of_it - uncoloured, "", "")
    row("resize, crop, normalise, stack", uncoloured - read, "", "")
    print()
    head("training step on an H200", "images/s", "cores that keep up")
    for name, rate in GPU_RATES.items():
        row(name, str(rate), str(math.ceil(rate * all_of_it / 1000)))


if __name__ == "__main__":
    main()
