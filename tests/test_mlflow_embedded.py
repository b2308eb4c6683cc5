"""The storage's own MLflow server: found or started, tied to who started it, and never in a launch's way."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from fake_study import FakeStudy
from tiny_study import make_study

from ppc import mlflow_embedded, tracking
from ppc.artifacts import Storage
from ppc.exposure import reached_at
from ppc.mlflow_embedded import LaunchServer, running, server_of_launch, start_ui
from ppc.mlflow_server import artifact_place, default_database, default_uri, experiment_id, made_ms, server_version
from ppc.mlflow_views import study_link
from ppc.places import read_bytes
from ppc.tracking import make_tracker

pytest.importorskip("mlflow")
from mlflow.tracking._tracking_service import utils  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making its schema takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking._client(f"sqlite:///{path}")
    return path


@pytest.fixture
def fake(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStudy:
    """A study of which the tracker has sent a trial."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "storage" / "mlflow").mkdir(parents=True)
    shutil.copy(template, tmp_path / "storage" / "mlflow" / "mlflow.db")
    study = FakeStudy(tmp_path / "storage")
    study.finish(0, 0.5)
    make_tracker(None, study.storage, study.study, "001").sync(study.rows)
    return study


def until(true: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def gone(processes: list[psutil.Process]) -> bool:
    return not any(alive(process) for process in processes)


LAUNCH = """
import sys
from pathlib import Path
from rich.console import Console
from ppc.artifacts import Storage
from ppc.launch import Where, run_study
run_study(Storage(Path(sys.argv[1])), "k", Where(local=True, ui=True), Console(soft_wrap=True))
"""


@pytest.mark.slow
def test_a_launch_has_a_server_that_a_kill_takes_along(tmp_path: Path, template: Path) -> None:
    storage = Storage(tmp_path)
    default_database(storage).parent.mkdir()
    shutil.copy(template, default_database(storage))
    study = make_study(storage, k=[4], seeds=[0], tiny={"train.epochs": 3000})
    (key,) = [s["key"] for s in study["trials"][0]["stages"] if s["name"] == "train_cam"]
    env = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with (tmp_path / "out").open("wb") as out:
        launch = subprocess.Popen([sys.executable, "-c", LAUNCH, str(tmp_path)], env=env, stdout=out, stderr=out)
    processes: list[psutil.Process] = []
    try:
        said = tmp_path / "out"
        assert until(lambda: "MLflow: http" in said.read_text() or launch.poll() is not None, 120), said.read_text()
        links = [line for line in said.read_text().splitlines() if line.startswith("MLflow: ")]
        number = experiment_id(storage, "k", default_uri(storage))
        (link,) = links
        url, by = running(storage) or ("", "")
        assert link == f"MLflow: {study_link(url, number, server_version(url))}" and by == "launch"
        assert f"/#/experiments/{number}/runs?" in link and "viewStateShareKey=ppc-results" in link
        port = urlsplit(url).port
        assert port is not None and reached_at(port) == [], "it listens at loopback only"
        assert storage.stage("train_cam", key).path.joinpath("journal.jsonl").stat().st_size > 0, "training waited"
        heard: list[str] = []
        with LaunchServer(storage, "k", heard.append):  # of a second launch
            assert until(lambda: heard, 20) and heard == [link]
        assert running(storage) == (url, "launch"), "who only found it does not end it"
        children = [p for p in family(launch.pid)[1:] if "tether.py" in command(p)]
        processes = [p for child in children for p in family(child.pid)]
        assert len(processes) >= 3, "tether, mlflow and its worker"
        launch.kill()
        launch.wait()
        assert until(lambda: gone(processes), 20), processes
        assert running(storage) is None
    finally:
        launch.kill()
        launch.wait()
        for process in processes:
            if process.is_running():
                process.kill()


@pytest.mark.slow
def test_a_launch_ends_its_server_and_takes_another_port_than_one_in_use(
    fake: FakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    before = family(os.getpid())  # other tests leave multiprocessing's resource tracker, for one
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(mlflow_embedded, "PORT", other.getsockname()[1])
        with server_of_launch(None, fake.storage, "demo", said.append):
            assert until(lambda: said, 120)
            url, _ = running(fake.storage) or ("", "")
            assert said[0].startswith(f"MLflow: {url}/#/experiments/") and str(other.getsockname()[1]) not in url
            mine = [process for process in family(os.getpid()) if process not in before]
            made = default_database(fake.storage).rename(fake.storage.root / "kept.db")
            assert running(fake.storage) is None, "it serves a database that is not the storage's any more"
            made.rename(default_database(fake.storage))
            assert running(fake.storage) is not None
    assert mine and gone(mine) and len(said) == 1
    assert running(fake.storage) is None and not list(fake.storage.root.glob("mlflow/server-*.json"))


def test_a_tracker_that_the_user_names_gets_no_server(fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("none", "http://127.0.0.1:1", "sqlite:////x.db"):
        assert not isinstance(server_of_launch(option, fake.storage, "demo", print), LaunchServer)
    assert isinstance(server_of_launch(None, fake.storage, "demo", print), LaunchServer)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert not isinstance(server_of_launch(None, fake.storage, "demo", print), LaunchServer)


def test_a_server_that_does_not_come_up_costs_a_line(fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    broken = [sys.executable, "-c", "import sys; print('no room'); sys.exit(3)"]
    monkeypatch.setattr(mlflow_embedded, "ui_command", lambda *rest: (broken, {}))
    with LaunchServer(fake.storage, "demo", said.append):
        assert until(lambda: said, 30)
    (line,) = said
    assert "ended with status 3" in line and "the study goes on" in line and "\n" not in line


@pytest.mark.parametrize("deaf", [False, True], ids=["", "deaf to SIGTERM"])
def test_a_launch_that_ends_first_leaves_nothing(deaf: bool, fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    code = "import os, signal, subprocess, sys, time;"
    code += f"signal.signal(signal.SIGTERM, signal.{'SIG_IGN' if deaf else 'SIG_DFL'});"
    code += "subprocess.Popen(['sleep', '600']); time.sleep(600)"
    monkeypatch.setattr(mlflow_embedded, "ui_command", lambda *rest: ([sys.executable, "-c", code], {}))
    before = family(os.getpid())
    with LaunchServer(fake.storage, "demo", said.append):
        assert until(lambda: any(p.name() == "sleep" for p in family(os.getpid())), 30)
        started = [p for p in family(os.getpid()) if p not in before]
    assert len(started) == 3 and gone(started) and said == []


def test_a_launch_whose_tracker_has_nothing_yet_starts_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    start = time.monotonic()
    with LaunchServer(Storage(tmp_path), "demo", said.append):
        pass
    assert said == [] and time.monotonic() - start < 5
    assert made_ms(default_database(Storage(tmp_path))) is None and list(tmp_path.iterdir()) == []


def test_a_port_that_is_named_and_taken_is_an_error(fake: FakeStudy) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ValueError, match="--port"):
            start_ui(fake.storage, port=other.getsockname()[1])


def test_a_moved_storage_keeps_its_artifacts_and_adds_to_them(fake: FakeStudy) -> None:
    before = fake.storage.root
    after = Storage(before.with_name("new place"))
    before.rename(after.root)
    client = tracking._client(default_uri(after))
    (experiment,) = client.search_experiments(filter_string="name = 'ppc/demo'")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ppc.kind` = 'trial'")
    fake.storage = after
    utils._artifact_repos_cache.clear()  # of this process, which saw the storage where it was
    fake.finish(1, 0.75)
    make_tracker(None, after, fake.study, "002").sync(fake.rows)
    assert not before.exists(), "nothing was written to where it was"
    assert client.get_experiment(experiment.experiment_id).artifact_location == artifact_place(after, "demo")
    runs = client.search_runs([experiment.experiment_id], "tags.`ppc.kind` = 'trial'")
    assert len(runs) == 2
    for one in runs:
        path = Path(client.download_artifacts(one.info.run_id, "config.yaml"))
        assert b"prototype_top_k" in read_bytes(path)
    again = client.get_run(run.info.run_id)
    assert again.info.artifact_uri == f"{artifact_place(after, 'demo')}/{run.info.run_id}/artifacts"
