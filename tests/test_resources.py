"""Resuming with other resources: the same trials, run another way; and what a trial that was too large is told."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_config
from tiny_study import QUIET, make_study

from ppc.artifacts import Storage, read_json
from ppc.launch import Where, run_study
from ppc.ledger import FAILED, FINISHED, read_rows
from ppc.loading import ConfigError
from ppc.resources import change_runtime
from ppc.runtime import LocalRuntime, WorkerDiedError, remedy


def test_only_what_is_left_changes_and_the_change_is_recorded(tmp_path: Path) -> None:
    study = make_study(Storage(tmp_path), k=[0, 4], seeds=[0])
    first, second = (trial["key"] for trial in study["trials"])
    changed = change_runtime(study, [second], ["runtime.workers=2", "runtime.cpus_per_worker=0.5"])
    assert [trial["key"] for trial in changed["trials"]] == [first, second]
    assert changed["trials"][0] == study["trials"][0]
    assert changed["trials"][1]["config"]["runtime"]["workers"] == 2
    assert {**changed["trials"][1]["config"], "runtime": 0} == {**study["trials"][1]["config"], "runtime": 0}
    (record,) = changed["runtime_changes"]
    assert record["set"] == {"runtime.workers": 2, "runtime.cpus_per_worker": 0.5} and record["trials"] == [second]
    again = change_runtime(changed, [second], ["runtime.workers=1"])
    assert len(again["runtime_changes"]) == 2 and again["trials"][1]["config"]["runtime"]["workers"] == 1


@pytest.mark.parametrize("bad", ["train.epochs=3", "seed=1"])
def test_a_field_that_makes_another_trial_is_refused(tmp_path: Path, bad: str) -> None:
    study = make_study(Storage(tmp_path), k=[4], seeds=[0])
    with pytest.raises(ValueError, match="a resume changes fields of `runtime` alone"):
        change_runtime(study, [], [bad])


def test_a_wrong_field_is_told_where_no_trial_is_left_too(tmp_path: Path) -> None:
    study = make_study(Storage(tmp_path), k=[4], seeds=[0])
    with pytest.raises(ConfigError, match="did you mean runtime.workers"):
        change_runtime(study, [], ["runtime.wokers=2"])


@pytest.mark.parametrize("bad", ["runtime.wokers=2", "runtime.workers=none"])
def test_a_wrong_field_or_value_is_told_before_anything_runs(tmp_path: Path, bad: str) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    with pytest.raises(ConfigError, match="runtime.wo"):
        run_study(storage, "k", Where(local=True, tracking="none"), QUIET, runtime=[bad])
    assert read_json(storage.study("k").path / "study.json") == study
    assert [row.state for row in read_rows(storage, study)] == ["PENDING"]


def test_a_trial_that_ran_out_of_memory_is_the_same_trial_with_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = Storage(tmp_path / "calm")
    expected = make_study(calm, k=[4], seeds=[0])
    assert run_study(calm, "k", Where(local=True, tracking="none"), QUIET) == 0

    storage = Storage(tmp_path / "full")
    study = make_study(storage, k=[4], seeds=[0])
    train = LocalRuntime.train

    def too_large(self: LocalRuntime, worker: object, payload: object, cfg: object) -> None:
        if cfg.images_per_task != 2:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        train(self, worker, payload, cfg)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalRuntime, "train", too_large)
    local = Where(local=True, tracking="none")
    assert run_study(storage, "k", local, QUIET) == 1
    (row,) = read_rows(storage, study)
    assert row.state == FAILED and row.error is not None and row.error["type"] == "OutOfMemoryError"
    assert "ppc study resume STUDY --set runtime.workers=2" in row.error["message"]
    assert run_study(storage, "k", local, QUIET, runtime=["runtime.images_per_task=2"]) == 0
    (row,) = read_rows(storage, study)
    assert (row.state, row.attempt, row.key) == (FINISHED, 2, expected["trials"][0]["key"])
    assert storage.trial(row.key).state()["runtime"]["images_per_task"] == 2
    before = calm.trial(row.key).result()
    assert before is not None and row.result is not None and row.result["metrics"] == before["metrics"]


def test_the_remedy_is_that_of_the_first_cause() -> None:
    outer = RuntimeError("in a worker")
    outer.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert "runtime.workers=2" in str(remedy(outer))
    for died in (WorkerDiedError("died"), BrokenProcessPool("a process was terminated abruptly")):
        assert "--max-concurrent 1" in str(remedy(died))
    assert remedy(ValueError("no mask")) is None and tiny_config().runtime.workers == 1
