"""Reader of the VOC layout: lists, images, masks, image-level labels and saliency maps under one root folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from ppc.data.dataset import IMAGE_SUFFIXES, Dataset, Float32
from ppc.data.labels import DataError, parse_id, read_classes, read_label_file, read_list
from ppc.names import check_name
from ppc.places import file_sha256

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LABEL_SOURCES = ("cls_labels", "xml", "masks")
# SBD's extra masks live beside the official ones; a split of another name never reads them.
AUGMENTED_SPLITS = ("train_aug", "trainaug")
LISTS = "ImageSets/Segmentation"
OTHER_LAYOUTS = (("annotations/instances_*.json", "coco"), ("tags.csv", "folder"))


class VocLayout(Dataset):
    """A data set in the VOC 2012 layout; other classes than VOC's are named in `classes.txt`."""

    def __init__(self, root: str | Path, *, labels: str = "auto") -> None:
        """Open `root`; `labels` is auto, cls_labels, xml or masks. Raises DataError if it is no such folder."""
        root = Path(root)
        for folder in ("JPEGImages", LISTS):
            if not (root / folder).is_dir():
                raise DataError(root, f"has no folder {folder}", _meant(root))
        classes = root / "classes.txt"
        names = read_classes(classes) if classes.is_file() else VOC_CLASSES
        super().__init__(root, class_names=names, label_source=_label_source(root, labels))

    # -- lists

    def splits(self) -> list[str]:
        """Names of the lists in ImageSets/Segmentation."""
        return sorted(path.stem for path in (self.root / LISTS).glob("*.txt"))

    def list_path(self, split: str) -> Path:
        """The split's list."""
        return self.root / LISTS / f"{check_name(split, 'split')}.txt"

    def listed(self, split: str) -> list[str]:
        """Image ids in the list's order; bare ids, PSA lines and IRN's integer ids are understood."""
        path = self.list_path(split)
        if not path.is_file():
            raise DataError(path, f"no split `{split}`", f"this data set has: {', '.join(self.splits()) or 'none'}")
        return [self._resolve(parse_id(line, path, n)) for n, line in read_list(path)]

    def _resolve(self, image_id: str) -> str:
        # IRN writes 2007_000032 as the integer 2007000032; a file that really has that name comes first.
        if re.fullmatch(r"\d{10}", image_id) and not self._has_image(image_id):
            dashed = f"{image_id[:4]}_{image_id[4:]}"
            return dashed if self._has_image(dashed) else image_id
        return image_id

    # -- files

    def image_path(self, image_id: str) -> Path:
        """The image's file. Raises DataError if there is none."""
        return self._find("JPEGImages", image_id, IMAGE_SUFFIXES, "put the image there or take its id off the list")

    def mask_path(self, image_id: str, *, split: str | None = None) -> Path:
        """The mask's file: SegmentationClassAug for split train_aug, SegmentationClass for all others."""
        augmented = split in AUGMENTED_SPLITS
        remedy = (
            "split train_aug needs SBD's masks in SegmentationClassAug"
            if augmented
            else "put the mask there or take its id off the list (masks of train_aug alone are in SegmentationClassAug)"
        )
        return self._find("SegmentationClassAug" if augmented else "SegmentationClass", image_id, (".png",), remedy)

    def annotation_path(self, image_id: str) -> Path:
        """The image's XML file. Raises DataError if there is none."""
        return self._find("Annotations", image_id, (".xml",), "add it, or set data.labels to cls_labels or masks")

    def saliency_path(self, image_id: str) -> Path:
        """The saliency map's file. Raises DataError if there is none."""
        remedy = "a method with saliency needs one map an image"
        return self.find(self.root / "SALImages", image_id, (".png", ".jpg"), remedy, of_image=False)

    @property
    def has_saliency(self) -> bool:
        """Whether the root has a folder of saliency maps (a map of every image is not promised)."""
        return (self.root / "SALImages").is_dir()

    @property
    def saliency_place(self) -> str:
        """Where saliency maps are looked for."""
        return f"a folder SALImages in {self.root}"

    @property
    def classes_place(self) -> str:
        """Where the class names come from."""
        path = self.root / "classes.txt"
        return str(path) if path.is_file() else f"VOC, as there is no {path}"

    def label_files(self) -> list[Path]:
        """Files beside the images' own that decide their tags."""
        return [self.root / "cls_labels.npy", self.root / "classes.txt"]

    def own_digests(self, image_id: str) -> list[Callable[[], str]]:
        """sha256 of the XML file."""
        return [lambda: file_sha256(self.annotation_path(image_id))]

    def _has_image(self, image_id: str) -> bool:
        return any((self.root / "JPEGImages" / f"{image_id}{suffix}").is_file() for suffix in IMAGE_SUFFIXES)

    def _find(self, folder: str, image_id: str, suffixes: tuple[str, ...], remedy: str) -> Path:
        return self.find(self.root / folder, image_id, suffixes, remedy, of_image=True)

    # -- image-level labels

    def image_label(self, image_id: str, *, split: str | None = None) -> Float32:
        """Tags of an image, float32 (K,), 1 = present; `split` only matters to labels from masks."""
        if self.label_source == "cls_labels":
            path = self.root / "cls_labels.npy"
            if image_id not in self._label_file:
                remedy = "add it, or set data.labels to xml or masks"
                raise DataError(path, f"no label for {image_id}", remedy, of_image=True)
            return self._label_file[image_id].copy()
        if self.label_source == "masks":
            return self.mask_label(image_id, split)
        names = self._xml_names(image_id)
        return np.array([float(name in names) for name in self.class_names], np.float32)

    @cached_property
    def _label_file(self) -> dict[str, Float32]:
        path = self.root / "cls_labels.npy"
        return {self._resolve(key): value for key, value in read_label_file(path, self.num_classes).items()}

    def _xml_names(self, image_id: str) -> set[str]:
        path = self.annotation_path(image_id)
        try:
            tree = ElementTree.parse(path)
        except (ElementTree.ParseError, ValueError) as error:
            raise DataError(path, f"not readable as XML ({error})", "download it again", of_image=True) from error
        # Only an object's own name: a person's parts (head, hand, foot) have names too.
        names = {(item.findtext("name") or "").strip() for item in tree.getroot().findall("object")}
        if unknown := sorted(names - set(self.class_names)):
            known = f"known: {', '.join(self.class_names)}"
            raise DataError(path, f"unknown class `{unknown[0]}`", known, of_image=True)
        return names


def _meant(root: Path) -> str:
    """What a folder that is not in this layout could have been meant as."""
    nested = next((path.parent for path in sorted(root.glob("*/JPEGImages"))), None)
    if nested is not None:
        return f"did you mean {nested}?"
    other = next((name for pattern, name in OTHER_LAYOUTS if any(root.glob(pattern))), None)
    if other is not None:
        return f"it looks like data.name {other} (ppc data check: --name {other})"
    return "data.root must be a folder in the VOC 2012 layout, or data.name say another (coco, folder)"


def _label_source(root: Path, labels: str) -> str:
    present = {
        "cls_labels": (root / "cls_labels.npy").is_file(),
        "xml": (root / "Annotations").is_dir(),
        "masks": any((root / f"SegmentationClass{end}").is_dir() for end in ("", "Aug")),
    }
    if labels == "auto":
        found = next((source for source in LABEL_SOURCES if present[source]), None)
        if found is None:
            raise DataError(root, "no image-level labels", "add cls_labels.npy, Annotations/ or SegmentationClass/")
        return found
    if labels not in LABEL_SOURCES:
        raise ValueError(f"data.labels: `{labels}` is none of auto, {', '.join(LABEL_SOURCES)}")
    if not present[labels]:
        have = ", ".join(source for source in LABEL_SOURCES if present[source]) or "none"
        raise DataError(root, f"data.labels is `{labels}` but its files are missing", f"there is: {have}")
    return labels
