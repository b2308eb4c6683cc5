"""Early stopping on a Ray cluster: a trial really ends, the others do not notice, and it can go on to the end."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock
from rich.console import Console
from tiny_study import QUIET, make_study

from ppc.artifacts import Storage, read_journal
from ppc.config import TrialConfig
from ppc.launch import Where, run_study
from ppc.ledger import FINISHED, RUNNING, STOPPED, TrialRow, read_rows
from ppc.ray_runtime import RayRuntime
from ppc.ray_study import cluster
from ppc.runtime import LocalRuntime
from ppc.train import TrainingStopped, checkpoints
from ppc.trial import run_trial

# The warnings of Ray and MLflow are not ours.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EPOCHS, STEPS = 16, 32
AXES = {"train.learning_rate": [0.01, 1e-7]}  # the second learns nothing: its loss is the higher one from epoch 1
EARLY = {"metric": "train/cls", "mode": "min", "min_epochs": 1, "reduction_factor": 2}


def study_in(storage: Storage, **runtime: Any) -> dict[str, Any]:
    tiny = {"train.epochs": EPOCHS, **{f"runtime.{name}": value for name, value in runtime.items()}}
    return make_study(storage, axes=AXES, seeds=[0, 1], tiny=tiny, early_stopping=EARLY)


def training_of(storage: Storage, row: TrialRow) -> Any:
    return storage.stage("train_cam", next(s["key"] for s in row.stages if s["name"] == "train_cam"))


def last_step(storage: Storage, row: TrialRow) -> int:
    points, _ = read_journal(training_of(storage, row) / "journal.jsonl")
    return max((point["step"] for point in points), default=0)


def holders(path: Path) -> list[int]:
    """Processes below this one that have a file open."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process.pid for f in process.open_files() if f.path == str(path.resolve())]
        except psutil.Error:
            continue
    return found


class Witness:
    """Looks at the stopped trial from the moment its state says so, while the launch goes on with others."""

    def __init__(self, storage: Storage, study: dict[str, Any]) -> None:
        self.storage, self.study = storage, study
        self.steps: list[int] = []
        self.holders: list[int] = []
        self.locked = True
        self.others_went_on = False
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not (stopped := [row for row in read_rows(self.storage, self.study) if row.state == STOPPED]):
            time.sleep(0.05)
        (row,) = stopped
        folder = training_of(self.storage, row)
        time.sleep(0.3)  # the driver writes the state before it lets go of the lock of the stage
        for _ in range(20):
            self.steps.append(last_step(self.storage, row))
            self.others_went_on |= any(other.state == RUNNING for other in read_rows(self.storage, self.study))
            time.sleep(0.1)
        self.holders = holders(folder / ".train.lock") + holders(folder / "journal.jsonl")
        lock = FileLock(str(folder / ".lock"))
        with lock.acquire(timeout=1):
            self.locked = False

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)


def test_a_stopped_trial_ends_says_so_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPC_STOP_POLL_S", "0.05")
    storage = Storage(tmp_path / "asha")
    study = study_in(storage)
    here = Where(num_cpus=2, max_concurrent=1)
    with Witness(storage, study) as witness:
        assert run_study(storage, "k", here, QUIET) == 0
    rows = read_rows(storage, study)
    assert [row.state for row in rows] == [FINISHED, FINISHED, STOPPED, FINISHED]  # its last seed is kept
    stopped = rows[2]
    assert stopped.error is None and stopped.stopped is not None
    epoch, value = stopped.stopped["epoch"], stopped.stopped["value"]
    assert 1 <= epoch < EPOCHS and value > 0 and stopped.stopped["metric"] == "train/cls"
    end = last_step(storage, stopped)
    assert STEPS // EPOCHS * epoch <= end < STEPS, "the training went on to its last step"
    assert witness.others_went_on and set(witness.steps) == {end} and not witness.holders and not witness.locked
    assert checkpoints(training_of(storage, stopped)), "its checkpoint stays"
    (run,) = [run for run in runs_of(storage) if run.data.tags["ppc.trial_key"] == stopped.key]
    assert run.info.status == "KILLED" and run.data.tags["ppc.stopped"].startswith(f"epoch {epoch}, train/cls ")

    out = io.StringIO()
    assert run_study(storage, "k", here, Console(file=out, width=300)) == 0
    assert "3 finished, 1 stopped); 0 to run" in out.getvalue() and "1 of 2" in out.getvalue()
    assert read_rows(storage, study)[2].attempt == 1, "nobody asked for it"

    assert run_study(storage, "k", here, QUIET, stopped=True) == 0
    rows = read_rows(storage, study)
    assert all(row.state == FINISHED for row in rows) and [row.attempt for row in rows] == [1, 1, 2, 1]
    assert all(run.info.status == "FINISHED" and "ppc.stopped" not in run.data.tags for run in runs_of(storage))
    calm = Storage(tmp_path / "calm")
    for row in (rows[0], rows[2]):  # one that was compared and went on, one that was stopped and went on
        cfg, stages = TrialConfig.model_validate(row.config), [(s["name"], s["key"]) for s in row.stages]
        undisturbed = run_trial(cfg, row.key, stages, calm, LocalRuntime())
        assert row.result is not None and undisturbed["metrics"] == row.result["metrics"]
        assert losses(storage, row) == losses(calm, row)


def test_several_workers_stop_at_the_same_step(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = study_in(storage, workers=2)
    row = read_rows(storage, study)[2]
    folder = training_of(storage, row)

    def ask_after_the_first_checkpoint() -> None:
        while not checkpoints(folder):
            time.sleep(0.01)
        folder.ask_stop({"epoch": 1, "metric": "train/cls", "value": 0.5})

    thread = threading.Thread(target=ask_after_the_first_checkpoint, daemon=True)
    thread.start()
    with cluster(None, num_cpus=4):
        cfg, stages = TrialConfig.model_validate(row.config), [(s["name"], s["key"]) for s in row.stages]
        with pytest.raises(TrainingStopped):
            run_trial(cfg, row.key, stages, storage, RayRuntime(tmp_path / "scratch"))
        end = last_step(storage, row)
        assert 2 <= end < STEPS and not holders(folder / ".train.lock") and checkpoints(folder)
        assert read_rows(storage, study)[2].stopped == {"epoch": 1, "metric": "train/cls", "value": 0.5}
        time.sleep(1)
        assert last_step(storage, row) == end


def losses(storage: Storage, row: TrialRow) -> list[dict[str, float]]:
    points, _ = read_journal(training_of(storage, row) / "journal.jsonl")
    return [{name: v for name, v in point["m"].items() if name.startswith("train/")} for point in points]


def runs_of(storage: Storage) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage.root}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("ppc/k")
    return client.search_runs([experiment.experiment_id], "tags.`ppc.kind` = 'trial'")
