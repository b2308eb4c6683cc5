"""COCO's annotation files, read once a machine: an index on the local disk that workers share.

An `instances_*.json` has hundreds of megabytes and takes gigabytes of memory while it is parsed. The index beside
`places.HERE` has a table of the images, which a process keeps, and their annotations, of which it reads those it needs.
N images, K classes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppc.data.labels import DataError
from ppc.locks import locked
from ppc.names import check_name
from ppc.places import HERE

INDEX_VERSION = 2  # raise it when an index of the same file becomes another
AGAIN = "download COCO's annotations again, or correct the file"
Annotation = tuple[int, bool, float, Any]  # class 1..K, whether it is a crowd, area in pixels, polygons or RLE


@dataclass(frozen=True)
class Index:
    """What one annotation file says."""

    class_names: list[str]
    ids: list[str]  # (N,) file names without their suffix, in the file's order
    files: list[str]  # (N,)
    numbers: dict[int, int]  # COCO's number of an image -> its row
    rows: dict[str, int]  # image id -> its row
    size_N2: NDArray[np.int64]  # height, width
    tag_NK: NDArray[np.uint8]
    start_N: NDArray[np.int64]  # (N + 1,) where an image's annotations begin in `blob`
    blob: Path

    def packed(self, row: int) -> bytes:
        """An image's annotations as they are stored; equal bytes are equal annotations."""
        with self.blob.open("rb") as file:
            file.seek(int(self.start_N[row]))
            return file.read(int(self.start_N[row + 1] - self.start_N[row]))

    def annotations(self, row: int) -> list[Annotation]:
        """An image's annotations in the file's order."""
        return [tuple(one) for one in json.loads(zlib.decompress(self.packed(row)))]


def index_key(path: Path) -> str:
    """What tells an annotation file from others, and from what it was before it was changed."""
    found = path.stat()
    return sha256(f"{INDEX_VERSION} {path.resolve()} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()[:24]


@lru_cache(maxsize=8)
def open_index(path: Path, key: str) -> Index:
    """The index of an annotation file; made by the first process of a machine that asks. Raises DataError."""
    folder = HERE.expanduser() / "coco" / key
    if not (folder / "table.npz").is_file():
        try:
            with locked(folder.parent / f"{key}.lock"):
                if not (folder / "table.npz").is_file():
                    _write(path, folder)
        except OSError as error:
            raise DataError(
                folder, f"the index of {path} cannot be written ({error.strerror})", "set PPC_HERE to another folder"
            ) from error
    with np.load(folder / "table.npz") as table:
        ids, numbers = table["ids"].tolist(), table["numbers"].tolist()
        return Index(
            class_names=table["class_names"].tolist(),
            ids=ids,
            files=table["files"].tolist(),
            numbers={number: row for row, number in enumerate(numbers)},
            rows={image_id: row for row, image_id in enumerate(ids)},
            size_N2=table["size"],
            tag_NK=table["tags"],
            start_N=table["start"],
            blob=folder / "annotations.bin",
        )


def _write(path: Path, folder: Path) -> None:
    """Parse the file into a new folder, and rename that into its place."""
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        names, images, annotations = _parse(path)
        tag_NK = np.zeros((len(images), len(names)), np.uint8)
        start = [0]
        with (work / "annotations.bin").open("wb") as blob:
            for row, image in enumerate(images):
                mine = annotations.pop(image["id"], [])
                tag_NK[row, [one[0] - 1 for one in mine]] = 1
                start.append(start[-1] + blob.write(zlib.compress(json.dumps(mine).encode(), 3)))
        if annotations:
            what = f"has annotations of image {min(annotations)}, which is not among its images"
            raise DataError(path, what, AGAIN)
        with (work / "table.npz").open("wb") as file:
            np.savez(
                file,
                class_names=np.array(names),
                ids=np.array([Path(image["file_name"]).stem for image in images]),
                files=np.array([Path(image["file_name"]).name for image in images]),
                numbers=np.array([image["id"] for image in images], np.int64),
                size=np.array([(image["height"], image["width"]) for image in images], np.int64),
                tags=tag_NK,
                start=np.array(start, np.int64),
            )
        os.rename(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _parse(path: Path) -> tuple[list[str], list[dict[str, Any]], dict[int, list[Annotation]]]:
    """Class names in the order of their ids, the images, and the annotations by image."""
    try:
        with path.open(encoding="utf-8") as file:
            whole = json.load(file)
        categories = sorted(whole["categories"], key=lambda category: int(category["id"]))
        classes = {category["id"]: number for number, category in enumerate(categories, 1)}
        found: dict[int, list[Annotation]] = {}
        for one in whole["annotations"]:
            if one["category_id"] not in classes:
                what = (
                    f"annotation {one.get('id')} is of category {one['category_id']}, which is not among its categories"
                )
                raise DataError(path, what, AGAIN)
            kept = (classes[one["category_id"]], bool(one.get("iscrowd")), float(one["area"]), one["segmentation"])
            found.setdefault(one["image_id"], []).append(kept)
        images, firsts = whole["images"], dict[str, Any]()
        for image in images:
            image_id = check_name(Path(image["file_name"]).stem, "image")
            int(image["id"]), int(image["height"]), int(image["width"])
            if (first := firsts.setdefault(image_id, image)) is not image:
                what = f"images {first['id']} and {image['id']} are both named {image_id}, which is their id here"
                raise DataError(path, what, "give each a file name of its own, or keep one entry with all annotations")
        return [str(category["name"]) for category in categories], images, found
    except DataError:
        raise
    except KeyError as error:
        raise DataError(path, f"something has no field {error}", AGAIN) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(path, f"not a file of COCO's instances ({error})", AGAIN) from error
