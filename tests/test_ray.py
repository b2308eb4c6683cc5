"""Work on a Ray cluster: the same numbers whatever the engine, and what happens to a process that dies."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from tiny_study import make_study

from ppc.artifacts import Storage, read_journal
from ppc.config import RuntimeConfig, TrialConfig
from ppc.ray_runtime import RayRuntime
from ppc.ray_study import cluster
from ppc.runtime import WorkerDiedError
from ppc.train import rank, world_size
from ppc.trial import run_trial

# The warnings of Ray are not ours.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers call functions of this file
        with cluster(None, num_cpus=4):
            yield


def run_one(storage: Storage, study: dict[str, Any], scratch: Path, runtime: dict[str, Any]) -> dict[str, Any]:
    """Run the first trial of a study on the cluster of this process."""
    entry = study["trials"][0]
    cfg = TrialConfig.model_validate({**entry["config"], "runtime": {**entry["config"]["runtime"], **runtime}})
    stages = [(s["name"], s["key"]) for s in entry["stages"]]
    return run_trial(cfg, entry["key"], stages, storage, RayRuntime(scratch))


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


def note_device(shared: int, part: Sequence[int], device: torch.device) -> str:
    return str(device)


def test_no_port_of_our_own_cluster_is_open_to_others(ray_here: None) -> None:
    heard = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # an idle worker ends meanwhile
            places = process.net_connections("inet")
            heard += [(process.name(), place) for place in places if place.status == psutil.CONN_LISTEN]
    assert "gcs_server" in {name for name, _ in heard}
    addresses = {ip_address(place.laddr.ip.removeprefix("::ffff:")) for _, place in heard}
    assert all(address.is_loopback for address in addresses), heard


def test_images_wait_for_no_gpu_that_never_comes(ray_here: None) -> None:
    found: list[str] = []

    def infer(runtime: dict[str, Any]) -> None:
        cfg = RuntimeConfig.model_validate({"resource_wait_s": 0, **runtime})
        RayRuntime(Path()).map(note_device, 0, [1], cfg, lambda done, result: found.append(result), use_gpu=True)

    with pytest.raises(ValueError, match="asks for 1 GPU in all but the cluster has 0"):
        infer({"gpus_per_worker": 1})
    infer({})
    assert found == ["cpu"]


class StepError(ValueError):
    """What the last worker raises."""


def raise_in_the_last(payload: Path, device: torch.device) -> None:
    (payload / f"{rank()}-{time.time_ns()}").touch()
    if rank() == world_size() - 1:
        raise StepError("step 3: train/loss is not finite")
    dist.barrier()  # waits for the one that raised


def die_once_in_the_second(payload: Path, device: torch.device) -> None:
    first = not (payload / "died").exists()
    dist.barrier()
    if dist.get_rank() == 1 and first:
        (payload / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()  # the first try of the other raises here: it is no raise of the trial
    (payload / f"ended-{dist.get_rank()}").touch()


@pytest.mark.parametrize(("engine", "workers"), [("task", 1), ("train", 2)])
def test_what_a_worker_raises_first_is_raised_at_once(
    engine: Literal["task", "train"], workers: int, tmp_path: Path, ray_here: None
) -> None:
    cfg = RuntimeConfig(engine=engine, workers=workers, max_failures=2)
    on_interrupt = signal.getsignal(signal.SIGINT)
    start = time.monotonic()
    with pytest.raises(ValueError, match="step 3: train/loss is not finite$") as caught:
        RayRuntime(tmp_path / "scratch").train(raise_in_the_last, made(tmp_path / "seen"), cfg)
    assert type(caught.value).__name__ == "StepError"
    assert "raise_in_the_last" in str(caught.value.__cause__), "with the traceback of the worker"
    assert len(list((tmp_path / "seen").iterdir())) == workers, "a raise is not tried again"
    assert time.monotonic() - start < 200, "nobody waited for the time limit of the messages"
    assert signal.getsignal(signal.SIGINT) is on_interrupt


@pytest.mark.slow
def test_a_dead_worker_of_two_is_started_again(tmp_path: Path, ray_here: None) -> None:
    cfg = RuntimeConfig(workers=2, max_failures=1)
    RayRuntime(tmp_path / "scratch").train(die_once_in_the_second, made(tmp_path / "seen"), cfg)
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"died", "ended-0", "ended-1"}


def die_in_the_last(payload: Path, device: torch.device) -> None:
    (payload / f"{rank()}-{time.time_ns()}").touch()
    if rank() == world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()  # raises, which is not what is told


@pytest.mark.parametrize(("engine", "workers"), [("task", 1), ("train", 2)])
def test_a_process_that_dies_at_every_try_ends_in_one_clear_error(
    engine: Literal["task", "train"], workers: int, tmp_path: Path, ray_here: None
) -> None:
    cfg = RuntimeConfig(engine=engine, workers=workers, max_failures=1)
    with pytest.raises(WorkerDiedError, match=r"died and so did 1 more tries \(runtime.max_failures\)"):
        RayRuntime(tmp_path / "scratch").train(die_in_the_last, made(tmp_path / "seen"), cfg)
    tries = len(list((tmp_path / "seen").glob(f"{workers - 1}-*")))
    assert tries == 2 if engine == "task" else 2 <= tries <= 4  # deaths at the start and later ones are counted apart
    wait_for_all_cpus()  # nothing is held for the dead


def wait_for_all_cpus() -> None:
    deadline = time.monotonic() + 60
    while (free := ray.available_resources().get("CPU", 0)) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, f"{free} CPUs are free of {ray.cluster_resources()['CPU']}"
        time.sleep(0.2)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_killed_training_process_is_started_again_from_its_checkpoint(tmp_path: Path, ray_here: None) -> None:
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
