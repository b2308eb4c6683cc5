"""The small text and label formats of the VOC family, and the error that names a file and its remedy."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppc.names import check_name

# All that a pickled array needs; both names of numpy's core module are in circulation.
_ARRAY_PARTS = frozenset(
    {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }
)
MAX_CLASSES = 254  # a mask has a byte a pixel: 0 is background, 255 is ignored
_PATH_LINE = re.compile(r"(?:^|/)([^/]+?)\.(?:jpe?g|png)(?=\s|$)", re.IGNORECASE)
_IMAGE_NAME = re.compile(r"(.+)\.(?:jpe?g|png)", re.IGNORECASE)


class DataError(ValueError):
    """Something in a data set that its owner can repair: `path`, `what` is wrong and the `remedy`.

    `of_image`: it concerns one image, which can be left out (`data.on_broken: skip`).
    """

    def __init__(self, path: str | Path, what: str, remedy: str, *, of_image: bool = False) -> None:
        super().__init__(str(path), what, remedy)
        self.path, self.what, self.remedy, self.of_image = str(path), what, remedy, of_image

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.remedy}"


SHOWN_ERRORS = 20


class TableError(DataError):
    """All that is wrong with a table, one thing a line; the first of them is its `path`, `what` and `remedy`."""

    def __init__(self, errors: Sequence[DataError]) -> None:
        first = errors[0]
        super().__init__(first.path, first.what, first.remedy)
        self.errors = tuple(errors)

    def __reduce__(self) -> tuple[Any, ...]:
        return TableError, (self.errors,)

    def __str__(self) -> str:
        if len(self.errors) == 1:
            return str(self.errors[0])
        more = len(self.errors) - SHOWN_ERRORS
        lines = [f"{len(self.errors)} errors:", *map(str, self.errors[:SHOWN_ERRORS])]
        return "\n  ".join(lines + ([f"and {more} more"] if more > 0 else []))


def check_classes(names: Sequence[str], place: str | Path) -> tuple[str, ...]:
    """The foreground classes; DataError unless they are 1 to 254 different names."""
    if not names or len(set(names)) < len(names) or len(names) > MAX_CLASSES:
        raise DataError(place, f"{len(names)} names, {len(set(names))} different", "1..254 different names, one a line")
    return tuple(names)


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names of a text file, one a line. Raises DataError as `check_classes`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(path, "not a UTF-8 text file", "write one class name a line") from error
    return check_classes([line.strip() for line in lines if line.strip()], path)


def read_list(path: Path) -> list[tuple[int, str]]:
    """The lines of a list that are not empty, with their numbers. Raises DataError for an empty list."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(path, "not a UTF-8 text file", "write one image id a line") from error
    if not (found := [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]):
        raise DataError(path, "the list is empty", "write one image id a line")
    return found


def parse_id(line: str, path: Path, number: int) -> str:
    """The image id of one line of a list: a bare id, or the first path's name (METHOD 1)."""
    line = line.strip()
    match = _IMAGE_NAME.fullmatch(line)
    image_id = match[1] if match else line
    if "/" in line:
        match = _PATH_LINE.search(line)
        if match is None:
            raise DataError(path, f"line {number} has no image id: `{line}`", "write a bare id or `/JPEGImages/ID.jpg`")
        image_id = match[1]
    try:
        return check_name(image_id, "image")
    except ValueError as error:
        raise DataError(path, f"line {number}: {error}", "rename the image's files and its line") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy array reconstruction and plain Python values alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _load_object(blob: bytes) -> Any:
    """The pickled object of a bare pickle or of an .npy file that holds one."""
    stream = io.BytesIO(blob)
    if not blob.startswith(b"\x93NUMPY"):
        return _ArrayUnpickler(stream, encoding="latin1").load()
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    _, _, dtype = header(stream)
    if not dtype.hasobject:
        raise pickle.UnpicklingError(f"it holds an array of {dtype}, not a dict")
    loaded = _ArrayUnpickler(stream, encoding="latin1").load()
    return loaded.item() if isinstance(loaded, np.ndarray) and loaded.ndim == 0 else loaded


def read_label_file(path: Path, num_classes: int) -> dict[str, NDArray[np.float32]]:
    """A pickled dict id -> float32 (K,) of zeros and ones. Raises DataError for anything else, code included."""
    remedy = "expected a pickled dict id -> array of 0 and 1, one per class; or set data.labels to xml or masks"
    try:
        loaded = _load_object(path.read_bytes())
    except pickle.UnpicklingError as error:
        raise DataError(path, f"refused: {error}", remedy) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(path, f"not readable ({type(error).__name__}: {error})", remedy) from error
    if not isinstance(loaded, dict) or not loaded:
        raise DataError(path, f"holds a {type(loaded).__name__} without labels", remedy)
    labels = {}
    for key, value in loaded.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf" or value.shape != (num_classes,):
            shape = getattr(value, "shape", type(value).__name__)
            raise DataError(path, f"label of {key} is {shape}, not {num_classes} numbers", remedy)
        if not np.isin(value, (0, 1)).all():
            raise DataError(path, f"label of {key} holds other values than 0 and 1", remedy)
        labels[str(key)] = value.astype(np.float32)
    return labels
