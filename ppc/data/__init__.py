"""Data sets: the VOC layout, COCO, your own folder, generated scenes; their checks, transforms and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ppc.data.coco import CocoLayout
from ppc.data.dataset import Dataset
from ppc.data.folder import FolderLayout
from ppc.data.labels import DataError
from ppc.data.scenes import make_scenes
from ppc.data.voc import VocLayout

__all__ = ["DATASETS", "DataError", "Dataset", "VocLayout", "open_dataset"]


def open_voc(root: Path, labels: str, scenes: Mapping[str, int]) -> Dataset:
    """A folder in the VOC 2012 layout."""
    return VocLayout(root, labels=labels)


def open_coco(root: Path, labels: str, scenes: Mapping[str, int]) -> Dataset:
    """COCO 2014 as it is downloaded."""
    return CocoLayout(root, labels=labels)


def open_folder(root: Path, labels: str, scenes: Mapping[str, int]) -> Dataset:
    """A folder of images with a table of their tags."""
    return FolderLayout(root, labels=labels)


class SceneLayout(VocLayout):
    """The built-in generated data set. A process of another node that is sent it makes it there, if it has to."""

    def __init__(self, root: Path, labels: str, scenes: Mapping[str, int]) -> None:
        make_scenes(root, **scenes)
        self._scenes = dict(scenes)
        super().__init__(root, labels=labels)
        self._labels = labels

    def __reduce__(self) -> tuple[Any, ...]:
        return SceneLayout, (self.root, self._labels, self._scenes), {"left_out": self.left_out}


def open_scenes(root: Path, labels: str, scenes: Mapping[str, int]) -> Dataset:
    """The built-in generated data set, made on first use."""
    return SceneLayout(root, labels, scenes)


DATASETS: dict[str, Callable[[Path, str, Mapping[str, int]], Dataset]] = {
    "voc": open_voc,
    "coco": open_coco,
    "folder": open_folder,
    "scenes": open_scenes,
}


def open_dataset(
    name: str, root: str | Path, *, labels: str = "auto", scenes: Mapping[str, int] | None = None
) -> Dataset:
    """Open a data set of `DATASETS`; `scenes` holds the parameters of `make_scenes`. Raises ValueError."""
    if name not in DATASETS:
        raise ValueError(f"data.name: `{name}` is none of {', '.join(DATASETS)}")
    return DATASETS[name](Path(root), labels, scenes or {})
