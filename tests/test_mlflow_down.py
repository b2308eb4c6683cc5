"""An MLflow server that is absent, silent, killed and stopped while a study trains: no step waits, no point is lost."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_study import FakeStudy
from tiny_study import QUIET, make_study

import ppc.launch
import ppc.train
from ppc.artifacts import Storage, read_journal
from ppc.launch import Where, run_study
from ppc.ledger import FINISHED, read_rows
from ppc.mlflow_embedded import any_port
from ppc.sync_loop import SyncLoop
from ppc.tracking import MlflowTracker

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TO_WAIT_S = 1.0  # longest that a step may wait, beyond what any step takes
EVERY = 10  # steps a point of the journal


class Server:
    """A real MLflow server that can be killed, stopped and started again with all that it had."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = any_port("127.0.0.1"), folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: psutil.Popen | None = None

    def start(self) -> None:
        words = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self._process = psutil.Popen(words, env={**os.environ, **quiet}, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def send(self, number: int) -> None:
        """Send a signal to all of its processes."""
        assert self._process is not None
        for process in [*self._process.children(recursive=True), self._process]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait(30)

    def end(self) -> None:
        if self._process is not None and self._process.is_running():
            self.send(signal.SIGCONT)
            self.send(signal.SIGKILL)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    folder = tmp_path / "server"
    folder.mkdir()
    made = Server(folder)
    yield made
    made.end()


@contextmanager
def silent(port: int) -> Iterator[None]:
    """Something that takes connections at a port and says nothing."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        yield


def journal(storage: Storage, study: dict[str, Any]) -> list[dict[str, Any]]:
    (row,) = read_rows(storage, study)
    return read_journal(storage.stage("train_cam", row.stages[0]["key"]) / "journal.jsonl")[0]


def disturb(server: Server, storage: Storage, study: dict[str, Any], down_s: float, done: list[str]) -> None:
    """What happens to the server while the study trains."""

    def trained(points: int) -> None:
        wanted = len(journal(storage, study)) + points
        while len(journal(storage, study)) < wanted:
            time.sleep(0.05)

    trained(3)  # down at launch
    done.append("absent")
    with silent(server.port):
        trained(5)
        time.sleep(3)
    done.append("silent")
    server.start()
    trained(5)
    time.sleep(4)
    server.send(signal.SIGKILL)
    time.sleep(down_s)
    done.append("killed")
    server.start()
    trained(3)
    server.send(signal.SIGSTOP)
    time.sleep(5)
    server.send(signal.SIGCONT)
    done.append("stopped")


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, a twentieth of a second later: a step takes at least that on any machine."""

    def later(*words: Any) -> Any:
        time.sleep(0.05)
        return function(*words)

    return later


@pytest.mark.parametrize("down_s", [2.0, pytest.param(60.0, marks=pytest.mark.soak)])
def test_a_study_trains_on_and_every_point_arrives_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, down_s: float
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(ppc.launch, "SyncLoop", partial(SyncLoop, every_s=0.5, longest_wait_s=1.0))
    storage = Storage(tmp_path / "storage")
    steps = int(43 + down_s) * 20
    monkeypatch.setattr(ppc.train, "set_lr", slow(ppc.train.set_lr))
    runtime = {"log_every_steps": EVERY, "checkpoint_every_epochs": 500}
    stages = ["train_cam", "make_seeds", "evaluate"]
    study = make_study(
        storage, k=[4], seeds=[0], runtime=runtime, metric="seed_miou_train",
        tiny={"train.epochs": steps // 2, "runtime.log_every_steps": EVERY, "stages": stages},
    )  # fmt: skip
    done: list[str] = []
    disturber = threading.Thread(target=disturb, args=(server, storage, study, down_s, done), daemon=True)
    disturber.start()
    assert run_study(storage, "k", Where(local=True, tracking=server.uri), QUIET) == 0
    still_training = not disturber.is_alive()
    disturber.join(60)
    assert done == ["absent", "silent", "killed", "stopped"] and still_training, "the training was too short"

    (row,) = read_rows(storage, study)
    assert row.state == FINISHED
    points = journal(storage, study)
    gaps_s = [(b["t"] - a["t"]) / 1000 for a, b in zip(points, points[1:], strict=False)]
    assert max(gaps_s) < 2 * statistics.quantiles(gaps_s, n=20)[-1] + TO_WAIT_S

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("ppc/k")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ppc.kind` = 'trial'")
    assert run.info.status == "FINISHED"
    for name in points[0]["m"]:
        sent = client.get_metric_history(run.info.run_id, name)
        assert sorted((m.step, m.value) for m in sent) == [(p["step"], pytest.approx(p["m"][name])) for p in points]


def test_a_run_that_is_made_after_its_request_was_given_up_is_no_second_run(tmp_path: Path, server: Server) -> None:
    """A stopped server holds the request that makes a run, and carries it out when it goes on."""
    from mlflow.tracking import MlflowClient

    fake = FakeStudy(tmp_path / "storage")
    fake.finish(0, 0.5)
    server.start()
    tracker = MlflowTracker(server.uri, fake.storage, fake.study, "001")
    tracker.sync([])  # makes the experiment and the launch's run
    make = tracker._mlflow.create_run

    def stopped(*words: Any) -> Any:
        server.send(signal.SIGSTOP)
        return make(*words)

    tracker._mlflow.create_run = stopped
    with pytest.raises(Exception, match="No MLflow|no MLflow|timed out|Timeout|answer"):
        tracker.sync(fake.rows)
    server.send(signal.SIGCONT)
    tracker.sync(fake.rows)
    time.sleep(2)
    tracker.sync(fake.rows, final=True)
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("ppc/demo")
    runs = client.search_runs([experiment.experiment_id], "tags.`ppc.kind` = 'trial'")
    finished = [row for row in fake.rows if row.state != "PENDING"]
    assert len(runs) == len({run.data.tags["ppc.trial_key"] for run in runs}) == len(finished)
    assert {run.info.status for run in runs} == {"FINISHED"}
