"""Studies on a Ray of their own: what runs, what is recorded, what a fault leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ppc.artifacts import Storage, read_journal, read_json
from ppc.config import RuntimeConfig, StudyConfig
from ppc.launch import Where, define, run_study, save
from ppc.ledger import FAILED, FINISHED, read_rows
from ppc.study import baseline, expand
from ppc.trial import check_trial

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # the warnings of Ray and MLflow are not ours
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115  (lives as long as the tests)


def make_study(storage: Storage, name: str = "k", **changes: Any) -> dict[str, Any]:
    """A tiny study of three K and two seeds, saved."""
    raw: dict[str, Any] = {
        "name": name,
        "base": {"runtime": changes.pop("runtime", {}), "train": changes.pop("train", {})},
        "design": {"kind": "grid", "axes": {"contrast.prototype_top_k": changes.pop("k", [0, 4, 32])}},
        "trial_seeds": changes.pop("seeds", [0, 1]),
        "tiny": changes.pop("tiny", {}),
    }
    assert not changes
    study = StudyConfig.model_validate(raw)
    specs = expand(study, tiny=True, check=check_trial)
    definition = define(study, specs, baseline(study, specs), storage)
    save(definition, storage)
    return definition


def metrics_of(storage: Storage, study: dict[str, Any]) -> dict[str, Any]:
    return {row.label: row.result and row.result["metrics"] for row in read_rows(storage, study)}


def child_runs(storage: Storage, study: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage.root}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(f"ppc/{study}")
    return client.search_runs([experiment.experiment_id], "tags.`ppc.kind` = 'trial'")


def test_one_failing_trial_leaves_five_results_and_resume_runs_just_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage)
    victim = study["trials"][3]
    stage = next(s for s in victim["stages"] if s["name"] == "refine_crf")
    blocked = storage.stage("refine_crf", stage["key"]).path
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where a folder must be made")

    assert run_study(storage, "k", Where(num_cpus=2), QUIET) == 1
    rows = read_rows(storage, study)
    assert [row.state for row in rows].count(FINISHED) == 5
    (failed,) = [row for row in rows if row.state == FAILED]
    assert failed.key == victim["key"] and failed.error is not None
    assert failed.error["stage"] == "refine_crf" and str(blocked) in failed.error["message"]
    assert "Traceback" in failed.error["traceback"]
    runs = child_runs(storage, "k")
    assert sorted(run.info.status for run in runs) == ["FAILED"] + ["FINISHED"] * 5

    attempts = {row.key: row.attempt for row in rows}
    trained = {row.key: storage.stage(*stage_of(row, "train_cam")).path / "weights.pt" for row in rows}
    times = {key: path.stat().st_mtime_ns for key, path in trained.items()}
    blocked.unlink()
    assert run_study(storage, "k", Where(num_cpus=2), QUIET) == 0
    rows = read_rows(storage, study)
    assert [row.state for row in rows] == [FINISHED] * 6
    assert {row.key: row.attempt - attempts[row.key] for row in rows} == {
        row.key: int(row.key == victim["key"]) for row in rows
    }
    assert {key: path.stat().st_mtime_ns for key, path in trained.items()} == times  # nothing was trained again
    again = child_runs(storage, "k")
    assert len(again) == 6 and all(run.info.status == "FINISHED" for run in again)
    assert {run.info.run_id for run in again} == {run.info.run_id for run in runs}


def stage_of(row: Any, name: str) -> tuple[str, str]:
    return name, next(stage["key"] for stage in row.stages if stage["name"] == name)


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from ppc.ray_study import cluster

    with cluster(None, num_cpus=4):
        yield


def run_one(storage: Storage, study: dict[str, Any], scratch: Path, runtime: dict[str, Any]) -> dict[str, Any]:
    """Run the first trial of a study on the cluster of this process."""
    from ppc.config import TrialConfig
    from ppc.ray_runtime import RayRuntime
    from ppc.trial import run_trial

    entry = study["trials"][0]
    cfg = TrialConfig.model_validate({**entry["config"], "runtime": {**entry["config"]["runtime"], **runtime}})
    stages = [(s["name"], s["key"]) for s in entry["stages"]]
    return run_trial(cfg, entry["key"], stages, storage, RayRuntime(str(scratch)))


def losses_of(storage: Storage, study: dict[str, Any]) -> list[dict[str, float]]:
    entry = study["trials"][0]
    key = next(s["key"] for s in entry["stages"] if s["name"] == "train_cam")
    points, _ = read_journal(storage.stage("train_cam", key) / "journal.jsonl")
    return [{n: v for n, v in point["m"].items() if n.startswith("train/")} for point in points]


def test_ray_train_with_two_workers_gives_the_numbers_of_one(tmp_path: Path, ray_here: None) -> None:
    results = {}
    for name, runtime in {"one": {"engine": "task"}, "two": {"workers": 2}, "train": {"engine": "train"}}.items():
        storage = Storage(tmp_path / name)
        study = make_study(storage, k=[4], seeds=[0])
        results[name] = (run_one(storage, study, tmp_path / "scratch", runtime), losses_of(storage, study))
    one, two, alone = results["one"], results["two"], results["train"]
    assert one[1] == alone[1] and one[0]["metrics"] == alone[0]["metrics"]
    assert len(one[1]) == len(two[1]) > 0
    for a, b in zip(one[1], two[1], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert one[0]["metrics"] == pytest.approx(two[0]["metrics"], abs=0.02)  # a pixel at a tie may fall either way


def test_a_trial_that_asks_for_more_than_there_is_fails_with_that_word(tmp_path: Path, ray_here: None) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    start = time.monotonic()
    with pytest.raises(ValueError, match="asks for 64 CPU in all but the cluster has 4"):
        run_one(storage, study, tmp_path, {"cpus_per_worker": 64, "resource_wait_s": 2})
    assert time.monotonic() - start < 20


def test_a_killed_training_process_is_started_again_from_its_checkpoint(tmp_path: Path, ray_here: None) -> None:
    import threading

    import psutil

    long = {"train.epochs": 6}
    calm = Storage(tmp_path / "calm")
    study = make_study(calm, k=[4], seeds=[0], tiny=long)
    undisturbed = run_one(calm, study, tmp_path, {"engine": "task"})

    storage = Storage(tmp_path / "killed")
    study = make_study(storage, k=[4], seeds=[0], tiny=long)
    key = next(s["key"] for s in study["trials"][0]["stages"] if s["name"] == "train_cam")
    folder = storage.stage("train_cam", key).path
    killed: list[int] = []

    def kill_after_first_checkpoint() -> None:
        while not list((folder / "checkpoints").glob("epoch-*.pt")):
            time.sleep(0.005)
        lock = (folder / ".train.lock").resolve()
        for process in psutil.Process().children(recursive=True):
            try:
                if any(Path(f.path) == lock for f in process.open_files()):
                    process.kill()
                    killed.append(process.pid)
            except psutil.Error:
                continue

    thread = threading.Thread(target=kill_after_first_checkpoint)
    thread.start()
    disturbed = run_one(storage, study, tmp_path, {"engine": "task"})
    thread.join()
    assert killed, "nobody held the training lock: the fault was not injected"
    assert disturbed["metrics"] == undisturbed["metrics"]
    assert losses_of(storage, study) == losses_of(calm, study)


@pytest.mark.slow
def test_a_killed_launch_is_resumed_and_finished_trials_stay(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[0, 4], seeds=[0, 1])
    code = (
        "from pathlib import Path; from rich.console import Console; from ppc.artifacts import Storage;"
        "from ppc.launch import Where, run_study;"
        f"run_study(Storage(Path({str(tmp_path)!r})), 'k', Where(num_cpus=2, max_concurrent=1), Console())"
    )
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while sum(row.state == FINISHED for row in read_rows(storage, study)) < 1:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {row.key: row.attempt for row in read_rows(storage, study) if row.state == FINISHED}
    assert 1 <= len(finished) < 4
    assert run_study(storage, "k", Where(num_cpus=2), QUIET) == 0
    rows = read_rows(storage, study)
    assert [row.state for row in rows] == [FINISHED] * 4
    assert all(row.attempt == finished[row.key] for row in rows if row.key in finished)
    runs = child_runs(storage, "k")
    assert len(runs) == 4 and all(run.info.status == "FINISHED" for run in runs)


def test_a_second_launch_is_told_who_holds_the_study(tmp_path: Path) -> None:
    from ppc.launch import launch_lock

    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    with launch_lock(storage.study("k")):
        code = (
            "from pathlib import Path; from rich.console import Console; from ppc.artifacts import Storage;"
            "from ppc.launch import Where, run_study;"
            f"run_study(Storage(Path({str(tmp_path)!r})), 'k', Where(local=True, tracking='none'), Console())"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode != 0 and f"pid {os.getpid()}" in done.stderr
    assert all(row.state == "PENDING" for row in read_rows(storage, study))


def test_runtime_fields_do_not_enter_keys(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    plain = make_study(storage, name="a", k=[4])
    other = make_study(storage, name="b", k=[4], tiny={"runtime.images_per_task": 3})
    assert RuntimeConfig().images_per_task != 3
    assert [t["key"] for t in plain["trials"]] == [t["key"] for t in other["trials"]]
    assert read_json(storage.study("b").path / "study.json") is not None
    assert json.dumps(plain["trials"][0]["config"]) != json.dumps(other["trials"][0]["config"])
