"""Every name on storage, and the rules by which files there can be trusted.

One root holds everything of a project. A file that decides something (`manifest.json`, `result.json`, `state.json`,
`study.json`) is written by `atomic_write`, so it is there whole or not at all. A stage's manifest is
written last: a stage without one is not done, whatever else lies in its folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ppc.locks import LockedError, locked
from ppc.names import check_name
from ppc.places import (
    StoragePath,
    atomic_write,
    local_folder,
    names_in,
    open_appender,
    pause_s,
    read_bytes,
    read_from,
    remove,
    remove_tree,
    size_of,
    storage_path,
)

KEY_LENGTH = 20  # hex digits of a sha256: 80 bits


def now_ms() -> int:
    """Unix time, milliseconds."""
    return int(time.time() * 1000)


def content_key(value: Any) -> str:
    """Key of plain data: equal for equal values, whatever the order of mappings."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def write_json(path: StoragePath, value: Any, *, durable: bool = True) -> None:
    """Write plain data atomically; NaN and infinity are refused (ValueError)."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic_write(path, "w", durable=durable) as handle:
        handle.write(text + "\n")


def read_json(path: StoragePath) -> Any | None:
    """Plain data of a file, or None when the file is missing, empty or truncated."""
    try:
        return json.loads(read_bytes(path))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


class Journal:
    """Metric points of a stage, one JSON line each; safe to read while it is written.

    A point is {"t": unix ms, "step": int, "m": {name: value}}. After a restart the steps that are already there are
    not written again, so a point keeps its first time and can be sent any number of times. `damaged` counts the lines
    that are no points: they are passed over, by readers too.
    """

    def __init__(self, path: StoragePath) -> None:
        self.path = path
        whole = _whole_lines(read_from(path, 0))  # without a torn last line of a killed writer
        points = _points(whole)
        self.damaged = whole.count(b"\n") - len(points)
        self.last_step = max((point["step"] for point in points), default=-1)
        self._file = open_appender(path, whole)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one point unless its step is already there. A value that is not finite is a ValueError.

        OSError when the point could not be written whole; nothing of it is left in the file.
        """
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(
                f"step {step}: {', '.join(bad)} is not finite; lower train.learning_rate or raise the temperature"
            )
        if step <= self.last_step:
            return
        point = {"t": now_ms(), "step": step, "m": dict(metrics)}
        self._file.append((json.dumps(point, separators=(",", ":")) + "\n").encode())
        self.last_step = step

    def flush(self) -> None:
        """Return when all points can be read by others: what a checkpoint counts on must be there before it."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _points(data: bytes) -> list[dict[str, Any]]:
    """The lines that are points. Others are of a disk that was full or of a power cut, and must not stop a resume."""
    points = []
    for line in data.split(b"\n"):
        with suppress(ValueError):
            point = json.loads(line)
            if isinstance(point, dict) and {"t", "step", "m"} <= point.keys():
                points.append(point)
    return points


def read_journal(path: StoragePath, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Points of a journal from a byte offset, and the offset to go on from. A torn last line is left for later.

    ValueError for an offset in the middle of a line: the journal is not the one that was read before.
    """
    data = read_from(path, max(0, offset - 1))
    if offset and data:
        if data[:1] != b"\n":
            raise ValueError(f"{path}: byte {offset} is in the middle of a line; read it from the start")
        data = data[1:]
    data = _whole_lines(data)
    return _points(data), offset + len(data)


class Progress:
    """How far a stage has come, in `progress.json`; written at most twice a second, less often to an object store.

    `spent_s` is the time at work from the making of this object, on top of that of earlier attempts. So are `cpu_s`
    and `gpu_s`, what that work took: either `cpus` and `gpus` are held all the time, or `used` tells the seconds of
    both so far.
    """

    def __init__(
        self,
        path: StoragePath,
        *,
        total: int,
        unit: str,
        cpus: float = 0.0,
        gpus: float = 0.0,
        used: Callable[[], tuple[float, float]] | None = None,
    ) -> None:
        self.path, self.total, self.unit = path, total, unit
        self._before_s, self._before_used = spent_s(path) or 0.0, used_s(path)
        self._started = time.monotonic()
        self._held, self._used = (cpus, gpus), used
        self._used_first = used() if used else (0.0, 0.0)
        self._first: int | None = None
        self._written = 0.0

    def update(self, done: int, **extra: Any) -> None:
        """Say that `done` of `total` units are ready. A disk that is full does not end the work."""
        if self._first is None:
            self._first = done
        if done < self.total and time.monotonic() - self._written < pause_s(self.path):
            return
        self._written = time.monotonic()
        now_s = time.monotonic() - self._started
        rate = (done - self._first) / now_s if now_s > 0 else 0.0
        left_s = (self.total - done) / rate if rate > 0 else None
        value = {
            "done": done, "total": self.total, "unit": self.unit, "left_s": left_s, "t": now_ms(),
            "spent_s": self._before_s + now_s, **self._cost(now_s), **extra,
        }  # fmt: skip
        with suppress(OSError):
            write_json(self.path, value, durable=False)

    def _cost(self, now_s: float) -> dict[str, float]:
        if self._used is None:
            new = [now_s * held for held in self._held]
        else:
            new = [now - first for now, first in zip(self._used(), self._used_first, strict=True)]
        return {"cpu_s": self._before_used[0] + new[0], "gpu_s": self._before_used[1] + new[1]}


def used_s(path: StoragePath) -> tuple[float, float]:
    """CPU and GPU seconds of a `progress.json`, over all attempts; zeros when they are not there."""
    progress = read_json(path)
    values = progress if isinstance(progress, dict) else {}
    return float(values.get("cpu_s") or 0.0), float(values.get("gpu_s") or 0.0)


def spent_s(path: StoragePath) -> float | None:
    """Seconds at work, over all attempts, of a `progress.json`; None when it is not there."""
    progress = read_json(path)
    return progress.get("spent_s") if isinstance(progress, dict) else None


@dataclass(frozen=True)
class StageDir:
    """The folder of one stage result, shared by all trials whose stage key is the same."""

    path: StoragePath
    stage: str
    key: str

    def __truediv__(self, name: str) -> StoragePath:
        return self.path / name

    def manifest(self) -> dict[str, Any] | None:
        """The manifest when the stage is done, else None."""
        manifest = read_json(self.path / "manifest.json")
        done = isinstance(manifest, dict) and manifest.get("key") == self.key and "result" in manifest
        return manifest if done else None

    def finish(
        self,
        result: Mapping[str, Any],
        *,
        wall_s: float,
        trial: str | None = None,
        ran: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Declare the stage done. Nothing in the folder changes afterwards, but that checkpoints go: not before, for
        a kill in between must not cost the training.

        The manifest's `wall_s` is the time at work over all attempts, as `Progress` saw it: from the first step of
        training, or from the first request for the tasks of a per-image stage (on a busy cluster these wait for CPUs).
        The given `wall_s` is for a stage without progress. `cost` has the CPU and GPU seconds of that work, `ran` what
        the last attempt ran with, and `trial` the key of the trial that pays for it: the others reuse it.
        """
        spent = spent_s(self.path / "progress.json")
        cpu_s, gpu_s = used_s(self.path / "progress.json")
        manifest = {
            "stage": self.stage, "key": self.key, "result": dict(result),
            "wall_s": wall_s if spent is None else spent, "cost": {"cpu_s": cpu_s, "gpu_s": gpu_s},
            "ran": dict(ran or {}), "trial": trial, "finished_ms": now_ms(),
        }  # fmt: skip
        write_json(self.path / "manifest.json", manifest)
        self.tidy()
        return manifest

    def tidy(self) -> None:
        """Delete what a finished stage does not need, with what killed writers left there: its checkpoints."""
        if names_in(self.path / "checkpoints"):
            remove_tree(self.path / "checkpoints")

    def ask_stop(self, why: Mapping[str, Any]) -> None:
        """Ask whoever trains this stage now to end; `why` is what the trial's state will say of it."""
        write_json(self.path / "stop.json", dict(why))

    def stop_asked(self) -> dict[str, Any] | None:
        """Why this stage is to end now; None when nobody asked."""
        asked = read_json(self.path / "stop.json")
        return asked if isinstance(asked, dict) else None

    def forget_stop(self) -> None:
        """Take back what was asked of a trial that is no longer at work here."""
        remove(self.path / "stop.json")

    @contextmanager
    def lock(self, waiting: Callable[[], None] = lambda: None, poll_s: float = 1.0) -> Iterator[None]:
        """Hold the stage: a second trial that needs it waits here and then finds it done."""
        with locked(self.path / ".lock", waiting=waiting, poll_s=poll_s):
            yield


@dataclass(frozen=True)
class TrialDir:
    """The folder of one trial: its config, state, result, and the error of its last attempt."""

    path: StoragePath
    key: str

    def state(self) -> dict[str, Any]:
        """What `state.json` says; empty when the trial never started."""
        state = read_json(self.path / "state.json")
        return state if isinstance(state, dict) else {}

    def write_state(self, **changes: Any) -> None:
        """Merge changes into the state."""
        write_json(self.path / "state.json", {**self.state(), **changes})

    def result(self) -> dict[str, Any] | None:
        """The result, which alone decides that a trial is finished."""
        result = read_json(self.path / "result.json")
        return result if isinstance(result, dict) and "metrics" in result else None

    def error(self) -> dict[str, Any] | None:
        """The error of the last attempt."""
        error = read_json(self.path / "error.json")
        return error if isinstance(error, dict) else None


@dataclass(frozen=True)
class StudyDir:
    """The folder of one study."""

    path: StoragePath
    name: str

    def definition(self) -> dict[str, Any]:
        """The study as it was launched; ValueError when there is none of that name, or a damaged one."""
        path = self.path / "study.json"
        study = read_json(path)
        if size_of(path) is not None and not (isinstance(study, dict) and {"trials", "created_ms"} <= study.keys()):
            raise ValueError(
                f"{path} is damaged; launch its file again (ppc study launch FILE): what is finished is not run again"
            )
        if not isinstance(study, dict):
            others = ", ".join(_launched(self.path.parent)) or "none"
            raise ValueError(f"no study {self.name!r} in {self.path.parent}; launched studies: {others}")
        return study

    @property
    def launch_lock(self) -> StoragePath:
        """The lock that a launch of the study holds while it is at work."""
        return self.path / ".launch.lock"

    def being_run(self) -> bool:
        """Whether a launch is at work on the study. In an object store one that died counts as such for a while."""
        try:
            with locked(self.launch_lock, timeout_s=0):
                return False
        except LockedError:
            return True

    def new_launch(self) -> StoragePath:
        """A fresh folder for the scheduler's own files; nothing is ever read back from it."""
        launches = self.path / "launches"
        numbers = [int(name) for name in names_in(launches) if name.isdigit()]
        path = launches / f"{max(numbers, default=0) + 1:03d}"
        write_json(path / "launch.json", {"started_ms": now_ms()})  # an object store has no empty folders
        return path


def _launched(folder: StoragePath) -> list[str]:
    return [name for name in names_in(folder) if size_of(folder / name / "study.json") is not None]


@dataclass(frozen=True)
class Storage:
    """The root under which everything lies: a folder, or a prefix of an object store."""

    root: StoragePath

    @classmethod
    def at(cls, uri: str | Path) -> Storage:
        """The storage that a user named. ValueError for what is no folder and no s3 URI."""
        return cls(storage_path(uri))

    @property
    def here(self) -> Path:
        """Folder of this machine for what can be made again; the root itself when that is a folder."""
        return local_folder(self.root)

    def study_names(self) -> list[str]:
        """Names of the launched studies, sorted; also of those whose file is damaged."""
        return _launched(self.root / "studies")

    def no_study(self) -> str:
        """What to say where nothing was launched: perhaps another place was meant."""
        unmade = isinstance(self.root, Path) and not self.root.is_dir()
        return f"no study in {self.root}" + (", which does not exist" if unmade else "")

    def study(self, name: str) -> StudyDir:
        """Folder of a study. ValueError for a name that leads out of it, here and below."""
        return StudyDir(self.root / "studies" / check_name(name, "study"), name)

    def trial(self, key: str) -> TrialDir:
        """Folder of a trial."""
        return TrialDir(self.root / "trials" / check_name(key, "trial"), key)

    def stage(self, stage: str, key: str) -> StageDir:
        """Folder of a stage result."""
        path = self.root / "stages" / check_name(stage, "stage") / check_name(key, "key of a stage")
        return StageDir(path, stage, key)

    def dataset(self, name: str) -> Path:
        """Folder of a generated dataset: on every node that needs it when the storage is an object store."""
        return self.here / "data" / check_name(name, "dataset")

    def check_writable(self) -> None:
        """ValueError when nothing can be written here."""
        try:
            with atomic_write(self.root / ".probe", "w") as handle:
                handle.write("ok")
            remove(self.root / ".probe")
        except OSError as error:
            raise ValueError(f"storage {self.root} cannot be written: {error}; pass --storage PLACE") from error
