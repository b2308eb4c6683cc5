"""Every path on storage, and the rules by which files there can be trusted.

One root holds everything of a project. A file that decides something (`manifest.json`, `result.json`, `state.json`,
`study.json`) is written under another name and renamed, so it is there whole or not at all. A stage's manifest is
written last: a stage without one is not done, whatever else lies in its folder.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

KEY_LENGTH = 20  # hex digits of a sha256: 80 bits


def now_ms() -> int:
    """Unix time, milliseconds."""
    return int(time.time() * 1000)


def content_key(value: Any) -> str:
    """Key of plain data: equal for equal values, whatever the order of mappings."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def file_sha256(path: Path) -> str:
    """sha256 of a file's contents; FileNotFoundError says which file."""
    digest = sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def atomic_write(path: Path, mode: str = "wb", *, durable: bool = True) -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends without an error.

    It outlives a power cut too, unless it is not `durable`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, mode) as handle:
            yield handle
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write plain data atomically; NaN and infinity are refused (ValueError)."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic_write(path, "w", durable=durable) as handle:
        handle.write(text + "\n")


def read_json(path: Path) -> Any | None:
    """Plain data of a file, or None when the file is missing, empty or truncated."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None


class Journal:
    """Metric points of a stage, one JSON line each; safe to read while it is written.

    A point is {"t": unix ms, "step": int, "m": {name: value}}. After a restart the steps that are already there are
    not written again, so a point keeps its first time and can be sent any number of times. `damaged` counts the lines
    that are no points: they are passed over, by readers too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole, size = _whole_lines(path)
        if size > len(whole):  # a torn last line of a killed writer
            with path.open("r+b") as handle:
                handle.truncate(len(whole))
        points = _points(whole)
        self.damaged = whole.count(b"\n") - len(points)
        self.last_step = max((point["step"] for point in points), default=-1)
        self._handle = path.open("ab", buffering=0)

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
        self._append((json.dumps(point, separators=(",", ":")) + "\n").encode())
        self.last_step = step

    def _append(self, line: bytes) -> None:
        size = self._handle.seek(0, os.SEEK_END)
        try:
            written = self._handle.write(line)
        except OSError as error:
            raise OSError(error.errno, f"point not written: {error.strerror}", str(self.path)) from error
        if written != len(line):  # a disk that is nearly full takes a part
            self._handle.truncate(size)
            raise OSError(errno.ENOSPC, "point not written, is the disk full?", str(self.path))

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def _whole_lines(path: Path, offset: int = 0) -> tuple[bytes, int]:
    if not path.exists():
        return b"", 0
    with path.open("rb") as handle:
        handle.seek(offset)
        data = handle.read()
    return data[: data.rfind(b"\n") + 1], len(data)


def _points(data: bytes) -> list[dict[str, Any]]:
    """The lines that are points. Others are of a disk that was full or of a power cut, and must not stop a resume."""
    points = []
    for line in data.split(b"\n"):
        with suppress(ValueError):
            point = json.loads(line)
            if isinstance(point, dict) and {"t", "step", "m"} <= point.keys():
                points.append(point)
    return points


def read_journal(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Points of a journal from a byte offset, and the offset to go on from. A torn last line is left for later.

    ValueError for an offset in the middle of a line: the journal is not the one that was read before.
    """
    if offset and path.exists():
        with path.open("rb") as handle:
            handle.seek(offset - 1)
            if handle.read(1) not in (b"", b"\n"):
                raise ValueError(f"{path}: byte {offset} is in the middle of a line; read it from the start")
    data, _ = _whole_lines(path, offset)
    return _points(data), offset + len(data)


class Progress:
    """How far a stage has come, in `progress.json`; written at most twice a second.

    `spent_s` is the time at work from the making of this object, on top of that of earlier attempts.
    """

    def __init__(self, path: Path, *, total: int, unit: str) -> None:
        self.path, self.total, self.unit = path, total, unit
        self._before_s = spent_s(path) or 0.0
        self._started = time.monotonic()
        self._first: int | None = None
        self._written = 0.0

    def update(self, done: int, **extra: Any) -> None:
        """Say that `done` of `total` units are ready. A disk that is full does not end the work."""
        if self._first is None:
            self._first = done
        if done < self.total and time.monotonic() - self._written < 0.5:
            return
        self._written = time.monotonic()
        now_s = time.monotonic() - self._started
        rate = (done - self._first) / now_s if now_s > 0 else 0.0
        left_s = (self.total - done) / rate if rate > 0 else None
        value = {
            "done": done, "total": self.total, "unit": self.unit, "left_s": left_s, "t": now_ms(),
            "spent_s": self._before_s + now_s, **extra,
        }  # fmt: skip
        with suppress(OSError):
            write_json(self.path, value, durable=False)


def spent_s(path: Path) -> float | None:
    """Seconds at work, over all attempts, of a `progress.json`; None when it is not there."""
    progress = read_json(path)
    return progress.get("spent_s") if isinstance(progress, dict) else None


@dataclass(frozen=True)
class StageDir:
    """The folder of one stage result, shared by all trials whose stage key is the same."""

    path: Path
    stage: str
    key: str

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def manifest(self) -> dict[str, Any] | None:
        """The manifest when the stage is done, else None."""
        manifest = read_json(self.path / "manifest.json")
        done = isinstance(manifest, dict) and manifest.get("key") == self.key and "result" in manifest
        return manifest if done else None

    def finish(self, result: Mapping[str, Any], *, wall_s: float) -> dict[str, Any]:
        """Declare the stage done. Nothing in the folder changes afterwards, but that checkpoints go: not before, for
        a kill in between must not cost the training.

        The manifest's `wall_s` is the time at work over all attempts, as `Progress` saw it: from the first step of
        training, or from the first request for the tasks of a per-image stage (on a busy cluster these wait for CPUs).
        The given `wall_s` is for a stage without progress.
        """
        spent = spent_s(self.path / "progress.json")
        manifest = {
            "stage": self.stage, "key": self.key, "result": dict(result),
            "wall_s": wall_s if spent is None else spent, "finished_ms": now_ms(),
        }  # fmt: skip
        write_json(self.path / "manifest.json", manifest)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)  # with what killed writers left there
        return manifest

    @contextmanager
    def lock(self, waiting: Callable[[], None] = lambda: None, poll_s: float = 1.0) -> Iterator[None]:
        """Hold the stage: a second trial that needs it waits here and then finds it done.

        The kernel drops the lock when its holder dies, so it is never stale.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.path / ".lock"))
        while True:
            try:
                lock.acquire(timeout=poll_s)
                break
            except Timeout:
                waiting()
        try:
            yield
        finally:
            lock.release()


@dataclass(frozen=True)
class TrialDir:
    """The folder of one trial: its config, state, result, and the error of its last attempt."""

    path: Path
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

    path: Path
    name: str

    def definition(self) -> dict[str, Any]:
        """The study as it was launched; ValueError when there is none of that name."""
        study = read_json(self.path / "study.json")
        if not isinstance(study, dict):
            raise ValueError(f"no study {self.name!r} in {self.path.parent}; launched studies: {self._others()}")
        return study

    def _others(self) -> str:
        if not self.path.parent.exists():
            return "none"
        return ", ".join(sorted(p.name for p in self.path.parent.iterdir() if (p / "study.json").exists())) or "none"

    def new_launch(self) -> Path:
        """A fresh folder for the scheduler's own files; nothing is ever read back from it."""
        launches = self.path / "launches"
        launches.mkdir(parents=True, exist_ok=True)
        numbers = [int(p.name) for p in launches.iterdir() if p.name.isdigit()]
        path = launches / f"{max(numbers, default=0) + 1:03d}"
        path.mkdir()
        return path


@dataclass(frozen=True)
class Storage:
    """The root under which everything lies."""

    root: Path

    def study(self, name: str) -> StudyDir:
        """Folder of a study."""
        return StudyDir(self.root / "studies" / name, name)

    def trial(self, key: str) -> TrialDir:
        """Folder of a trial."""
        return TrialDir(self.root / "trials" / key, key)

    def stage(self, stage: str, key: str) -> StageDir:
        """Folder of a stage result."""
        return StageDir(self.root / "stages" / stage / key, stage, key)

    def dataset(self, name: str) -> Path:
        """Folder of a generated dataset."""
        return self.root / "data" / name

    def check_writable(self) -> None:
        """ValueError when nothing can be written here."""
        try:
            with atomic_write(self.root / ".probe", "w") as handle:
                handle.write("ok")
            (self.root / ".probe").unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(f"storage {self.root} cannot be written: {error}; pass --storage FOLDER") from error
