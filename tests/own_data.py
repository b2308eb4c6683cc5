"""Tiny data sets in other layouts than VOC's, all GENERATED: COCO with polygons, RLEs and crowds, and a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 36, 48
NUM_CLASSES = 80
# COCO's ids have gaps; these have others. Out of order on purpose: ids decide.
CATEGORIES = [{"id": 2 * k + 5, "name": f"thing {k:02d}"} for k in reversed(range(1, NUM_CLASSES + 1))]
COLOURS = {3: (220, 40, 40), 40: (40, 200, 60), 80: (60, 80, 230)}


def category(number: int) -> int:
    """COCO's id of class 1..80."""
    return 2 * number + 5


def box(top: int, left: int, bottom: int, right: int) -> list[float]:
    """The polygon of a rectangle."""
    return [left, top, right, top, right, bottom, left, bottom]


def rle(mask_HW: NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's uncompressed RLE: run lengths of 0 and 1 in turn, down the columns."""
    counts, value = [0], False
    for pixel in mask_HW.T.reshape(-1):
        if pixel != value:
            counts.append(0)
            value = bool(pixel)
        counts[-1] += 1
    return {"size": list(mask_HW.shape), "counts": counts}


def annotation(number: int, segmentation: Any, area: float, *, crowd: int = 0) -> dict[str, Any]:
    """An annotation of class `number`."""
    return {"category_id": category(number), "segmentation": segmentation, "area": area, "iscrowd": crowd}


def picture(mask_HW: NDArray[np.uint8], seed: int) -> Image.Image:
    """Noise with each class in its colour."""
    pixels = np.random.default_rng(seed).integers(90, 150, (*mask_HW.shape, 3), dtype=np.uint8)
    for number, colour in COLOURS.items():
        pixels[mask_HW == number] = colour
    return Image.fromarray(pixels)


def write_part(root: Path, part: str, shown: list[list[dict[str, Any]]], first: int) -> list[str]:
    """Images `first`, `first + 1`, ... of a part with these annotations; their ids."""
    images, annotations = [], []
    (root / part).mkdir(parents=True)
    (root / "SALImages" / part).mkdir(parents=True)
    for number, mine in enumerate(shown, first):
        name = f"COCO_{part}_{number:012d}"
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        for one in mine:
            if isinstance(one["segmentation"], list) and one["segmentation"]:
                xs, ys = one["segmentation"][0][::2], one["segmentation"][0][1::2]
                mask[int(min(ys)) : int(max(ys)), int(min(xs)) : int(max(xs))] = (one["category_id"] - 5) // 2
        picture(mask, number).save(root / part / f"{name}.jpg", quality=95)
        Image.fromarray((mask > 0).astype(np.uint8) * 255).save(root / "SALImages" / part / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
        annotations += [{"id": 1000 * number + i, "image_id": number, **one} for i, one in enumerate(mine)]
    (root / "annotations").mkdir(exist_ok=True)
    whole = {"info": {}, "categories": CATEGORIES, "annotations": annotations, "images": images}
    (root / f"annotations/instances_{part}.json").write_text(json.dumps(whole))
    return [Path(image["file_name"]).stem for image in images]


def make_coco(root: Path) -> Path:
    """Nine train images, of which the last has no annotation, and three val images."""
    stripe = np.zeros((HEIGHT, WIDTH), bool)
    stripe[:, 4:9] = True
    crowd = np.zeros((HEIGHT, WIDTH), bool)
    crowd[28:] = True
    big, small = annotation(3, [box(4, 4, 24, 40)], 720.0), annotation(40, [box(10, 12, 20, 24)], 120.0)
    striped, people = annotation(80, rle(stripe), float(stripe.sum())), annotation(80, rle(crowd), 1e4, crowd=1)
    two = annotation(40, [box(2, 2, 12, 12), box(14, 20, 30, 44)], 484.0)
    train = [[small, big], [striped], [two, people], [big], [small], [two], [striped, small], [big, people], []]
    write_part(root, "train2014", train, 9)
    write_part(root, "val2014", [[big], [small, two], [striped]], 500)
    return root


CLASSES = ("Äpfel", "pear tree", "plum")
# Stems that are easy to get wrong: spaces, dots, letters of other alphabets, a suffix within.
TAGS = {
    "plain": "plum", "two words": "Äpfel;plum", "v1.2.final": "pear tree", "käse": "Äpfel",
    "a.jpg": "plum", "日本": "pear tree;plum", "x (1)": "Äpfel", "zz": "pear tree",
}  # fmt: skip
VAL = ("x (1)", "zz")


def make_folder(root: Path) -> Path:
    """Six train and two val images with masks and saliency maps; splits are a column of tags.csv."""
    for folder in ("images", "masks", "saliency"):
        (root / folder).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    lines = ["image,classes,split"]
    for seed, (stem, names) in enumerate(TAGS.items()):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        for name in names.split(";"):
            number = CLASSES.index(name) + 1
            mask[4 : HEIGHT - 4, 14 * number - 10 : 14 * number] = number
        pixels = np.random.default_rng(seed).integers(90, 150, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[mask > 0] = np.array([(0, 0, 0), *COLOURS.values()], np.uint8)[mask[mask > 0]]
        suffix = ".png" if seed % 2 else ".jpg"
        Image.fromarray(pixels).save(root / f"images/{stem}{suffix}")
        Image.fromarray(mask).save(root / f"masks/{stem}.png")
        Image.fromarray((mask > 0).astype(np.uint8) * 255).save(root / f"saliency/{stem}.png")
        lines.append(f"{stem}{suffix if seed < 3 else ''},{names},{'val' if stem in VAL else 'train'}")
    (root / "tags.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
