"""Trials that share a GPU, and workers that share one: counted by a real cluster whose GPU is not there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import make_study

from ppc.artifacts import Storage, read_journal, write_json
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
        for runtime in ({"engine": "task"}, {"engine": "train"}, {"engine": "train", "gpus_per_worker": 1}):
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
    study = make_study(storage, k=[4], seeds=list(range(len(runtimes))), tiny={"train.epochs": 15})
    for trial, runtime in zip(study["trials"], runtimes, strict=True):
        trial["config"]["runtime"] |= {"log_every_steps": 1, **runtime}
    write_json(storage.study("k").path / "study.json", study)
    return study


def run(storage: Storage, study: dict[str, Any], tmp_path: Path) -> list[TrialRow]:
    run_rows(read_rows(storage, study), storage, tmp_path / "launch", max_concurrent=None)
    return read_rows(storage, study)


def times_of(storage: Storage, row: TrialRow) -> tuple[int, int]:
    """Unix ms of the first and the last step of a trial's training."""
    points, _ = read_journal(storage.stage("train_cam", row.stages[0]["key"]) / "journal.jsonl")
    return points[0]["t"], points[-1]["t"]


def at_once(spans: list[tuple[int, int]]) -> int:
    """How many of the spans have a moment in common, at most."""
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


def test_four_trials_of_a_quarter_share_a_gpu_and_a_fifth_waits(tmp_path: Path, one_gpu: None) -> None:
    storage = Storage(tmp_path)
    study = study_of(storage, [{"gpus_per_worker": 0.25, "engine": "task"}] * 5)
    rows = read_rows(storage, study)
    assert concurrency(rows, None) == 4
    rows = run(storage, study, tmp_path)
    assert [row.state for row in rows] == [FINISHED] * 5, [row.error for row in rows]
    spans = [times_of(storage, row) for row in rows]
    assert at_once(spans) == 4, spans
    for row in rows:
        manifest = storage.stage("train_cam", row.stages[0]["key"]).manifest()
        assert manifest is not None and manifest["ran"]["gpus"] == 0.25
        assert manifest["cost"]["gpu_s"] == pytest.approx(0.25 * manifest["cost"]["cpu_s"])


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
    study = study_of(storage, [{"gpus_per_worker": 2, "resource_wait_s": 1}, {"workers": 2, "gpus_per_worker": 0.75,
                                                                              "resource_wait_s": 1}])  # fmt: skip
    start = time.monotonic()
    first, second = run(storage, study, tmp_path)
    assert time.monotonic() - start < 60
    assert first.state == second.state == FAILED and first.error and second.error
    assert "asks for 2 GPU in all but the cluster has 1, waited 1 s" in first.error["message"]
    assert "asks for 1.5 GPU in all but the cluster has 1" in second.error["message"]
    assert "lower runtime.workers, runtime.cpus_per_worker or runtime.gpus_per_worker" in first.error["message"]
