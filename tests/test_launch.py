"""Launches of a study: what is recorded, what a fault leaves behind, what a resume runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_study import QUIET, make_study

from ppc.artifacts import Storage, read_journal, read_json
from ppc.config import RuntimeConfig
from ppc.launch import Where, launch_lock, run_study
from ppc.ledger import FAILED, FINISHED, INTERRUPTED, PENDING, RUNNING, read_rows
from ppc.reaper import sync_studies

# The warnings of Ray and MLflow are not ours.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


def all_runs(storage: Storage, study: str, wanted: str = "") -> list[Any]:
    """Runs of trials and of launches."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage.root}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name(f"ppc/{study}")
    return client.search_runs([experiment.experiment_id], wanted)


def name_of(process: psutil.Process) -> str:
    """Its name, or nothing where it has ended since."""
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def child_runs(storage: Storage, study: str) -> list[Any]:
    return all_runs(storage, study, "tags.`ppc.kind` = 'trial'")


def shown_running(storage: Storage) -> set[str]:
    """Keys of trials of which MLflow was told that they run."""
    (memory,) = (read_json(storage.study("k").path / "tracking.json") or {"": {"runs": {}}}).values()
    return {key for key, run in memory["runs"].items() if run["sent"].get("status", [None])[0] == RUNNING}


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


SOME = {"train.epochs": 20}


def test_a_killed_launch_is_resumed_and_finished_trials_stay(tmp_path: Path) -> None:
    calm = Storage(tmp_path / "calm")
    expected = make_study(calm, k=[0, 4], seeds=[0, 1], tiny=SOME)
    assert run_study(calm, "k", Where(local=True, tracking="none"), QUIET) == 0

    storage = Storage(tmp_path)
    study = make_study(storage, k=[0, 4], seeds=[0, 1], tiny=SOME)
    code = (
        "from pathlib import Path; from rich.console import Console; from ppc.artifacts import Storage;"
        "from ppc.launch import Where, run_study;"
        f"run_study(Storage(Path({str(tmp_path)!r})), 'k', Where(num_cpus=2, max_concurrent=1), Console())"
    )
    with (tmp_path / "log").open("w") as log:
        # Ray's own agents look for their cluster for so long after its death, by default for a minute
        environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env=environment)
    deadline = time.monotonic() + 120
    while sum(row.state == FINISHED for row in read_rows(storage, study)) < 1:
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.1)
    while not any(row.state == RUNNING and row.key in shown_running(storage) for row in read_rows(storage, study)):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    held = rf"is being run by pid {process.pid} on {socket.gethostname()} since (\S+ \S+); "
    with pytest.raises(ValueError, match=held) as refused:
        run_study(storage, "k", Where(local=True, tracking="none"), QUIET)
    (since,) = re.findall(held, str(refused.value))
    since_s = time.mktime(time.strptime(since, "%Y-%m-%d %H:%M:%S"))
    assert psutil.Process(process.pid).create_time() - 1 <= since_s <= time.time()
    children = psutil.Process(process.pid).children(recursive=True)
    agents = [child for child in children if name_of(child).endswith("Agent")]
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone, left = psutil.wait_procs([child for child in children if child not in agents], timeout=30)
    assert gone and not left, "processes of a killed launch live on"
    rows = read_rows(storage, study)
    finished = {row.key: row.attempt for row in rows if row.state == FINISHED}
    assert 1 <= len(finished) < 4 and INTERRUPTED in {row.state for row in rows}
    folders = [storage.trial(key).path for key in finished]
    folders += [storage.stage(s["name"], s["key"]).path for row in rows if row.key in finished for s in row.stages]
    times = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}

    sync_studies(storage, ["k"], None)  # without another launch nothing is left RUNNING
    first = {run.data.tags["ppc.trial_key"]: run for run in child_runs(storage, "k")}
    assert RUNNING not in {run.info.status for run in all_runs(storage, "k")}
    assert {key: run.info.status for key, run in first.items()} == {
        row.key: FINISHED if row.key in finished else "KILLED" for row in rows if row.state != PENDING
    }
    assert run_study(storage, "k", Where(num_cpus=2), QUIET) == 0, "the lock of a killed launch is taken over"
    rows = read_rows(storage, study)
    assert [row.state for row in rows] == [FINISHED] * 4
    assert all(row.attempt == finished[row.key] for row in rows if row.key in finished)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "a finished trial was touched"
    runs = {run.data.tags["ppc.trial_key"]: run for run in child_runs(storage, "k")}
    assert len(child_runs(storage, "k")) == 4 and {run.info.status for run in runs.values()} == {FINISHED}
    assert {key: runs[key].info.run_id for key in first} == {key: run.info.run_id for key, run in first.items()}
    for row, undisturbed in zip(rows, read_rows(calm, expected), strict=True):
        assert row.result is not None and undisturbed.result is not None
        assert row.result["metrics"] == undisturbed.result["metrics"]
    _, left = psutil.wait_procs(agents, timeout=60)
    assert not left, "agents of a killed launch's Ray live on"


STEPS = 2  # an epoch
LONG = {"train.epochs": 100, "runtime.log_every_steps": 1}  # so that no training ends before it is told to


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Metrics of the long trial when nothing happens to it."""
    storage = Storage(tmp_path_factory.mktemp("undisturbed"))
    study = make_study(storage, k=[4], seeds=[0], tiny=LONG)
    assert run_study(storage, "k", Where(local=True, tracking="none"), QUIET) == 0
    (row,) = read_rows(storage, study)
    assert row.result is not None
    return dict(row.result["metrics"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_launch_that_is_told_to_stop_leaves_truthful_states_and_goes_on(
    tmp_path: Path, number: int, undisturbed: dict[str, Any]
) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0], tiny=LONG)
    code = (
        "from pathlib import Path; from rich.console import Console; from ppc.artifacts import Storage;"
        "from ppc.launch import Where, run_study;"
        f"raise SystemExit(run_study(Storage(Path({str(tmp_path)!r})), 'k', Where(num_cpus=2), Console()))"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell does in the background
        )
    folder = storage.stage(*stage_of(read_rows(storage, study)[0], "train_cam")).path
    deadline = time.monotonic() + 120
    while not list((folder / "checkpoints").glob("epoch-*.pt")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(timeout=90) == 1, (tmp_path / "log").read_text()
    gone, left = psutil.wait_procs(children, timeout=20)
    assert gone and not left, "processes of the launch live on"
    assert [row.state for row in read_rows(storage, study)] == ["KILLED"]
    assert [run.info.status for run in child_runs(storage, "k")] == ["KILLED"]
    kept = sorted(path.name for path in (folder / "checkpoints").glob("epoch-*.pt"))
    assert kept, "the checkpoint stays"
    points, _ = read_journal(folder / "journal.jsonl")
    steps, epochs = max(point["step"] for point in points), int(kept[-1][6:11])
    assert steps - STEPS * epochs <= STEPS, "more than one interval of checkpoints (an epoch) is lost"
    assert run_study(storage, "k", Where(local=True, tracking="none"), QUIET) == 0

    (row,) = read_rows(storage, study)
    assert row.result is not None and row.attempt == 2 and row.result["metrics"] == undisturbed


def test_a_second_launch_is_told_who_holds_the_study(tmp_path: Path) -> None:
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
