"""The study's own list of trials and what the files say of each. Schedulers and trackers are told, never asked."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ppc.artifacts import StageDir, Storage, TrialDir, now_ms, read_json
from ppc.places import is_remote
from ppc.processes import is_gone

HEARTBEAT_S = 5.0
REMOTE_READERS = 16  # trials read at a time from an object store
STALE_S = 45.0  # a trial whose heartbeat is older is dead, whatever its state says

PENDING, RUNNING, FINISHED, FAILED, KILLED, INTERRUPTED, STOPPED = (
    "PENDING",
    "RUNNING",
    "FINISHED",
    "FAILED",
    "KILLED",
    "INTERRUPTED",
    "STOPPED",  # early, by the study's rule: no result, no error, and not missing
)


@dataclass(frozen=True)
class TrialRow:
    """One trial of a study, as its files say now."""

    key: str
    variant: str
    variant_key: str
    seed: int
    factors: dict[str, Any]
    config: dict[str, Any]
    stages: list[dict[str, str]]  # {"name", "key"} in order
    state: str
    attempt: int
    stage: str | None  # the stage at work, or the last one
    progress: dict[str, Any] | None  # of that stage: done, total, unit, left_s, epoch, epochs
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    started_ms: int | None
    ended_ms: int | None
    reused: bool  # finished before this study was launched
    same_as: str | None = None  # the variant whose trial this is too: no evidence of its own
    stopped: dict[str, Any] | None = None  # of a STOPPED trial: epoch, metric, value

    @property
    def label(self) -> str:
        """Name of the trial in tables and in the tracker."""
        return f"{self.variant} s={self.seed}"

    def metric(self, name: str) -> float | None:
        """A final metric, when there is one."""
        return None if self.result is None else self.result["metrics"].get(name)


def stage_dirs(storage: Storage, row: TrialRow) -> list[StageDir]:
    """The stage folders of a trial, in order."""
    return [storage.stage(s["name"], s["key"]) for s in row.stages]


def make_again(storage: Storage, row: TrialRow, stage: StageDir) -> str:
    """What to do where a file of a finished stage is gone, to end a message with."""
    return f"delete {stage.path} and {storage.trial(row.key).path / 'result.json'}, then resume the study"


def alive(state: dict[str, Any]) -> bool:
    """Whether a process stands behind a RUNNING state: its heartbeat is fresh, and it is not known to have ended."""
    if now_ms() - state.get("heartbeat_ms", 0) > STALE_S * 1000:
        return False
    return not is_gone(state)


_ended_here: set[tuple[str, int]] = set()  # folders and attempts of trials that this process has ended


def note_end(trial: TrialDir, attempt: int) -> None:
    """Remember that an attempt of this process is over, also where the storage did not take its last state."""
    _ended_here.add((str(trial.path), attempt))


def _over(trial: TrialDir, state: dict[str, Any]) -> bool:
    """Whether nothing stands behind a RUNNING state: not even this process, which goes on after a trial."""
    ended = (str(trial.path), state.get("attempt")) in _ended_here and state.get("pid") == os.getpid()
    return ended or not alive(state)


def stopped_at(row: TrialRow) -> str:
    """`epoch 2, train/cls 0.53` of a trial that was stopped early; empty for others."""
    if row.stopped is None:
        return ""
    return f"epoch {row.stopped.get('epoch')}, {row.stopped.get('metric')} {row.stopped.get('value'):.4g}"


def _row(storage: Storage, entry: dict[str, Any], study: dict[str, Any]) -> TrialRow:
    trial, created_ms = storage.trial(entry["key"]), study["created_ms"]
    state, result, error = trial.state(), trial.result(), trial.error()
    word = state.get("state", PENDING)
    if result is not None:
        word = FINISHED
    elif word == STOPPED and not study.get("early_stopping"):  # by the rule of another study that shares it
        word = INTERRUPTED
    elif word == FINISHED:  # the result is gone: it has to run again
        word = INTERRUPTED
    elif word == RUNNING and _over(trial, state):
        word = INTERRUPTED
    stage = state.get("stage")
    progress = None
    if word == RUNNING and stage and (stage_key := state.get("stage_key")):
        progress = read_json(storage.stage(stage, stage_key) / "progress.json")
    return TrialRow(
        **{name: entry[name] for name in ("key", "variant", "variant_key", "seed", "factors", "config", "stages")},
        state=word,
        attempt=state.get("attempt", 0),
        stage=stage,
        progress=progress,
        result=result,
        error=error if word in (FAILED, KILLED, INTERRUPTED) else None,
        started_ms=state.get("started_ms"),
        ended_ms=state.get("ended_ms"),
        reused=result is not None and result.get("finished_ms", created_ms) < created_ms,
        same_as=entry.get("same_as"),
        stopped=state.get("stopped") if word == STOPPED else None,
    )


def read_rows(storage: Storage, study: dict[str, Any]) -> list[TrialRow]:
    """All trials of a study (its `study.json`), in the order of the table."""

    def row(entry: dict[str, Any]) -> TrialRow:
        return _row(storage, entry, study)

    if not is_remote(storage.root):
        return [row(entry) for entry in study["trials"]]
    with ThreadPoolExecutor(REMOTE_READERS) as pool:  # a read takes tens of milliseconds there
        return list(pool.map(row, study["trials"]))


def missing(rows: list[TrialRow], keep: frozenset[str] = frozenset(), *, stopped: bool = False) -> list[TrialRow]:
    """Trials that a launch has to run: all that are neither finished nor at work somewhere, each key once.

    Seed by seed: a launch that is cut off leaves all variants with fewer seeds, and not fewer variants. One that was
    stopped early is not among them, unless its key is in `keep` or all `stopped` ones are asked for.
    """
    found: dict[str, TrialRow] = {}
    for row in rows:
        wanted = row.state != STOPPED or stopped or row.key in keep
        if wanted and row.state not in (FINISHED, RUNNING):
            found.setdefault(row.key, row)
    place = {seed: index for index, seed in enumerate(dict.fromkeys(row.seed for row in rows))}
    return sorted(found.values(), key=lambda row: place[row.seed])


def counts(rows: list[TrialRow]) -> dict[str, int]:
    """Trials per state, in a fixed order, states without trials left out."""
    count = Counter(row.state for row in rows)
    return {s: count[s] for s in (FINISHED, STOPPED, RUNNING, PENDING, INTERRUPTED, KILLED, FAILED) if count[s]}
