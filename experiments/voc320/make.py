"""Make the set of the voc320 studies from PASCAL VOC 2012: the images of the lists here, longest side 320 px.

    python experiments/voc320/make.py VOC2012 OUT

Images are JPEGs of quality 90, masks are reduced to the nearest pixel. The tags are those of `cls_labels.npy` where it
is, else of the annotations. The set behind the figures in LOG.md was made elsewhere by the same rules; the
resampling filter is not known, so pixels may differ a little.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image

LISTS = Path(__file__).parent
LONG_PX = 320


def reduced(image: Image.Image, filter_: Image.Resampling) -> Image.Image:
    """The image with its longer side at 320 px."""
    scale = LONG_PX / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), filter_)


def main() -> None:
    """Read the arguments and make the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voc", type=Path, help="VOCdevkit/VOC2012")
    parser.add_argument("out", type=Path, help="a new folder")
    args = parser.parse_args()
    folders = ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass", "Annotations")
    lists, images, masks, tags = (args.out / name for name in folders)
    for folder in (lists, images, masks, tags):
        folder.mkdir(parents=True)
    for path in LISTS.glob("*.txt"):
        shutil.copy(path, lists)
    for name in (LISTS / "train.txt").read_text().split() + (LISTS / "val.txt").read_text().split():
        with Image.open(args.voc / "JPEGImages" / f"{name}.jpg") as image:
            reduced(image.convert("RGB"), Image.Resampling.BICUBIC).save(images / f"{name}.jpg", quality=90)
        with Image.open(args.voc / "SegmentationClass" / f"{name}.png") as mask:
            reduced(mask, Image.Resampling.NEAREST).save(masks / f"{name}.png")
        shutil.copy(args.voc / "Annotations" / f"{name}.xml", tags)
    if (args.voc / "cls_labels.npy").is_file():
        shutil.copy(args.voc / "cls_labels.npy", args.out)


if __name__ == "__main__":
    main()
