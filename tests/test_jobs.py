"""Studies as Ray jobs: what is packed, what is refused, and a real head that runs, stops and resumes one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil
import pytest
from ray.job_submission import JobDetails
from typer.testing import CliRunner

from ppc import jobs
from ppc.artifacts import Storage, read_journal
from ppc.cli import app
from ppc.jobs import ask, find_jobs, logs, resubmit, status, stop, submit
from ppc.ledger import FINISHED, KILLED, read_rows
from ppc.pack import LaunchOptions, experiment_files, job_env, packed

ROOT = Path(__file__).parents[1]


def experiment(folder: Path, *, axes: str = "contrast.prototype_top_k: [4]", epochs: int = 1) -> Path:
    """A tiny study `jobs` whose base lies in another folder."""
    (folder / "studies").mkdir(parents=True)
    (folder / "shared").mkdir()
    (folder / "shared" / "root.yaml").write_text("train: {momentum: 0.8}\n")
    (folder / "shared" / "base.yaml").write_text("extends: root.yaml\ntrain: {learning_rate: 0.02}\n")
    file = folder / "studies" / "jobs.yaml"
    file.write_text(
        "name: jobs\nbase: {extends: ../shared/base.yaml}\n"
        f"design: {{kind: grid, axes: {{{axes}}}}}\ntrial_seeds: [0]\ntiny: {{train.epochs: {epochs}}}\n"
    )
    return file


# -- following a log


class Unsteady:
    """Ray's client of a job that prints `abcd`, over a connection that breaks after `ab`."""

    def __init__(self, breaks: int, ends: str) -> None:
        self.breaks, self.ends, self.opened = breaks, ends, 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.opened += 1
        yield "ab"
        if self.opened <= self.breaks:
            raise aiohttp.ClientConnectionError("gone")
        yield "c"

    def get_job_info(self, job_id: str) -> JobDetails:
        told = {"status": self.ends, "message": "why\nmore"}
        return JobDetails(type="SUBMISSION", entrypoint="x", submission_id=job_id, **told)

    def get_job_logs(self, job_id: str) -> str:
        return "abcd"


def server_of(client: Unsteady, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_check_answers", lambda address: None)
    monkeypatch.setattr(jobs, "JobSubmissionClient", lambda address: client)
    monkeypatch.setattr(jobs, "PAUSE_S", 0.0)


@pytest.mark.parametrize(("ends", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 1)])
def test_a_log_goes_on_after_a_broken_connection_and_the_exit_code_is_the_jobs(
    ends: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Unsteady(2, ends)
    server_of(client, monkeypatch)
    ran = CliRunner().invoke(app, ["logs", "ppc-k-1", "-f", "--address", "http://head:8265"])
    assert (ran.exit_code, ran.stdout, client.opened) == (code, "abcd", 3)
    assert ran.stderr == ("" if code == 0 else f"ppc-k-1: {ends} why\n")


def test_a_connection_that_breaks_for_good_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    server_of(client := Unsteady(10**6, "RUNNING"), monkeypatch)
    with pytest.raises(ValueError, match="the log of ppc-k-1 cannot be followed: gone"):
        list(logs("ppc-k-1", "http://head:8265", follow=True))
    assert client.opened == jobs.MAX_BROKEN + 1


# -- the package


def test_the_package_holds_the_code_and_all_that_the_experiment_extends(tmp_path: Path) -> None:
    file = experiment(tmp_path)
    with packed(None, experiment_files(file)) as (folder, names):
        assert names[0] == "experiment/studies/jobs.yaml"
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {p for p in found if not p.startswith("ppc/")} == {
            "experiment/studies/jobs.yaml", "experiment/shared/base.yaml", "experiment/shared/root.yaml",
        }  # fmt: skip
        assert {"ppc/__init__.py", "ppc/cli.py", "ppc/data/__init__.py"} <= found  # ppc/data is code and no data
        assert not any("__pycache__" in name for name in found)
        assert (folder / names[0]).read_text() == file.read_text()
    assert not folder.exists()


def test_a_working_folder_goes_along_without_data_storage_and_environments(tmp_path: Path) -> None:
    file = experiment(tmp_path)
    for name in (
        ".git/config", ".venv/bin/python", "ppc-storage/studies/a.json", "data/img.jpg", "mlruns/x", "a.egg-info/y",
        "__pycache__/z.pyc", "ppc/cli.py", "lists/ids.txt", "lists/data/more.txt",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    with packed(tmp_path, experiment_files(file)) as (folder, names):
        assert names[0] == "studies/jobs.yaml"
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert {p for p in found if not p.startswith("ppc/")} == {
            "studies/jobs.yaml", "shared/base.yaml", "shared/root.yaml", "lists/ids.txt", "lists/data/more.txt",
        }  # fmt: skip
        assert (folder / "ppc/cli.py").read_text() == (ROOT / "ppc/cli.py").read_text()
    with (
        pytest.raises(ValueError, match="not in the folder to pack"),
        packed(tmp_path / "lists", experiment_files(file)),
    ):
        pass


def test_a_package_of_more_than_100_mib_is_refused_with_its_largest_part(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    with (tmp_path / "weights" / "net.pt").open("wb") as handle:
        handle.truncate(101 << 20)
    message = r"10[12] MiB to pack, more than 100 \(largest: weights 101 MiB"
    with pytest.raises(ValueError, match=message), packed(tmp_path, []):
        pass


# -- the environment


def test_the_job_gets_what_it_needs_and_no_secret() -> None:
    here = {"MLFLOW_TRACKING_URI": "https://mlflow.example.org", "MLFLOW_TRACKING_PASSWORD": "x", "HOME": "/home/me"}
    env = job_env(LaunchOptions(env={"NCCL_DEBUG": "INFO"}, code={"commit": "abc"}), here)
    assert env["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org" and env["NCCL_DEBUG"] == "INFO"
    assert env["RAY_JOB_STOP_SIGNAL"] == "SIGINT" and int(env["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert json.loads(env["PPC_CODE"]) == {"commit": "abc"}
    assert env["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert "HOME" not in env and "MLFLOW_TRACKING_PASSWORD" not in env


@pytest.mark.parametrize(
    ("options", "here", "word"),
    [
        (LaunchOptions(env={"AWS_SECRET_ACCESS_KEY": "x"}), {}, "AWS_SECRET_ACCESS_KEY would show"),
        (LaunchOptions(tracking="https://me:pw@mlflow.example.org"), {}, "holds a user or password"),
        (LaunchOptions(), {"MLFLOW_TRACKING_URI": "https://me:pw@mlflow.example.org"}, "holds a user or password"),
        (LaunchOptions(), {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}, "pass --tracking"),
        (LaunchOptions(), {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, "pass --tracking"),
    ],
)
def test_an_environment_that_leaks_or_means_another_place_is_refused(
    options: LaunchOptions, here: dict[str, str], word: str
) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        job_env(options, here)
    assert "pw" not in str(caught.value)


def test_a_loopback_server_is_passed_when_it_is_asked_for() -> None:
    options = LaunchOptions(tracking="http://127.0.0.1:5000")
    assert "MLFLOW_TRACKING_URI" not in job_env(options, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"})
    assert options.words() == ["--tracking", "http://127.0.0.1:5000"]


# -- what is refused before anything is sent


@pytest.mark.parametrize("storage", ["ppc-storage", "s3://key:secret@bucket/ppc"])
def test_a_storage_that_the_cluster_cannot_use_is_refused(tmp_path: Path, storage: str) -> None:
    with pytest.raises(ValueError, match=r"storage (ppc-storage is a folder of this machine|s3://bucket/ppc holds)"):
        submit(experiment(tmp_path), "http://127.0.0.1:9", storage=storage, options=LaunchOptions(twin="tiny"))


def test_relative_paths_of_data_and_weights_are_refused(tmp_path: Path) -> None:
    sets = ["data.name=voc", "data.root=VOC2012"]
    with pytest.raises(ValueError, match=r"data.root: VOC2012 .* --set data.root=/shared/VOC2012"):
        submit(experiment(tmp_path), "http://127.0.0.1:9", storage="/s", options=LaunchOptions(sets=sets))
    sets = ["stages=[train_cam, make_seeds, refine_crf, train_seg, predict_seg, evaluate]"]
    sets += ["segmentation.backbone.name=resnet50", "segmentation.backbone.weights=made.pth"]
    with pytest.raises(ValueError, match=r"segmentation.backbone.weights: made.pth means another file on every node"):
        submit(tmp_path / "studies" / "jobs.yaml", "http://127.0.0.1:9", storage="/s", options=LaunchOptions(sets=sets))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def other_server() -> Iterator[tuple[type[BaseHTTPRequestHandler], str]]:
    """A server that is not Ray's; tests set what it answers."""

    class Handler(BaseHTTPRequestHandler):
        code, body = 200, b"{}"

        def do_GET(self) -> None:
            self.send_response(self.code)
            self.end_headers()
            self.wfile.write(self.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head:8265", "http://head:8265/jobs"])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="looks like http://HEAD:8265"):
        find_jobs(address)


def test_an_address_where_nothing_answers_is_one_error_with_a_remedy() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"no job server answers at http://127.0.0.1:\d+.*ssh -N -L 8265"):
        find_jobs(f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("code", "body", "word"),
    [
        (404, b"", "not as Ray's job server .HTTP 404"),
        (200, b"OK", "not as Ray's job server"),
        (200, b'{"version": "4"}', "not as Ray's job server"),
        (200, b'{"ray_version": "2.40.0"}', "the cluster runs Ray 2.40.0, this machine 2"),
        (401, b"Unauthorized", "wants a token: export RAY_AUTH_MODE=token"),
    ],
)
def test_a_server_that_cannot_be_used_is_said_to_be_so(
    other_server: tuple[type[BaseHTTPRequestHandler], str], code: int, body: bytes, word: str
) -> None:
    handler, address = other_server
    handler.code, handler.body = code, body  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=word):
        find_jobs(address)


# -- a real head


class Head(NamedTuple):
    """A running head: its job server, and Ray's folder."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def running_head() -> Iterator[Head]:
    """The head of cluster/local/start.sh with a temporary folder of its own."""
    temporary = Path(tempfile.mkdtemp(prefix="ppc-"))  # short: Ray's sockets lie in it
    port = free_port()
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1", "PPC_RAY_PORT": "0", "PPC_DASHBOARD_PORT": str(port),
    }  # fmt: skip
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    command = [str(ROOT / "cluster/local/start.sh"), "--num-cpus", "2", "--temp-dir", str(temporary)]
    with (temporary / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--dashboard-agent-listen-port", "0"],
            env=environment,
            stdout=log,
            stderr=log,
            # as for a head that a script starts in the background: a stop has to work there too
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert process.poll() is None, (temporary / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield Head(address, temporary)
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        psutil.wait_procs(family[1:], timeout=10)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def head(running_head: Head) -> str:
    """The address of a real job server."""
    return running_head.url


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the user's environment reaches a job; and an address in it must not win over ours."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_a_study_is_submitted_followed_stopped_in_the_middle_and_taken_up(head: str, tmp_path: Path) -> None:
    file, storage = experiment(tmp_path / "files", epochs=200), Storage(tmp_path / "storage")
    options = LaunchOptions(twin="tiny", tracking="none", sets=["data.scenes.seed=3"])
    first = submit(file, head, storage=str(storage.root), options=options)
    assert first == "ppc-jobs-tiny-1"
    pieces: list[str] = []
    follower = threading.Thread(target=lambda: pieces.extend(logs(first, head, follow=True)))
    follower.start()
    while not (journals := list(storage.root.glob("stages/train_cam/*/journal.jsonl"))):
        assert not status(first, head).ended, "".join(pieces)
        time.sleep(0.1)
    with pytest.raises(ValueError, match=r"jobs-tiny is being run by ppc-jobs-tiny-1; .*ppc study stop jobs-tiny"):
        submit(file, head, storage=str(storage.root), options=options)

    start = time.monotonic()
    stopped = stop(first, head)
    assert stopped.status == "STOPPED" and time.monotonic() - start < 60
    follower.join(timeout=30)
    assert not follower.is_alive()
    said = "".join(pieces)
    assert "study jobs-tiny: 1 trials (1 pending); 1 to run" in said
    assert "run what is missing: ppc study resume jobs-tiny" in said, "it was killed and did not end by itself"
    assert "".join(logs(first, head)) == said
    study = storage.study("jobs-tiny").definition()
    (row,) = read_rows(storage, study)
    assert row.state == KILLED and row.result is None and row.attempt == 1
    before, _ = read_journal(journals[0])

    answer, code = command(head, "study", "status", "jobs-tiny")  # the storage is known from the first
    assert code == 0 and "jobs-tiny: 1 " in answer and "study list" not in answer
    sent, code = command(head, "study", "resume", "jobs-tiny", "--tracking", "none", "--set", "runtime.max_failures=3")
    second = "ppc-jobs-tiny-2"
    assert code == 0 and sent.startswith(f"{second}\nfollow it: ppc logs {second} -f --address {head}")
    said = "".join(logs(second, head, follow=True))
    assert status(second, head).status == "SUCCEEDED", said
    (row,) = read_rows(storage, study)
    assert row.state == FINISHED and row.attempt == 2
    points, _ = read_journal(journals[0])
    steps = [point["step"] for point in points]
    assert steps == sorted(set(steps)) and len(steps) > len(before) > 0
    assert points[: len(before)] == before, "the second launch trained again what the first had"
    assert [job.id for job in find_jobs(head, "jobs-tiny")] == [first, second]
    assert storage.trial(row.key).state()["runtime"]["max_failures"] == 3 != row.config["runtime"]["max_failures"]
    answer, code = command(head, "study", "list", "--json")
    (found,) = json.loads(answer)
    assert code == 0 and found["study"] == "jobs-tiny" and found["trials"] == {"FINISHED": 1}
    assert found["cpu_hours"] > 0 and found["gpu_hours"] == 0 and found["best_mean"] is not None
    answer, code = command(head, "report", "jobs-tiny")
    assert code == 0 and "metric: mask_miou_train" in answer


def command(head: str, *words: str) -> tuple[str, int]:
    """What the command line prints with a job server as its address, as on a laptop; and its exit status."""
    ppc = Path(sys.executable).with_name("ppc")
    done = subprocess.run([ppc, *words, "--address", head], capture_output=True, text=True, timeout=200)
    assert not done.stderr, done.stderr
    return done.stdout, done.returncode


@pytest.mark.parametrize("late", [False, True])
def test_an_answer_is_whole_wherever_ray_writes_its_own_line(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Head:
        entry = ""

        def __init__(self, address: str) -> None:
            pass

        def post(self, entry: str, *rest: object) -> str:
            Head.entry = entry
            return "j1"

        def follow(self, job_id: str) -> Iterator[str]:
            told = f"Running entrypoint for job j1: {self.entry}\n"
            yield "Runtime env is setting up.\n" + told * (not late)
            yield "ppc-answer\none\n"
            yield told[: 20 * late]
            yield told[20:] * late + "two\nthree"

        def job(self, job_id: str) -> jobs.Job:
            return jobs.Job("j1", "none", "FAILED", "/s", "", 3, 0)

    monkeypatch.setattr(jobs, "_Server", Head)
    said: list[str] = []
    assert ask("none", "http://h:1", ["ppc", "x y"], storage="/s", say=said.append) == ("one\ntwo\nthree", 3)
    assert "".join(said) == "one\ntwo\nthree" and Head.entry == "echo ppc-answer; exec ppc 'x y' --storage /s"


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_the_head_answers_questions_with_the_code_that_was_sent(head: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import ppc, sys; print(ppc.__file__); sys.exit(3)"]
    answer, code = ask("none", head, command, storage=str(tmp_path))
    assert code == 3
    assert "working_dir_files" in answer and answer.strip().endswith("ppc/__init__.py")
    with pytest.raises(ValueError, match=r"no job ppc-jobs-9 at http://127.0.0.1:\d+; the last ones there: "):
        status("ppc-jobs-9", head)
    with pytest.raises(ValueError, match="has launched no study absent since it started; pass --storage"):
        resubmit("absent", head)


@pytest.mark.ray
@pytest.mark.parametrize(("wanted", "code", "word"), [(1, 0, "1 node(s) at"), (2, 1, "1 of 2 nodes joined")])
def test_the_slurm_script_counts_the_nodes_of_a_real_cluster(
    running_head: Head, wanted: int, code: int, word: str
) -> None:
    text = (ROOT / "cluster/slurm/ppc.sbatch").read_text().partition("<<'PYTHON'\n")[2].partition("\nPYTHON\n")[0]
    address = (running_head.folder / "ray_current_cluster").read_text().strip()
    command = [sys.executable, "-", address, str(wanted), "3"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address}
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and word in done.stdout + done.stderr
