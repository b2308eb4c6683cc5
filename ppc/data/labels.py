"""The small text and label formats of the VOC family, and the error that names a file and its remedy."""

from __future__ import annotations

import io
import pickle
import re
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
_PATH_LINE = re.compile(r"(?:^|/)([^/]+?)\.(?:jpe?g|png)(?=\s|$)", re.IGNORECASE)
_IMAGE_NAME = re.compile(r"(.+)\.(?:jpe?g|png)", re.IGNORECASE)


class DataError(ValueError):
    """Something in a data set that its owner can repair: `path`, `what` is wrong and the `remedy`."""

    def __init__(self, path: str | Path, what: str, remedy: str) -> None:
        super().__init__(str(path), what, remedy)
        self.path, self.what, self.remedy = str(path), what, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; {self.remedy}"


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
