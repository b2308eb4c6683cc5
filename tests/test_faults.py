"""Processes of a study that are killed in mid-epoch: it goes on by itself, or ends in a clear error and is resumed."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_study import QUIET, make_study

from ppc.artifacts import Storage, read_journal, write_json
from ppc.launch import Where, run_study
from ppc.ledger import FAILED, FINISHED, TrialRow, read_rows

# The warnings of Ray and MLflow are not ours.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]
STEPS = 2  # an epoch
EPOCHS = 20


def study_on(storage: Storage) -> dict[str, Any]:
    """Three trials: of one process, of two workers, and of one process that will die at every try."""
    study = make_study(storage, k=[4], seeds=[0, 1, 2], tiny={"train.epochs": EPOCHS})
    for number, trial in enumerate(study["trials"]):
        trial["config"]["runtime"] |= {"log_every_steps": 1, "workers": 2 if number == 1 else 1, "max_failures": 1}
    write_json(storage.study("k").path / "study.json", study)
    return study


def curve(storage: Storage, row: TrialRow) -> list[tuple[int, dict[str, float]]]:
    points, _ = read_journal(training(storage, row) / "journal.jsonl")
    return [(p["step"], {n: v for n, v in p["m"].items() if n.startswith("train/")}) for p in points]


def training(storage: Storage, row: TrialRow) -> Path:
    return Path(str(storage.stage("train_cam", row.stages[0]["key"]).path))


class Killer(threading.Thread):
    """Kills processes of a trial in turn, each in the middle of an epoch after the first: who trains, or its driver."""

    def __init__(self, storage: Storage, row: TrialRow, victims: list[str]) -> None:
        super().__init__(daemon=True)
        self.storage, self.row, self.victims = storage, row, victims
        self.killed: dict[int, int] = {}  # pid: last step in the journal at its death
        self.over = threading.Event()

    def run(self) -> None:
        while len(self.killed) < len(self.victims) and not self.over.wait(0.01):
            step = self._step()
            if step <= STEPS or (trainer := self._trainer()) is None or trainer.pid in self.killed:
                continue
            trainer.suspend()  # so that it is where it is when it is looked at
            step = self._step()
            if step % STEPS == 0 or step >= STEPS * EPOCHS:  # between two epochs: let it go on
                trainer.resume()
                continue
            victim = trainer.pid
            if self.victims[len(self.killed)] == "driver":
                victim = int(self.storage.trial(self.row.key).state()["pid"])
                trainer.resume()
            self.killed[victim] = step
            os.kill(victim, signal.SIGKILL)

    def _step(self) -> int:
        points, _ = read_journal(training(self.storage, self.row) / "journal.jsonl")
        return int(points[-1]["step"]) if points else 0

    def _trainer(self) -> psutil.Process | None:
        """The process that holds the lock of the training: the one that writes."""
        lock = str((training(self.storage, self.row) / ".train.lock").resolve())
        for process in psutil.Process().children(recursive=True):
            try:
                if any(file.path == lock for file in process.open_files()):
                    return process
            except psutil.Error:
                continue
        return None


def runs_of(storage: Storage) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage.root}/mlflow/mlflow.db")
    number = client.get_experiment_by_name("ppc/k").experiment_id
    runs = client.search_runs([number], "tags.`ppc.kind` = 'trial'")
    found = {run.data.tags["ppc.trial_key"]: run for run in runs}
    assert len(found) == len(runs), "one run a trial"
    for run in runs:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        assert sorted(steps) == sorted(set(steps)), "each point once"
        if run.info.status == FINISHED:
            assert sorted(steps) == list(range(1, STEPS * EPOCHS + 1))
    return found


def test_killed_workers_and_drivers_cost_nothing_but_time(tmp_path: Path) -> None:
    calm = Storage(tmp_path / "calm")
    expected = study_on(calm)
    assert run_study(calm, "k", Where(local=True, tracking="none"), QUIET) == 0

    storage = Storage(tmp_path / "killed")
    study = study_on(storage)
    rows = read_rows(storage, study)
    victims = [["trainer"], ["trainer", "driver"], ["trainer", "trainer"]]
    killers = [Killer(storage, row, who) for row, who in zip(rows, victims, strict=True)]
    for killer in killers:
        killer.start()
    code = run_study(storage, "k", Where(num_cpus=4), QUIET)
    for killer in killers:
        killer.over.set()
        killer.join(10)
    assert [len(killer.killed) for killer in killers] == [1, 2, 2], "a fault was not injected"
    assert all(step > STEPS and step % STEPS for killer in killers for step in killer.killed.values())

    rows = read_rows(storage, study)
    assert code == 1 and [row.state for row in rows] == [FINISHED, FINISHED, FAILED], rows
    assert [row.attempt for row in rows] == [1, 2, 1]
    error = rows[2].error
    assert error is not None and error["type"] == "WorkerDiedError" and error["stage"] == "train_cam"
    assert "died and so did 1 more tries (runtime.max_failures)" in error["message"]
    runs = runs_of(storage)
    assert [runs[row.key].info.status for row in rows] == [FINISHED, FINISHED, FAILED]

    finished = [row for row in rows if row.state == FINISHED]
    files = [p for row in finished for f in (storage.trial(row.key).path, training(storage, row)) for p in f.rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in files if path.is_file()}
    assert run_study(storage, "k", Where(local=True), QUIET) == 0  # numbers do not depend on where it is
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished trial was touched"
    again = runs_of(storage)
    assert {key: run.info.run_id for key, run in again.items()} == {key: run.info.run_id for key, run in runs.items()}
    assert {run.info.status for run in again.values()} == {FINISHED}
    rows = read_rows(storage, study)
    for row, calm_row in zip(rows, read_rows(calm, expected), strict=True):
        assert row.result is not None and calm_row.result is not None
        assert row.result["metrics"] == calm_row.result["metrics"]
        assert curve(storage, row) == curve(calm, calm_row)
