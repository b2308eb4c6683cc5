"""Trials that share a GPU, and workers that share one: counted by a real cluster whose GPU is not there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import make_study

from ppc.artifacts import Storage, write_json
from ppc.config import RuntimeConfig
from ppc.ledger import FAILED, FINISHED, TrialRow, read_rows
from ppc.ray_runtime import RayRuntime
from ppc.ray_study import cluster, concurrency, run_rows

# The warnings of Ray are not ours.
pytestmark = [
    pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a real GPU"),
]  # fmt: skip


def use(payload: Path, device: torch.device) -> None:
    raise AssertionError("training began without the GPU that it asked for")


def test_a_gpu_that_torch_cannot_use_is_told_and_not_replaced_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first of this file: it has a cluster of its own, whose processes do not pretend
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[1]}")
    with cluster(None, num_cpus=2, num_gpus=1):
        for runtime in ({"engine": "task"}, {"engine": "train", "gpus_per_worker": 1}):
            cfg = RuntimeConfig.model_validate({"gpus_per_worker": 0.5, **runtime})
            with pytest.raises(
                ValueError, match="Ray gave (this process GPU 0 of|the trial.s workers GPUs).*gpus_per_worker=0"
            ):
                RayRuntime(tmp_path).train(use, tmp_path, cfg)


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPC_FAKE_GPUS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers call functions of this file
        with cluster(None, num_cpus=8, num_gpus=1):
            yield


def study_of(storage: Storage, runtimes: list[dict[str, Any]]) -> dict[str, Any]:
    """A study of as many trials, each run in its own way."""
    study = make_study(storage, k=[4], seeds=list(range(len(runtimes))), tiny={"train.epochs": 2})
    for trial, runtime in zip(study["trials"], runtimes, strict=True):
        trial["config"]["runtime"] |= {"log_every_steps": 1, **runtime}
    write_json(storage.study("k").path / "study.json", study)
    return study


def run(storage: Storage, study: dict[str, Any], tmp_path: Path) -> list[TrialRow]:
    run_rows(read_rows(storage, study), storage, tmp_path / "launch", max_concurrent=None)
    return read_rows(storage, study)


def wait_for(path: Path, pattern: str, number: int) -> None:
    """Wait until so many files are there."""
    deadline = time.monotonic() + 150
    while len(list(path.glob(pattern))) < number:
        assert time.monotonic() < deadline, f"{sorted(file.name for file in path.iterdir())}: too few {pattern}"
        time.sleep(0.1)


def stay(payload: Path, device: torch.device) -> None:
    """Be there until all may go."""
    (payload / f"in-{os.getpid()}").touch()
    wait_for(payload, "go", 1)


def test_four_trials_of_a_quarter_share_a_gpu_and_a_fifth_waits(tmp_path: Path, one_gpu: None) -> None:
    quarter = {"gpus_per_worker": 0.25, "engine": "task"}
    storage = Storage(tmp_path / "storage")
    assert concurrency(read_rows(storage, study_of(storage, [quarter] * 5)), None) == 4
    cfg, seen = RuntimeConfig.model_validate(quarter), tmp_path / "seen"
    seen.mkdir()
    with ThreadPoolExecutor(5) as pool:
        trainings = [pool.submit(RayRuntime(tmp_path).train, stay, seen, cfg) for _ in range(5)]
        try:
            wait_for(seen, "in-*", 4)  # each is there until all may go: they are there together
            time.sleep(5)
            assert len(list(seen.glob("in-*"))) == 4
        finally:
            (seen / "go").touch()
        for training in trainings:
            training.result(timeout=150)
    assert len(list(seen.glob("in-*"))) in (4, 5)  # the fifth may get the process of another


def hold(payload: Path, device: torch.device) -> None:
    """Say where this worker is, and wait for the other."""
    import torch.distributed as dist

    (payload / f"{time.time_ns()}-{dist.get_rank()}-{device}").touch()
    dist.barrier()


def test_two_workers_of_a_trial_share_a_gpu(tmp_path: Path, one_gpu: None) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    cfg = RuntimeConfig(workers=2, gpus_per_worker=0.5)
    RayRuntime(tmp_path / "scratch").train(hold, seen, cfg)
    assert sorted(path.name.partition("-")[2] for path in seen.iterdir()) == ["0-cpu", "1-cpu"]


def test_gpus_that_there_will_never_be_are_one_clear_error_and_no_hang(tmp_path: Path, one_gpu: None) -> None:
    storage = Storage(tmp_path)
    never = [{"gpus_per_worker": 2}, {"workers": 2, "gpus_per_worker": 0.75}]
    shared = {"gpus_per_worker": 0.25, "engine": "task"}
    study = study_of(storage, [{"resource_wait_s": 1, **runtime} for runtime in [*never, shared]])
    first, second, third = run(storage, study, tmp_path)
    assert first.state == second.state == FAILED and first.error and second.error
    assert "asks for 2 GPU in all but the cluster has 1, waited 1 s" in first.error["message"]
    assert "asks for 1.5 GPU in all but the cluster has 1" in second.error["message"]
    assert "lower runtime.workers, runtime.cpus_per_worker or runtime.gpus_per_worker" in first.error["message"]
    assert third.state == FINISHED, third.error
    manifest = storage.stage("train_cam", third.stages[0]["key"]).manifest()
    assert manifest is not None and manifest["ran"]["gpus"] == 0.25
    assert manifest["cost"]["gpu_s"] == pytest.approx(0.25 * manifest["cost"]["cpu_s"])
