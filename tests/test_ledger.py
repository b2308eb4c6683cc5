"""What the files say of a trial; above all, whether somebody is still at work on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppc.artifacts import Progress, Storage, now_ms, write_json
from ppc.ledger import STALE_S, alive, counts, missing, read_rows, stage_dirs
from ppc.processes import this_process

STUDY: dict[str, Any] = {
    "created_ms": 1_000_000,
    "trials": [
        {
            "key": f"t{i}", "variant": "K=4", "variant_key": "v", "seed": i, "factors": {}, "config": {},
            "stages": [{"name": "train_cam", "key": f"c{i}"}, {"name": "make_seeds", "key": f"m{i}"}],
        }
        for i in range(3)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def state(word: str, **changes: Any) -> dict[str, Any]:
    here = {"state": word, "attempt": 1, **this_process(), "heartbeat_ms": now_ms()}
    return {**here, "started_ms": 5, "stage": "train_cam", "stage_key": "c0", **changes}


def row_of(root: Path, values: dict[str, Any] | None = None, **files: Any) -> Any:
    storage = Storage(root)
    if values is not None:
        write_json(storage.trial("t0").path / "state.json", values)
    for name, value in files.items():
        write_json(storage.trial("t0").path / f"{name}.json", value)
    return read_rows(storage, STUDY)[0]


def test_a_trial_that_never_started_is_pending(tmp_path: Path) -> None:
    row = row_of(tmp_path)
    assert (row.state, row.attempt, row.stage, row.progress, row.result, row.error) == (
        "PENDING", 0, None, None, None, None,
    )  # fmt: skip
    assert row.label == "K=4 s=0" and row.metric("mask_miou_train") is None


def test_running_needs_a_fresh_heartbeat_and_a_living_process(tmp_path: Path, dead_pid: int) -> None:
    stale = now_ms() - int(STALE_S * 1000) - 2000
    nearly = now_ms() - int(STALE_S * 1000) + 5000
    cases = [
        ({}, "RUNNING"),
        ({"heartbeat_ms": nearly}, "RUNNING"),
        ({"heartbeat_ms": stale}, "INTERRUPTED"),
        ({"pid": dead_pid}, "INTERRUPTED"),
        ({"pid": dead_pid, "host": "elsewhere"}, "RUNNING"),  # of another machine only the heartbeat is known
        ({"pid": dead_pid, "pid_space": "pid:[1]"}, "RUNNING"),  # nor of another container of this host
        ({"heartbeat_ms": stale, "host": "elsewhere"}, "INTERRUPTED"),
    ]
    for changes, wanted in cases:
        assert row_of(tmp_path, state("RUNNING", **changes)).state == wanted, changes


def test_somebody_elses_process_that_may_not_be_signalled_is_a_process_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(pid: int, signal: int) -> None:
        raise PermissionError(pid)

    monkeypatch.setattr(os, "kill", refused)
    assert row_of(tmp_path, state("RUNNING", pid=1)).state == "RUNNING"


def test_a_state_without_heartbeat_is_not_alive() -> None:
    assert not alive({"state": "RUNNING"})


def test_the_result_alone_decides_that_a_trial_is_finished(tmp_path: Path, dead_pid: int) -> None:
    result = {"metrics": {"mask_miou_train": 0.5}, "finished_ms": 2_000_000}
    assert row_of(tmp_path, state("FINISHED")).state == "INTERRUPTED", "its result is gone"
    row = row_of(tmp_path, state("RUNNING", pid=dead_pid), result=result)
    assert row.state == "FINISHED", "killed between the result and the last word"
    assert row.metric("mask_miou_train") == 0.5 and row.metric("other") is None and not row.reused
    assert row_of(tmp_path, result={**result, "finished_ms": 999_999}).reused, "finished before this study was made"


def test_errors_are_shown_where_they_are_the_last_word(tmp_path: Path) -> None:
    error = {"type": "ValueError", "message": "no", "stage": "train_cam", "traceback": "..."}
    for word in ("FAILED", "KILLED"):
        row = row_of(tmp_path, state(word, ended_ms=9), error=error)
        assert (row.state, row.error, row.ended_ms, row.started_ms) == (word, error, 9, 5)
    assert row_of(tmp_path, state("RUNNING")).error is None, "that was the attempt before"
    assert row_of(tmp_path, state("RUNNING", heartbeat_ms=0)).error == error
    assert row_of(tmp_path, state("FAILED"), result={"metrics": {}}).error is None


def test_progress_is_that_of_the_stage_at_work(tmp_path: Path) -> None:
    folder = stage_dirs(Storage(tmp_path), row_of(tmp_path))[0]
    assert (folder.stage, folder.key) == ("train_cam", "c0")
    Progress(folder / "progress.json", total=8, unit="step").update(3, epoch=1, epochs=2)
    progress = row_of(tmp_path, state("RUNNING")).progress
    assert (progress["done"], progress["total"], progress["epochs"]) == (3, 8, 2)
    assert row_of(tmp_path, state("RUNNING", stage="make_seeds", stage_key="m0")).progress is None, "not begun"
    assert row_of(tmp_path, state("FAILED")).progress is None


@pytest.mark.parametrize("text", ["", "[]", '{"state": "RUN'])
def test_a_broken_state_file_is_a_trial_to_run(tmp_path: Path, text: str) -> None:
    path = Storage(tmp_path).trial("t0").path / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert row_of(tmp_path).state == "PENDING"


def test_a_launch_runs_all_but_finished_and_running(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    write_json(storage.trial("t0").path / "result.json", {"metrics": {}})
    for word, runs in (("RUNNING", 1), ("FAILED", 2), ("KILLED", 2)):
        write_json(storage.trial("t1").path / "state.json", state(word))
        rows = read_rows(storage, STUDY)
        assert len(missing(rows)) == runs
        assert counts(rows) == {"FINISHED": 1, word: 1, "PENDING": 1}
    write_json(storage.trial("t1").path / "state.json", state("RUNNING", heartbeat_ms=0))
    rows = read_rows(storage, STUDY)
    assert [row.key for row in missing(rows)] == ["t1", "t2"]
    assert list(counts(rows)) == ["FINISHED", "PENDING", "INTERRUPTED"]
