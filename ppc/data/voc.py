"""Reader of the VOC layout: lists, images, masks, image-level labels and saliency maps under one root folder.

K foreground classes; a mask holds 0 = background, 1..K = classes in the order of `class_names`, 255 = ignore.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ppc.data.labels import DataError, parse_id, read_label_file
from ppc.names import check_name

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IGNORE = 255
LABEL_SOURCES = ("cls_labels", "xml", "masks")
# SBD's extra masks live beside the official ones; a split of another name never reads them.
AUGMENTED_SPLITS = ("train_aug", "trainaug")
IMAGE_FOLDERS = ("JPEGImages", "SegmentationClass", "SegmentationClassAug")
OR_SKIP = "or leave all such images out: data.on_broken=skip (ppc data check names them)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)

Uint8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


class VocLayout:
    """A data set in the VOC layout; reading it never writes, and every complaint is a `DataError` (a ValueError)."""

    def __init__(self, root: str | Path, *, labels: str = "auto") -> None:
        """Open `root`; `labels` is auto, cls_labels, xml or masks. Raises DataError if it is no such folder."""
        self.root = Path(root)
        for folder in ("JPEGImages", "ImageSets/Segmentation"):
            if not (self.root / folder).is_dir():
                nested = next((p.parent for p in sorted(self.root.glob("*/JPEGImages"))), None)
                hint = f"did you mean {nested}?" if nested else "data.root must be a folder in the VOC 2012 layout"
                raise DataError(self.root, f"has no folder {folder}", hint)
        self.left_out: dict[str, tuple[str, ...]] = {}  # by split: ids that `leave_out` took off its list
        self.class_names = self._read_class_names()
        self.label_source = self._pick_label_source(labels)

    @property
    def num_classes(self) -> int:
        """K, the foreground classes."""
        return len(self.class_names)

    # -- lists

    def splits(self) -> list[str]:
        """Names of the lists in ImageSets/Segmentation."""
        return sorted(path.stem for path in (self.root / "ImageSets/Segmentation").glob("*.txt"))

    def ids(self, split: str) -> list[str]:
        """Image ids of a split in the list's order; bare ids, PSA lines and IRN's integer ids are understood."""
        path = self.root / "ImageSets/Segmentation" / f"{check_name(split, 'split')}.txt"
        if not path.is_file():
            raise DataError(path, f"no split `{split}`", f"this data set has: {', '.join(self.splits()) or 'none'}")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(path, "not a UTF-8 text file", "write one image id a line") from error
        found = [self._resolve(parse_id(line, path, n)) for n, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise DataError(path, "the list is empty", "write one image id a line")
        absent = frozenset(self.left_out.get(split, ()))
        return [image_id for image_id in found if image_id not in absent] if absent else found

    def leave_out(self, split: str, image_ids: Iterable[str]) -> None:
        """Take images off a split's list, for this object and its copies. Raises DataError if none would be left."""
        self.left_out.pop(split, None)
        listed, chosen = self.ids(split), frozenset(image_ids)
        if chosen.issuperset(listed):
            path = self.root / "ImageSets/Segmentation" / f"{split}.txt"
            raise DataError(path, f"all {len(listed)} images are broken", "name them with: ppc data check ROOT")
        if chosen:
            self.left_out[split] = tuple(image_id for image_id in dict.fromkeys(listed) if image_id in chosen)

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

    def has_masks(self, split: str) -> bool:
        """Whether the split comes with masks to score against: its first image has one."""
        try:
            self.mask_path(self.ids(split)[0], split=split)
        except (DataError, IndexError):
            return False
        return True

    def annotation_path(self, image_id: str) -> Path:
        """The image's XML file. Raises DataError if there is none."""
        return self._find("Annotations", image_id, (".xml",), "add it, or set data.labels to cls_labels or masks")

    def saliency_path(self, image_id: str) -> Path:
        """The saliency map's file. Raises DataError if there is none."""
        return self._find("SALImages", image_id, (".png", ".jpg"), "a method with saliency needs one map an image")

    @property
    def has_saliency(self) -> bool:
        """Whether the root has a folder of saliency maps (a map of every image is not promised)."""
        return (self.root / "SALImages").is_dir()

    def _has_image(self, image_id: str) -> bool:
        return any((self.root / "JPEGImages" / f"{image_id}{suffix}").is_file() for suffix in IMAGE_SUFFIXES)

    def _find(self, folder: str, image_id: str, suffixes: tuple[str, ...], remedy: str) -> Path:
        check_name(image_id, "image")
        for suffix in suffixes:
            path = self.root / folder / f"{image_id}{suffix}"
            if path.is_file():
                return path
        raise DataError(self.root / folder / f"{image_id}{suffixes[0]}", "missing", remedy)

    # -- contents

    def image(self, image_id: str) -> Uint8:
        """RGB image, uint8 (H, W, 3). Raises DataError if missing or broken."""
        return _decode(self.image_path(image_id), lambda image: image.convert("RGB"))

    def image_size(self, image_id: str) -> tuple[int, int]:
        """(height, width) from the file's header."""
        path = self.image_path(image_id)
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except DECODE_ERRORS as error:
            raise _broken(path, error) from error

    def mask(self, image_id: str, *, split: str | None = None) -> Uint8:
        """Label map, uint8 (H, W). Raises DataError if missing, broken, of another size or with an unknown class."""
        path = self.mask_path(image_id, split=split)
        mask_HW = _decode(path, lambda image: _indices(image, path))
        self._same_size(path, mask_HW, image_id)
        present = np.flatnonzero(np.bincount(mask_HW.reshape(-1), minlength=256))
        unknown = [int(v) for v in present if self.num_classes < v < IGNORE]
        if unknown:
            raise DataError(
                path,
                f"unknown class {unknown[0]} (there are {self.num_classes} classes)",
                "masks hold 0..K and 255; a data set with other classes names them in classes.txt",
            )
        return mask_HW

    def saliency(self, image_id: str) -> Uint8:
        """Saliency map, uint8 (H, W), the mean of its colour channels (METHOD 1.1)."""
        path = self.saliency_path(image_id)
        map_HW = _decode(path, lambda image: image if image.mode == "L" else image.convert("RGB"))
        if map_HW.ndim == 3:
            map_HW = np.rint(map_HW.mean(2)).astype(np.uint8)
        self._same_size(path, map_HW, image_id)
        return map_HW

    def _same_size(self, path: Path, map_HW: Uint8, image_id: str) -> None:
        height, width = self.image_size(image_id)
        if map_HW.shape != (height, width):
            rows, columns = map_HW.shape
            raise DataError(
                path, f"{columns}x{rows} pixels but its image has {width}x{height}", "resize or replace one of the two"
            )

    # -- image-level labels

    def image_label(self, image_id: str, *, split: str | None = None) -> Float32:
        """Tags of an image, float32 (K,), 1 = present; `split` only matters to labels from masks."""
        if self.label_source == "cls_labels":
            path = self.root / "cls_labels.npy"
            if image_id not in self._label_file:
                raise DataError(path, f"no label for {image_id}", "add it, or set data.labels to xml or masks")
            return self._label_file[image_id].copy()
        names = self._xml_names(image_id) if self.label_source == "xml" else self._mask_names(image_id, split)
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
            raise DataError(path, f"not readable as XML ({error})", "download it again") from error
        # Only an object's own name: a person's parts (head, hand, foot) have names too.
        names = {(item.findtext("name") or "").strip() for item in tree.getroot().findall("object")}
        if unknown := sorted(names - set(self.class_names)):
            raise DataError(path, f"unknown class `{unknown[0]}`", f"known: {', '.join(self.class_names)}")
        return names

    def _mask_names(self, image_id: str, split: str | None) -> set[str]:
        values = np.unique(self.mask(image_id, split=split))
        return {self.class_names[int(v) - 1] for v in values if v not in (0, IGNORE)}

    def _pick_label_source(self, labels: str) -> str:
        present = {
            "cls_labels": (self.root / "cls_labels.npy").is_file(),
            "xml": (self.root / "Annotations").is_dir(),
            "masks": any((self.root / f"SegmentationClass{end}").is_dir() for end in ("", "Aug")),
        }
        if labels == "auto":
            found = next((source for source in LABEL_SOURCES if present[source]), None)
            if found is None:
                raise DataError(
                    self.root, "no image-level labels", "add cls_labels.npy, Annotations/ or SegmentationClass/"
                )
            return found
        if labels not in LABEL_SOURCES:
            raise ValueError(f"data.labels: `{labels}` is none of auto, {', '.join(LABEL_SOURCES)}")
        if not present[labels]:
            have = ", ".join(source for source in LABEL_SOURCES if present[source]) or "none"
            raise DataError(self.root, f"data.labels is `{labels}` but its files are missing", f"there is: {have}")
        return labels

    def _read_class_names(self) -> tuple[str, ...]:
        path = self.root / "classes.txt"
        if not path.is_file():
            return VOC_CLASSES
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not names or len(set(names)) < len(names) or len(names) >= IGNORE:
            raise DataError(
                path, f"{len(names)} names, {len(set(names))} different", "1..254 different names, one a line"
            )
        return tuple(names)


def _broken(path: Path, error: BaseException) -> DataError:
    return DataError(path, f"not readable as an image ({error})", "truncated or damaged: copy or download it again")


def _decode(path: Path, convert: Callable[[Image.Image], Any]) -> Uint8:
    try:
        with Image.open(path) as image:
            image.load()
            return np.array(convert(image), dtype=np.uint8)
    except DataError:
        raise
    except DECODE_ERRORS as error:
        raise _broken(path, error) from error


def _indices(image: Image.Image, path: Path) -> Image.Image:
    if image.mode not in ("P", "L"):
        raise DataError(path, f"a mask of mode {image.mode}", "store class indices: a palette or 8-bit grey PNG")
    return image
