"""Storage that fills up, becomes read-only, is damaged or goes away while a study runs: real mounts, a real server."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from s3_server import BUCKET, Gate, s3_server
from tiny_study import QUIET, make_study

import ppc.places
import ppc.trial
from ppc.artifacts import Journal, Storage
from ppc.config import RuntimeConfig, TrialConfig
from ppc.faults import StorageError
from ppc.launch import Where, run_study
from ppc.ledger import FAILED, FINISHED, INTERRUPTED, TrialRow, read_rows
from ppc.locks import locked
from ppc.places import StoragePath, atomic_write, is_remote, read_bytes, remove, size_of, storage_path
from ppc.runtime import LocalRuntime, MapFunction
from ppc.trial import run_trial

# The warnings of Ray are not ours.
pytestmark = [pytest.mark.filterwarnings("ignore")]

HERE = Where(local=True, tracking="none")
LONG = {"train.epochs": 24}  # so that no training ends before something happens to it
STAGES = ["train_cam", "make_seeds", "refine_crf", "evaluate"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """A study of two trials to which nothing happened."""
    storage = Storage(tmp_path_factory.mktemp("undisturbed"))
    make_study(storage, k=[0, 4], seeds=[0], tiny=LONG)
    assert run_study(storage, "k", HERE, QUIET) == 0
    return storage


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here, it needs root: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of a few MB."""
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount` here")
    path = tmp_path / "disk"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", str(path))
    try:
        yield path
    finally:
        while path.is_mount():
            subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path) -> None:
    """Leave no free byte on the disk."""
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        size = 1 << 20
        while size >= 512:
            try:
                ballast.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                size //= 2


def begun(whole: Storage, root: Path) -> Storage:
    """A copy of the study at `root` in which only the first of the two trials has run."""
    shutil.copytree(whole.root, root, dirs_exist_ok=True)
    storage = Storage(root)
    _, second = rows_of(storage)
    for path in (storage.trial(second.key).path, *(storage.stage(s["name"], s["key"]).path for s in second.stages)):
        shutil.rmtree(path)
    return storage


def rows_of(storage: Storage) -> list[TrialRow]:
    return read_rows(storage, storage.study("k").definition())


def stage_of(storage: Storage, row: TrialRow, name: str) -> StoragePath:
    return storage.stage(name, next(s["key"] for s in row.stages if s["name"] == name)).path


def metrics(row: TrialRow) -> dict[str, float]:
    assert row.result is not None, row.state
    return dict(row.result["metrics"])


def stamps(storage: Storage, row: TrialRow) -> dict[str, int]:
    """When each file of a trial and of its stages was last written."""
    folders = [storage.trial(row.key).path, *(storage.stage(s["name"], s["key"]).path for s in row.stages)]
    files = [path for folder in folders for path in Path(folder).rglob("*") if not path.name.startswith(".")]
    return {str(path): path.stat().st_mtime_ns for path in files if path.is_file()}


class Launch:
    """`ppc study resume k` in a process of its own."""

    def __init__(self, storage: Storage, log: Path, *words: str) -> None:
        self.log = log
        code = "from ppc.cli import main; main()"
        if is_remote(storage.root):  # each of five tries more takes time
            code = f"from s3fs import S3FileSystem; S3FileSystem.retries = 1; {code}"
        command = [sys.executable, "-c", code, "study", "resume", "k", "--storage", str(storage.root), *words]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)

    def wait_for(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def ended(self, meanwhile: Callable[[], None] = lambda: None) -> int:
        deadline = time.monotonic() + 120
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            meanwhile()
            time.sleep(0.01)
        return self.process.returncode

    @property
    def text(self) -> str:
        return self.log.read_text()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(storage: Storage, *words: str) -> Launch:
        started.append(Launch(storage, tmp_path / f"log-{len(started)}", *words))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def checkpoints_of(storage: Storage, row: TrialRow) -> list[Path]:
    return sorted(Path(stage_of(storage, row, "train_cam")).glob("checkpoints/epoch-*.pt"))


def one_clear_error(text: str, words: str) -> None:
    """The fault is said once, at the end, with its remedy, and no traceback."""
    (line,) = [line for line in text.splitlines() if line.startswith("storage: ")]
    assert words in line and "then resume: what is finished is kept" in line
    assert "Traceback" not in text, text


# -- a disk that takes nothing any more


def test_a_disk_that_fills_up_in_training_costs_no_more_than_an_epoch(
    disk: Path, undisturbed: Storage, launch: Callable[..., Launch], capsys: pytest.CaptureFixture[str]
) -> None:
    storage = begun(undisturbed, disk)
    first, second = rows_of(storage)
    before = stamps(storage, first)
    run = launch(storage, "--local")
    run.wait_for(lambda: len(checkpoints_of(storage, second)) >= 2)
    assert run.ended(lambda: fill(disk)) == 1
    one_clear_error(run.text, "No space left on device; free space there")
    assert f"not written: {stage_of(storage, second, 'train_cam')}" in run.text
    assert "at work" not in run.text, "nothing that could not say its last word counts as running"
    row = rows_of(storage)[1]
    assert row.state in (FAILED, INTERRUPTED), "as far as a full disk can tell"
    assert not list(disk.rglob("*.part")), "nothing half written is left on it"

    (disk / "ballast").unlink()
    *_, previous, newest = checkpoints_of(storage, second)
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert run_study(storage, "k", HERE, QUIET) == 0
    said = capsys.readouterr().out
    assert said.count(f"checkpoint {newest} is damaged") == said.count("is damaged") == 1
    assert [metrics(row) for row in rows_of(storage)] == [metrics(row) for row in rows_of(undisturbed)]
    assert stamps(storage, first) == before, "what was finished is not touched"
    assert previous.name < newest.name


def test_a_disk_that_becomes_read_only_stops_the_study_and_a_resume_ends_it(
    disk: Path, undisturbed: Storage, launch: Callable[..., Launch]
) -> None:
    storage = begun(undisturbed, disk)
    first, second = rows_of(storage)
    before = stamps(storage, first)
    run = launch(storage, "--local", "--max-concurrent", "2")  # a trial in a process of its own
    run.wait_for(lambda: len(checkpoints_of(storage, second)) >= 1)
    # Linux makes no file system read-only in which a file is open for writing: this goes on top of it
    mount("--bind", str(disk), str(disk))
    mount("-o", "remount,bind,ro", str(disk))
    with pytest.raises(OSError, match="Read-only"):
        (disk / "probe").touch()
    assert run.ended() == 1
    one_clear_error(run.text, "Read-only file system; make it writable again")
    assert rows_of(storage)[1].state == INTERRUPTED, "no last word could be written, and no process is behind it"
    assert "report: " not in run.text and "prototype_top_k=4  -" in run.text, "the table is printed all the same"

    subprocess.run(["umount", str(disk)], check=True)
    assert run_study(storage, "k", HERE, QUIET) == 0
    assert [metrics(row) for row in rows_of(storage)] == [metrics(row) for row in rows_of(undisturbed)]
    assert stamps(storage, first) == before
    assert rows_of(storage)[1].attempt == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_disk_under_ray_is_said_once_by_the_launch(
    disk: Path, undisturbed: Storage, launch: Callable[..., Launch]
) -> None:
    storage = begun(undisturbed, disk)
    first, second = rows_of(storage)
    before = stamps(storage, first)
    run = launch(storage, "--num-cpus", "2", "--tracking", "none")
    run.wait_for(lambda: len(checkpoints_of(storage, second)) >= 1)
    assert run.ended(lambda: fill(disk)) == 1
    one_clear_error(run.text, "No space left on device; free space there")
    assert rows_of(storage)[1].state in (FAILED, INTERRUPTED) and checkpoints_of(storage, second)
    assert stamps(storage, first) == before

    (disk / "ballast").unlink()
    assert run_study(storage, "k", HERE, QUIET) == 0
    assert [metrics(row) for row in rows_of(storage)] == [metrics(row) for row in rows_of(undisturbed)]


class WaitingRuntime(LocalRuntime):
    """The local runtime, which calls something of the test's before its first `map`."""

    def __init__(self, first: Callable[[], None]) -> None:
        super().__init__()
        self.calls = [first]

    def map(
        self, function: MapFunction, shared: Any, items: Sequence[Any], cfg: RuntimeConfig,
        done: Callable[[int, Any], None], *, use_gpu: bool = False,
    ) -> None:  # fmt: skip
        if self.calls:
            self.calls.pop()()
        super().map(function, shared, items, cfg, done, use_gpu=use_gpu)


def test_a_trial_outlives_a_disk_that_is_full_for_a_while(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ppc.trial, "HEARTBEAT_S", 0.02)
    storage = Storage(disk)
    entry = make_study(storage, k=[4], seeds=[0])["trials"][0]
    beats: list[Any] = []

    def full() -> None:
        fill(disk)
        time.sleep(0.5)
        beats.append(storage.trial(entry["key"]).state()["heartbeat_ms"])
        (disk / "ballast").unlink()
        deadline = time.monotonic() + 20
        while storage.trial(entry["key"]).state()["heartbeat_ms"] == beats[0]:
            assert time.monotonic() < deadline, "the heart does not beat again"
            time.sleep(0.01)

    stages = [(stage["name"], stage["key"]) for stage in entry["stages"]]
    run_trial(TrialConfig.model_validate(entry["config"]), entry["key"], stages, storage, WaitingRuntime(full))
    said = capsys.readouterr().out
    assert beats and said.count("heartbeat of trial") == said.count("No space left on device") == 1
    assert storage.trial(entry["key"]).state()["state"] == FINISHED


def test_a_report_that_cannot_be_written_is_printed_and_said(disk: Path, undisturbed: Storage) -> None:
    storage = Storage(disk)
    shutil.copytree(undisturbed.root, disk, dirs_exist_ok=True)
    report = Path(storage.study("k").path) / "report"
    mount("--bind", str(report), str(report))
    mount("-o", "remount,bind,ro", str(report))
    out = io.StringIO()
    try:
        assert run_study(storage, "k", HERE, Console(file=out, width=300)) == 1
    finally:
        subprocess.run(["umount", str(report)], check=True)
    one_clear_error(out.getvalue(), f"not written: {report / 'report.md'}: Read-only file system")
    assert "prototype_top_k=4" in out.getvalue()
    assert run_study(storage, "k", HERE, QUIET) == 0


@pytest.mark.parametrize("write", ["checkpoint", "text", "journal", "lock"])
def test_whatever_is_written_the_error_names_it(disk: Path, write: str) -> None:
    path = disk / "folder" / "file"
    path.parent.mkdir()
    journal = Journal(disk / "journal.jsonl")
    fill(disk)
    with pytest.raises(StorageError) as caught:
        if write == "checkpoint":
            with atomic_write(path) as handle:
                torch.save({"net": torch.zeros(100_000)}, handle)
        elif write == "text":
            with atomic_write(path, "w") as handle:
                handle.write("x" * 100_000)
        elif write == "journal":
            path = journal.path
            for step in range(1, 10_000):
                journal.write(step, {"a": 1.0})
        else:
            mount("--bind", str(disk), str(disk))
            mount("-o", "remount,bind,ro", str(disk))
            with locked(path):
                pass
    journal.close()
    number = errno.EROFS if write == "lock" else errno.ENOSPC
    assert caught.value.errno == number and caught.value.filename == str(path)
    assert str(caught.value).startswith(f"not written: {path}: {os.strerror(number)}; ")
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".part"] == []


# -- files that are half there


def halve(path: StoragePath) -> None:
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])


def test_what_is_half_written_is_done_again_and_nothing_else(tmp_path: Path, undisturbed: Storage) -> None:
    storage = Storage(tmp_path)
    shutil.copytree(undisturbed.root, tmp_path, dirs_exist_ok=True)
    first, second = rows_of(storage)
    trial, seeds = storage.trial(second.key), stage_of(storage, second, "make_seeds")
    untouched = [stamps(storage, first), stamps(storage, second)]
    for path in (trial.path / "state.json", trial.path / "result.json", seeds / "manifest.json"):
        halve(path)
    assert [row.state for row in rows_of(storage)] == [FINISHED, "PENDING"]
    assert run_study(storage, "k", HERE, QUIET) == 0
    assert [metrics(row) for row in rows_of(storage)] == [metrics(row) for row in rows_of(undisturbed)]
    result = trial.result()
    assert result is not None
    assert [s["name"] for s in result["stages"] if not s["reused"]] == ["make_seeds"]
    assert stamps(storage, first) == untouched[0]
    changed = {path for path, at in stamps(storage, second).items() if untouched[1].get(path) != at}
    again = {Path(path).relative_to(seeds).parts[0] for path in changed if Path(path).is_relative_to(seeds)}
    assert again == {"manifest.json", "progress.json", "seeds", "overlays"}, "CAMs that are whole are kept"
    assert {Path(path).parent for path in changed if not Path(path).is_relative_to(seeds)} == {Path(trial.path)}


def test_a_half_written_study_is_one_error_and_launching_it_again_repairs_it(
    tmp_path: Path, undisturbed: Storage
) -> None:
    storage = Storage(tmp_path)
    shutil.copytree(undisturbed.root, tmp_path, dirs_exist_ok=True)
    definition, before = storage.study("k").definition(), [stamps(storage, row) for row in rows_of(storage)]
    path = storage.study("k").path / "study.json"
    halve(path)
    with pytest.raises(ValueError, match=f"^{path} is damaged; launch its file again"):
        run_study(storage, "k", HERE, QUIET)
    assert run_study(storage, "k", HERE, QUIET, definition) == 0
    assert [stamps(storage, row) for row in rows_of(storage)] == before, "nothing was run again"


# -- a store that refuses, or goes away


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gate]:
    """The way to an S3 server; clients of this process and of its children go through it."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr(ppc.places, "HERE", tmp_path / "here")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("PPC_HERE", str(tmp_path / "here"))
    with s3_server(monkeypatch) as address, Gate(address) as gate:
        monkeypatch.setenv("AWS_ENDPOINT_URL", gate.address)
        yield gate
        gate.shutdown()
    S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        ("403 Forbidden", "AccessDenied", "PermissionError"),
        ("507 Insufficient Storage", "InsufficientStorage", "507 Insufficient Storage"),
        ("404 Not Found", "NoSuchBucket", "FileNotFoundError"),
        ("", "", ""),
    ],
)
def test_a_store_that_refuses_is_one_error_that_names_the_file(gate: Gate, status: str, code: str, words: str) -> None:
    root = storage_path(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    with atomic_write(root / "file") as handle:
        handle.write(b"whole")
    journal = Journal(root / "journal.jsonl")
    journal.write(1, {"a": 1.0})
    gate.shut(status, code)

    def write() -> None:
        with atomic_write(root / "file") as handle:
            handle.write(b"another")

    def lock() -> None:
        with locked(root / "lock", poll_s=0.05):  # without a time limit: it must not wait for ever
            raise AssertionError("nobody holds it")

    for name, act in {"file": write, "journal.jsonl": journal.flush, "lock": lock}.items():
        with pytest.raises(StorageError) as caught:
            act()
        assert str(caught.value).startswith(f"{root / name}: ") and words in str(caught.value)
        assert "look at the store" in str(caught.value)
    if code != "NoSuchBucket":  # of reads: there no file is there
        for look in (read_bytes, size_of, remove):
            with pytest.raises(StorageError, match=str(root / "file")):
                look(root / "file")
    gate.open()
    assert read_bytes(root / "file") == b"whole"
    journal.flush()
    assert size_of(root / "journal.jsonl"), "it had kept its points"
    with locked(root / "lock", timeout_s=5):
        pass


def test_a_store_that_goes_away_in_training_costs_no_more_than_an_epoch(
    gate: Gate, undisturbed: Storage, launch: Callable[..., Launch]
) -> None:
    storage = Storage.at(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    make_study(storage, k=[4], seeds=[0], tiny={**LONG, "runtime.checkpoint_every_epochs": 3})
    (row,) = rows_of(storage)
    checkpoint = stage_of(storage, row, "train_cam") / "checkpoints" / "epoch-00003.pt"
    run = launch(storage, "--local")
    run.wait_for(lambda: size_of(checkpoint) is not None)
    gate.shut()
    assert run.ended() != 0
    assert "Traceback" not in run.text and "s3://" in run.text and "look at the store" in run.text, run.text
    gate.open()
    assert run_study(storage, "k", HERE, QUIET) == 0
    (row,) = rows_of(storage)
    assert metrics(row) == metrics(rows_of(undisturbed)[1]) and row.attempt == 2
