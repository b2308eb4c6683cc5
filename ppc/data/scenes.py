"""The built-in GENERATED data set `scenes`, written in the VOC layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ppc.data.labels import DataError
from ppc.data.scene_draw import MAX_CLASSES, draw_scene
from ppc.figures import VOC_PALETTE
from ppc.seeding import derive_seed

GENERATOR_VERSION = 1  # raise it when a pixel of any scene changes
NOTE = "GENERATED images, made by ppc's built-in generator `scenes`; no photograph is among them."
# Invented words: the things drawn are nothing.
CLASS_NAMES = ("arbo", "birl", "corv", "dask", "emmo", "fint", "gorl", "hesp", "ixel", "jund", "kalo", "lume")
FOLDERS = ("JPEGImages", "SegmentationClass", "SALImages", "ImageSets/Segmentation")


def make_scenes(root: str | Path, *, num_classes: int, num_train: int, num_val: int, image_px: int, seed: int) -> Path:
    """Write the data set under `root`, or leave it alone if it is there; returns `root`.

    An image depends on (seed, split, its index, num_classes, image_px) alone. Raises ValueError for parameters out of
    range, for a folder made with others, and for a folder that is something else.
    """
    root = Path(root)
    if not 1 <= num_classes <= MAX_CLASSES:
        raise ValueError(f"data.scenes.num_classes: {num_classes} is not in 1..{MAX_CLASSES}")
    if num_train < 1 or num_val < 0 or image_px < 32:
        raise ValueError("data.scenes: num_train must be at least 1, num_val 0 or more and image_px at least 32")
    wanted: dict[str, str | int] = {
        "generated_by": "ppc scenes", "version": GENERATOR_VERSION, "num_classes": num_classes,
        "num_train": num_train, "num_val": num_val, "image_px": image_px, "seed": seed,
    }  # fmt: skip
    if _is_complete(root, wanted):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the rename is atomic; mkdtemp makes it private, the data set need not be.
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}.making-", dir=root.parent))
    try:
        work.chmod(0o755)
        _write(work, wanted)
        _move_into_place(work, root, wanted)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root


def scene_ids(split: str, count: int) -> list[str]:
    """Ids of the first `count` images of a split."""
    return [f"{split}_{index:05d}" for index in range(count)]


def _is_complete(root: Path, wanted: dict[str, str | int]) -> bool:
    """Whether the wanted data set is there whole. Raises DataError if `root` holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    readme, parameters = root / "README.txt", root / "dataset.json"
    if not (readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith(NOTE)):
        raise DataError(root, "is not a folder made by the generator", "give data.root a new folder, or empty this one")
    try:
        found = json.loads(parameters.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # half-written: made anew
    if found != wanted:
        other = [
            f"{key} {found.get(key)} instead of {value}" for key, value in wanted.items() if found.get(key) != value
        ]
        raise DataError(
            parameters, f"made with {', '.join(other)}", "give data.root another folder, or delete this one"
        )
    return all(path.is_file() and path.stat().st_size for path in _files(root, wanted))


def _files(root: Path, wanted: dict[str, str | int]) -> list[Path]:
    files = [root / "cls_labels.npy", root / "classes.txt"]
    for split in ("train", "val"):
        count = int(wanted[f"num_{split}"])
        files += [root / f"ImageSets/Segmentation/{split}.txt"] if count else []
        for image_id in scene_ids(split, count):
            files.append(root / "JPEGImages" / f"{image_id}.jpg")
            files.append(root / "SegmentationClass" / f"{image_id}.png")
            files.append(root / "SALImages" / f"{image_id}.png")
    return files


def _move_into_place(work: Path, root: Path, wanted: dict[str, str | int]) -> None:
    trash = work.with_name(work.name + ".old")
    try:
        if root.exists() and any(root.iterdir()):
            root.rename(trash)  # a half-written one
        os.rename(work, root)
    except OSError:
        if not _is_complete(root, wanted):  # another process may have been faster
            raise
    finally:
        shutil.rmtree(trash, ignore_errors=True)


def _write(root: Path, wanted: dict[str, str | int]) -> None:
    num_classes = int(wanted["num_classes"])
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    (root / "README.txt").write_text(f"{NOTE}\nTheir parameters are in dataset.json.\n", encoding="utf-8")
    (root / "classes.txt").write_text("\n".join(CLASS_NAMES[:num_classes]) + "\n", encoding="utf-8")
    labels: dict[str, NDArray[np.float32]] = {}
    for split in ("train", "val"):
        ids = scene_ids(split, int(wanted[f"num_{split}"]))
        for index, image_id in enumerate(ids):
            rng = np.random.default_rng(derive_seed("scene", int(wanted["seed"]), split, index))
            labels[image_id] = _write_scene(root, image_id, rng, index, num_classes, int(wanted["image_px"]))
        if ids:
            (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    np.save(root / "cls_labels.npy", np.array(labels, dtype=object))
    (root / "dataset.json").write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")


def _write_scene(
    root: Path, image_id: str, rng: np.random.Generator, index: int, num_classes: int, image_px: int
) -> NDArray[np.float32]:
    # The first class goes round, so that every class is about equally frequent in any prefix of the list.
    scene = draw_scene(rng, num_classes=num_classes, image_px=image_px, first_class=index % num_classes)
    Image.fromarray(scene.image_HW3).save(root / f"JPEGImages/{image_id}.jpg", quality=95, subsampling=0)
    mask = Image.fromarray(scene.mask_HW)
    mask.putpalette(VOC_PALETTE.tobytes())
    mask.save(root / f"SegmentationClass/{image_id}.png")
    Image.fromarray(scene.saliency_HW).save(root / f"SALImages/{image_id}.png")
    return np.isin(np.arange(1, num_classes + 1), scene.mask_HW).astype(np.float32)
