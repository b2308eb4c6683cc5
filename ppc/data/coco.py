"""COCO 2014 as it is downloaded: images, `instances_*.json`, and masks drawn from it or read from PNGs.

K classes in the order of COCO's category ids, 80 of them 1..80; a mask holds 0 = background, 255 = ignore.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ppc.data.coco_index import Annotation, Index, index_key, open_index
from ppc.data.dataset import IGNORE, Dataset, Float32, Uint8
from ppc.data.labels import DataError, parse_id, read_list
from ppc.names import check_name

PARTS = {"train": "train2014", "val": "val2014"}  # split -> COCO's own name
LISTS = ("ImageSets", "ImageSets/Segmentation")
MASKS, SALIENCY = "SegmentationClass", "SALImages"
LABEL_SOURCES = ("annotations", "masks")


class CocoLayout(Dataset):
    """COCO 2014: splits `train` and `val` are the images that have an annotation, as in the field.

    `train2014` and `val2014` are all images; a list `NAME.txt` in ImageSets is a split of that name. Tags are the
    classes of all annotations, crowds among them. Masks are drawn from the annotations, unless a folder
    SegmentationClass has PNGs: crowds are 255, and where objects overlap the smaller is above the larger.
    """

    every_tag_has_pixels = False  # a crowd has none, nor has what lies below others

    def __init__(self, root: str | Path, *, labels: str = "auto") -> None:
        """Open `root`; `labels` is auto (the annotations) or masks. Raises DataError if it is no such folder."""
        root = Path(root)
        self._files: dict[str, tuple[Path, str]] = {}  # by part: the annotations, and the key of their index
        for part in PARTS.values():
            path = root / "annotations" / f"instances_{part}.json"
            if path.is_file():
                self._files[part] = (path, index_key(path))
        if not self._files:
            what = "has no annotations/instances_train2014.json or instances_val2014.json"
            raise DataError(root, what, "data.root must be the folder with train2014/, val2014/ and annotations/")
        if labels not in ("auto", *LABEL_SOURCES[1:]):
            raise ValueError(f"data.labels: `{labels}`, but COCO has auto (the annotations) and masks")
        names = {part: self._index(part).class_names for part in self._files}
        if len({tuple(found) for found in names.values()}) > 1:
            (one, first), (other, second) = names.items()
            odd = sorted(set(first) ^ set(second))
            what = f"its {len(first)} classes are not the {len(second)} of {self._files[other][0].name}"
            told = f"in one alone: {', '.join(odd)}" if odd else "their ids differ"
            raise DataError(self._files[one][0], what, f"both need the same categories ({told})")
        source = LABEL_SOURCES[0] if labels == "auto" else labels
        super().__init__(root, class_names=next(iter(names.values())), label_source=source)
        self._has_pngs = (root / MASKS).is_dir()

    # -- lists

    def splits(self) -> list[str]:
        """`train`, `val`, and the lists in ImageSets."""
        lists = [path.stem for folder in LISTS for path in (self.root / folder).glob("*.txt")]
        own = [name for split, part in PARTS.items() if part in self._files for name in (split, part)]
        return sorted({*lists, *own})

    def list_path(self, split: str) -> Path:
        """The split's list in ImageSets, else the annotation file."""
        check_name(split, "split")
        for folder in LISTS:
            if (path := self.root / folder / f"{split}.txt").is_file():
                return path
        return self.root / "annotations" / f"instances_{PARTS.get(split, split)}.json"

    def listed(self, split: str) -> list[str]:
        """Image ids; a list may have file names, ids, or COCO's numbers."""
        path = self.list_path(split)
        if path.suffix == ".txt":
            return [self._resolve(parse_id(line, path, n)) for n, line in read_list(path)]
        part = PARTS.get(split, split)
        if part not in self._files:
            raise DataError(path, f"no split `{split}`", f"this data set has: {', '.join(self.splits())}")
        index = self._index(part)
        tagged_N = (index.tag_NK.sum(axis=1) > 0).tolist()
        found = [one for one, tagged in zip(index.ids, tagged_N, strict=True) if tagged or split == part]
        if not found:
            raise DataError(path, "it has no image with an annotation", "use another split")
        return found

    def _resolve(self, image_id: str) -> str:
        """The id of an image that a list may name by its number."""
        if re.fullmatch(r"\d{1,18}", image_id) and not any(image_id in self._index(part).rows for part in self._files):
            for part in self._files:
                index = self._index(part)
                if (row := index.numbers.get(int(image_id))) is not None:
                    return index.ids[row]
        return image_id

    def _index(self, part: str) -> Index:
        return open_index(*self._files[part])

    def _find(self, image_id: str) -> tuple[str, Index, int]:
        """The part, its index, and the row of an image."""
        for part in self._files:
            index = self._index(part)
            if (row := index.rows.get(image_id)) is not None:
                return part, index, row
        places = " and ".join(path.name for path, _ in self._files.values())
        what = f"no image `{image_id}` in {places}"
        raise DataError(self.root / "annotations", what, "take it off the list", of_image=True)

    # -- files

    def image_path(self, image_id: str) -> Path:
        """The image's file, in `train2014/` or `images/train2014/`. Raises DataError if there is none."""
        part, index, row = self._find(image_id)
        places = [self.root / folder / part / index.files[row] for folder in (".", "images")]
        if (found := next((path for path in places if path.is_file()), None)) is None:
            raise DataError(places[0], "missing", "unpack COCO's images there", of_image=True)
        return found

    def mask_path(self, image_id: str, *, split: str | None = None) -> Path:
        """The mask's PNG where the root has a folder of them, else the annotation file."""
        part, _, _ = self._find(image_id)
        if not self._has_pngs:
            return self._files[part][0]
        remedy = f"put it there, or remove {MASKS}: masks are drawn from the annotations then"
        return self._beside(MASKS, part, image_id, (".png",), remedy, of_image=True)

    def saliency_path(self, image_id: str) -> Path:
        """The saliency map's file. Raises DataError if there is none."""
        remedy = "a method with saliency needs one map an image"
        return self._beside(SALIENCY, self._find(image_id)[0], image_id, (".png", ".jpg"), remedy, of_image=False)

    def _beside(
        self, folder: str, part: str, image_id: str, suffixes: tuple[str, ...], remedy: str, *, of_image: bool
    ) -> Path:
        """A file of an image in `folder/train2014/` or in `folder/`."""
        inner = self.root / folder / part
        place = inner if inner.is_dir() else self.root / folder
        return self.find(place, image_id, suffixes, remedy, of_image=of_image)

    @property
    def has_saliency(self) -> bool:
        """Whether the root has a folder of saliency maps (a map of every image is not promised)."""
        return (self.root / SALIENCY).is_dir()

    @property
    def saliency_place(self) -> str:
        """Where saliency maps are looked for."""
        return f"a folder {SALIENCY} in {self.root}"

    @property
    def classes_place(self) -> str:
        """Where the class names come from."""
        return f"{next(iter(self._files.values()))[0]}, in the order of their ids"

    def has_mask(self, image_id: str, *, split: str | None = None) -> bool:
        """Whether an image has a mask. Raises DataError where it is to be drawn and pycocotools is absent."""
        if not self._has_pngs:
            _need_pycocotools(self.root)
        return super().has_mask(image_id, split=split)

    def mask_digest(self, image_id: str, *, split: str | None = None) -> str:
        """sha256 of the mask's PNG, or of what it is drawn from."""
        if self._has_pngs:
            return super().mask_digest(image_id, split=split)
        _, index, row = self._find(image_id)
        return sha256(index.packed(row)).hexdigest()

    # -- contents

    def mask(self, image_id: str, *, split: str | None = None) -> Uint8:
        """Label map, uint8 (H, W). Raises DataError for a bad PNG, a bad annotation, or an image of another size."""
        if self._has_pngs:
            return super().mask(image_id, split=split)
        part, index, row = self._find(image_id)
        path, (height, width) = self._files[part][0], index.size_N2[row].tolist()
        self.same_size(path, (height, width), image_id, of_image=True)
        _need_pycocotools(self.root)
        try:
            return draw_mask(index.annotations(row), height, width)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            what = f"an annotation of {image_id} cannot be drawn ({error})"
            raise DataError(path, what, "correct it or take the image off the list", of_image=True) from error

    def image_label(self, image_id: str, *, split: str | None = None) -> Float32:
        """Tags of an image, float32 (K,), 1 = present."""
        if self.label_source == "masks":
            return self.mask_label(image_id, split)
        _, index, row = self._find(image_id)
        label_K: Float32 = index.tag_NK[row].astype(np.float32)
        return label_K


def _need_pycocotools(root: Path) -> None:
    if find_spec("pycocotools") is None:
        what = "its masks are drawn with pycocotools, which is not installed"
        raise DataError(root, what, f"pip install -e '.[coco]', or put PNGs into {root / MASKS}")


def draw_mask(annotations: Sequence[Annotation], height: int, width: int) -> Uint8:
    """The label map (H, W) of polygons and RLEs: crowds as 255, then objects, the larger first.

    COCO does not say what is in front; a small object is mostly seen before a large one. ValueError for a bad one.
    """
    mask_HW = np.zeros((height, width), np.uint8)
    for number, is_crowd, _, segmentation in sorted(annotations, key=lambda one: (not one[1], -one[2])):
        if (inside_HW := _rasterised(segmentation, height, width)) is not None:
            mask_HW[inside_HW] = IGNORE if is_crowd else number
    return mask_HW


def _rasterised(segmentation: Any, height: int, width: int) -> Any:
    """Pixels of one annotation, bool (H, W); None where it has no polygon with an inside."""
    from pycocotools import mask as rle

    if isinstance(segmentation, list):
        polygons = [one for one in segmentation if len(one) >= 6]  # three corners
        if any(len(one) % 2 for one in polygons):
            raise ValueError("a polygon with an odd number of coordinates")
        if not polygons:
            return None
        packed = rle.merge(rle.frPyObjects(polygons, height, width))
    else:
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"an RLE of {segmentation['size']} in an image of [{height}, {width}]")
        counts = segmentation["counts"]
        packed = segmentation if isinstance(counts, str) else rle.frPyObjects(segmentation, height, width)
    return rle.decode(packed).astype(bool)
