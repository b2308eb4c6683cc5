"""The Python API: a study's trials as a table, and the files that its stages made.

    import ppc

    study = ppc.load_study("scenes_k")
    study.trials                                     # pandas: a row a trial
    study.cam("prototype_top_k=4", 0, "scene_0007")  # keys and maps
    study.report()                                   # shown as a table by a notebook

Everything is read from the storage's files when it is asked for, so a study may still run. What `__all__` names stays
as it is from version to version; all other modules may change. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ppc.artifacts import Storage, read_journal
from ppc.costs import trial_cost
from ppc.ledger import TrialRow, read_rows, stage_dirs
from ppc.names import check_name
from ppc.places import StoragePath, names_in

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

__all__ = ["Cam", "MarkdownText", "Study", "load_study", "study_names"]

DEFAULT_STORAGE = "ppc-storage"


class Cam(NamedTuple):
    """The CAM of an image, for the classes that its tags name."""

    keys: npt.NDArray[np.int64]  # (K) indices of foreground classes: class k is label k + 1 of a mask
    cam_KHW: npt.NDArray[np.float32]  # noqa: N815  (shape suffix)


class MarkdownText(str):
    """Markdown that a notebook shows as such."""

    def _repr_markdown_(self) -> str:
        return str(self)


class Study:
    """A study on storage, as its files say at each call. Made by `load_study`."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self.name = storage, name
        self._definition()

    def _definition(self) -> dict[str, Any]:
        return self._storage.study(self.name).definition()

    def __repr__(self) -> str:
        return f"<ppc study {self.name} in {self._storage.root}>"

    @property
    def metric(self) -> str:
        """Name of the metric that decides; IoU is in [0, 1]."""
        return str(self._definition()["metric"])

    @property
    def baseline(self) -> str:
        """The variant that others are compared with."""
        return str(self._definition()["baseline"])

    @property
    def generated(self) -> bool:
        """Whether the study is, in part or whole, on generated data: say so beside every figure."""
        return any(data.get("generated") for data in self._definition()["data"])

    @property
    def trials(self) -> pd.DataFrame:
        """A row a trial, in the order of the report; what is not known yet is missing (NaN or None).

        `variant`, `seed`, `state`; the factors by their dotted names; the final metrics; `gpu_h` and `cpu_h` of its own
        stages, `wall_s` of all; `reused` (finished by another study), `same_as`, `protocol` of the background score,
        `generated`, `stage`, `error`; `key` and `stage_keys`, under which its files lie. ImportError without pandas.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "trials are a table of pandas, which is not installed: pip install -e '.[api]'"
            ) from error

        rows = read_rows(self._storage, self._definition())
        generated = self.generated
        metrics = dict.fromkeys(name for row in rows for name in (row.result or {}).get("metrics", {}))
        return pd.DataFrame([self._line(row, metrics, generated) for row in rows])

    def _line(self, row: TrialRow, metrics: dict[str, None], generated: bool) -> dict[str, Any]:
        result = row.result or {}
        started = row.result is not None or row.attempt > 0
        cpu_h, gpu_h = trial_cost(self._storage, row) if started else (0.0, 0.0)
        return {
            "variant": row.variant, "seed": row.seed, "state": row.state, **row.factors,
            **{name: row.metric(name) for name in metrics},
            "gpu_h": gpu_h, "cpu_h": cpu_h, "wall_s": result.get("wall_s"), "reused": row.reused,
            "same_as": row.same_as, "protocol": result.get("protocol"), "generated": generated, "stage": row.stage,
            "error": row.error and row.error.get("message"), "key": row.key,
            "stage_keys": {stage["name"]: stage["key"] for stage in row.stages},
        }  # fmt: skip

    def _row(self, variant: str, seed: int) -> TrialRow:
        rows = read_rows(self._storage, self._definition())
        for row in rows:
            if (row.variant, row.seed) == (variant, seed):
                return row
        have = "; ".join(row.label for row in rows)
        raise ValueError(f"study {self.name} has no trial of variant {variant!r}, seed {seed}; its trials: {have}")

    def _folder(self, row: TrialRow, stage: str) -> StoragePath:
        folders = {folder.stage: folder.path for folder in stage_dirs(self._storage, row)}
        if stage not in folders:
            raise ValueError(f"trial {row.label} has no stage {stage!r}; its stages: {', '.join(folders)}")
        return folders[stage]

    def stage_files(self, variant: str, seed: int, stage: str) -> dict[str, StoragePath]:
        """The files of a stage, by their names within its folder (`cams/ID.npz`); none when it has not begun.

        `manifest.json` is among them when the stage is done, and then they change no more. On s3:// the paths are of
        universal-pathlib. ValueError for a trial or stage that is not there.
        """
        return dict(_walk(self._folder(self._row(variant, seed), stage), ""))

    def history(self, variant: str, seed: int, stage: str = "train_cam") -> pd.DataFrame:
        """Losses and rates of a training stage by step; empty when it has written none."""
        import pandas as pd

        folder = self._folder(self._row(variant, seed), stage)
        points, _ = read_journal(folder / "journal.jsonl")
        index = pd.Index([point["step"] for point in points], name="step")
        return pd.DataFrame([point["m"] for point in points], index=index)

    def class_names(self, variant: str, seed: int) -> list[str]:
        """What labels 0, 1, ... of a finished trial's masks mean. ValueError when it has no result."""
        row = self._row(variant, seed)
        if row.result is None:
            raise ValueError(f"trial {row.label} is {row.state.lower()}: its classes are in its result")
        return list(row.result.get("class_names", []))

    def cam(self, variant: str, seed: int, image: str) -> Cam:
        """The CAM of an image. ValueError when the trial has none of it."""
        from ppc.stages.make_seeds import read_cam

        row = self._row(variant, seed)
        path = self._folder(row, "make_seeds") / "cams" / f"{check_name(image, 'image')}.npz"
        if (loaded := read_cam(path)) is None:
            raise ValueError(f"trial {row.label} ({row.state.lower()}) has no whole CAM of image {image}: {path}")
        return Cam(*loaded)

    def mask(self, variant: str, seed: int, image: str, product: str | None = None) -> npt.NDArray[np.uint8]:
        """A label map of an image, (H, W): `seed`, `mask`, `psa_mask`, `irn_mask` or `seg`; by default the last that
        the trial makes. ValueError when there is none."""
        from ppc.figures import read_palette_png
        from ppc.stages.products import PRODUCTS, products_of

        row = self._row(variant, seed)
        made = products_of([stage["name"] for stage in row.stages])
        if not made or product not in (None, *made):
            raise ValueError(f"product {product}: trial {row.label} makes {', '.join(made) or 'no label maps'}")
        stage, name = PRODUCTS[product or made[-1]]
        path = self._folder(row, stage) / name / f"{check_name(image, 'image')}.png"
        try:
            return read_palette_png(path)
        except FileNotFoundError:
            text = f"trial {row.label} ({row.state.lower()}) has no {product or made[-1]} of image {image}: {path}"
            raise ValueError(text) from None

    def report(self) -> MarkdownText:
        """The study's table as `ppc report` writes it, in Markdown."""
        from ppc.report import build_report, markdown

        return MarkdownText(markdown(build_report(self._storage, self.name)))


def _walk(folder: StoragePath, before: str) -> list[tuple[str, StoragePath]]:
    """Files below a folder, sorted; locks and half-written files, whose names begin with a dot, are left out."""
    found = []
    for name in names_in(folder):
        if name.startswith("."):
            continue
        path = folder / name
        found += _walk(path, f"{before}{name}/") if path.is_dir() else [(f"{before}{name}", path)]
    return found


def _storage(place: str | Path | None) -> Storage:
    return Storage.at(place or os.environ.get("PPC_STORAGE") or DEFAULT_STORAGE)


def load_study(name: str, storage: str | Path | None = None) -> Study:
    """The study of that name; ValueError lists those that there are.

    `storage`: folder or s3://bucket/prefix; by default `PPC_STORAGE`, else `ppc-storage` in the working directory.
    """
    return Study(_storage(storage), name)


def study_names(storage: str | Path | None = None) -> list[str]:
    """Names of the studies of a storage, sorted."""
    return _storage(storage).study_names()
