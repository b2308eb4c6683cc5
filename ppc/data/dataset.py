"""What stages, checks and trials ask of a data set; a layout is a subclass that says where things are.

K foreground classes, 1 to 254; a mask holds 0 = background, 1..K = classes in the order of `class_names`, 255 = ignore.
"""

from __future__ import annotations

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ppc.data.labels import DataError, check_classes
from ppc.names import check_name
from ppc.places import file_sha256

IGNORE = 255
OR_SKIP = "or leave all such images out: data.on_broken=skip (ppc data check names them)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
OTHER_SUFFIXES = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".jpg", ".jpeg", ".png", ".npy")  # that are not looked for
TURNED = (5, 6, 7, 8)  # of EXIF's orientations those by which a viewer swaps the sides of an image
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

Uint8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


class Dataset(ABC):
    """Images with tags, and masks and saliency maps where there are any. Reading never writes into `root`.

    Every complaint is a `DataError` (a ValueError). An object is sent to workers, so what is large should not be kept
    in its attributes, or be left out of its pickled state.
    """

    every_tag_has_pixels = True  # whether `ppc data check` misses a tagged class in a mask

    def __init__(self, root: str | Path, *, class_names: Sequence[str], label_source: str) -> None:
        """`class_names`: the K foreground classes in the order of labels and masks; `label_source` names the tags."""
        self.root = Path(root)
        self.class_names = check_classes(class_names, self.root)
        self.label_source = label_source
        self.left_out: dict[str, tuple[str, ...]] = {}  # by split: ids that `leave_out` took off its list

    @property
    def num_classes(self) -> int:
        """K, the foreground classes."""
        return len(self.class_names)

    # -- what a layout says

    @abstractmethod
    def splits(self) -> list[str]:
        """Names of the splits."""

    @abstractmethod
    def listed(self, split: str) -> list[str]:
        """Image ids of a split in the order of its list. Raises DataError for a split that is not there or empty."""

    @abstractmethod
    def list_path(self, split: str) -> Path:
        """The file that says which images a split has."""

    @abstractmethod
    def image_path(self, image_id: str) -> Path:
        """The image's file. Raises DataError if there is none."""

    @abstractmethod
    def image_label(self, image_id: str, *, split: str | None = None) -> Float32:
        """Tags of an image, float32 (K,), 1 = present; `split` only matters to labels from masks."""

    # -- what a layout may say

    def mask_path(self, image_id: str, *, split: str | None = None) -> Path:
        """The file that holds the image's mask. Raises DataError if there is none."""
        raise DataError(self.root, "has no masks", "use seeds.protocol fixed")

    def saliency_path(self, image_id: str) -> Path:
        """The saliency map's file. Raises DataError if there is none."""
        raise DataError(self.root, "has no saliency maps", "use a method without saliency")

    @property
    def has_saliency(self) -> bool:
        """Whether the data set comes with saliency maps (a map of every image is not promised)."""
        return False

    @property
    def saliency_place(self) -> str:
        """Where saliency maps are looked for, for a message."""
        return f"{self.root}, which has no place for them"

    @property
    def classes_place(self) -> str:
        """Where the class names come from, for a message."""
        return f"the reader of {self.root}"

    def label_files(self) -> list[Path]:
        """Files beside the images' own that decide their tags; they need not exist."""
        return []

    def mask_digest(self, image_id: str, *, split: str | None = None) -> str:
        """sha256 of what the mask is made of. Raises DataError if there is no mask."""
        return file_sha256(self.mask_path(image_id, split=split))

    def own_digests(self, image_id: str) -> list[Callable[[], str]]:
        """sha256 of more files of an image that decide whether it can be used; each may raise DataError."""
        return []

    def problems(self) -> list[DataError]:
        """What `ppc data check` tells of files that no split lists."""
        return []

    # -- lists

    def ids(self, split: str) -> list[str]:
        """Image ids of a split in the list's order, but for those left out."""
        found = self.listed(split)
        absent = frozenset(self.left_out.get(split, ()))
        return [image_id for image_id in found if image_id not in absent] if absent else found

    def leave_out(self, split: str, image_ids: Iterable[str]) -> None:
        """Take images off a split's list, for this object and its copies. Raises DataError if none would be left."""
        self.left_out.pop(split, None)
        listed, chosen = self.ids(split), frozenset(image_ids)
        if chosen.issuperset(listed):
            what = f"all {len(listed)} images are broken"
            raise DataError(self.list_path(split), what, "name them with: ppc data check ROOT")
        if chosen:
            self.left_out[split] = tuple(image_id for image_id in dict.fromkeys(listed) if image_id in chosen)

    def has_mask(self, image_id: str, *, split: str | None = None) -> bool:
        """Whether an image has a mask."""
        try:
            self.mask_path(image_id, split=split)
        except DataError:
            return False
        return True

    def has_masks(self, split: str) -> bool:
        """Whether the split comes with masks to score against: its first image has one."""
        try:
            first = self.ids(split)[:1]
        except DataError:
            return False
        return bool(first) and self.has_mask(first[0], split=split)

    def find(self, folder: Path, image_id: str, suffixes: tuple[str, ...], remedy: str, *, of_image: bool) -> Path:
        """The first file of an image that exists in a folder; DataError with the remedy if there is none."""
        check_name(image_id, "image")
        for suffix in suffixes:
            path = folder / f"{image_id}{suffix}"
            if path.is_file():
                return path
        for suffix in (*map(str.upper, suffixes), *OTHER_SUFFIXES):
            if (folder / f"{image_id}{suffix}").is_file():
                what = f"missing, but there is {image_id}{suffix}"
                remedy = f"store it as {' or '.join(suffixes)}"
                raise DataError(folder / f"{image_id}{suffixes[0]}", what, remedy, of_image=of_image)
        raise DataError(folder / f"{image_id}{suffixes[0]}", "missing", remedy, of_image=of_image)

    # -- contents

    def image(self, image_id: str) -> Uint8:
        """RGB image, uint8 (H, W, 3). Raises DataError if missing or broken."""
        path = self.image_path(image_id)
        return decode(path, lambda image: _rgb(image, path))

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
        mask_HW = decode(path, lambda image: _indices(image, path))
        self.same_size(path, mask_HW.shape, image_id, of_image=True)
        present = np.flatnonzero(np.bincount(mask_HW.reshape(-1), minlength=256))
        unknown = [int(v) for v in present if self.num_classes < v < IGNORE]
        if unknown:
            raise DataError(
                path,
                f"unknown class {unknown[0]} (there are {self.num_classes} classes)",
                f"masks hold 0..{self.num_classes} and 255; the classes are those of {self.classes_place}",
                of_image=True,
            )
        return mask_HW

    def mask_label(self, image_id: str, split: str | None) -> Float32:
        """Tags from the mask, float32 (K,)."""
        return np.isin(np.arange(1, self.num_classes + 1), self.mask(image_id, split=split)).astype(np.float32)

    def saliency(self, image_id: str) -> Uint8:
        """Saliency map, uint8 (H, W), the mean of its colour channels (METHOD 1.1)."""
        path = self.saliency_path(image_id)
        map_HW = decode(path, lambda image: image if image.mode == "L" else image.convert("RGB"), of_image=False)
        if map_HW.ndim == 3:
            map_HW = np.rint(map_HW.mean(2)).astype(np.uint8)
        self.same_size(path, map_HW.shape, image_id, of_image=False)
        return map_HW

    def same_size(self, path: Path, shape: tuple[int, ...], image_id: str, *, of_image: bool) -> None:
        """DataError naming both files when a map (rows, columns) has not its image's size."""
        height, width = self.image_size(image_id)
        if shape != (height, width):
            image = self.image_path(image_id)
            remedy = f"resize or replace one of the two (the image: {image})"
            if shape == (width, height) and _is_turned(image):
                remedy = f"its image is turned by an EXIF tag alone, which is not read: store {image} turned"
            raise DataError(
                path, f"{shape[1]}x{shape[0]} pixels but its image has {width}x{height}", remedy, of_image=of_image
            )


def decode(path: Path, convert: Callable[[Image.Image], Any], *, of_image: bool = True) -> Uint8:
    """The converted pixels of an image file. Raises DataError if it is broken."""
    try:
        with Image.open(path) as image:
            image.load()
            return np.array(convert(image), dtype=np.uint8)
    except DataError:
        raise
    except DECODE_ERRORS as error:
        raise _broken(path, error, of_image=of_image) from error


def _is_turned(path: Path) -> bool:
    with suppress(*DECODE_ERRORS), Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation) in TURNED
    return False


def _broken(path: Path, error: BaseException, *, of_image: bool = True) -> DataError:
    if isinstance(error, OSError) and error.errno is not None:  # the disk, not the image, which may be whole
        return DataError(path, f"cannot be read ({error.strerror})", "look at the disk, the mount or the rights there")
    remedy = "truncated or damaged: copy or download it again"
    if isinstance(error, Image.DecompressionBombError):
        remedy = "store it smaller"
    return DataError(path, f"not readable as an image ({error})", remedy, of_image=of_image)


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        what = f"has more than 8 bits a pixel (mode {image.mode}), which would be cut off"
        raise DataError(path, what, "store it as 8-bit grey or RGB", of_image=True)
    return image.convert("RGB")


def _indices(image: Image.Image, path: Path) -> Image.Image:
    if image.mode not in ("P", "L"):
        remedy = "store class indices: a palette or 8-bit grey PNG"
        raise DataError(path, f"a mask of mode {image.mode}", remedy, of_image=True)
    return image
