"""A loss, a gradient or a weight that is not finite, and memory that does not suffice: which step, which images."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ALL_VIEWS, cam_job, cam_payload, curve, layout, scenes_root, tiny_config

from ppc.artifacts import StageDir, Storage, read_json
from ppc.config import RuntimeConfig, TrialConfig
from ppc.data.loader import epoch_order
from ppc.planning import Planner
from ppc.runtime import LocalRuntime, prepare_process
from ppc.stages.training import worker
from ppc.train import Job, checkpoints, fit
from ppc.trial import run_trial

CPU = torch.device("cpu")
# 6 steps, 2 an epoch: a window is an epoch, so that a bad step has to be found in it
LONG = {**ALL_VIEWS, "train.epochs": 3, "train.momentum": 0.9, "runtime.log_every_steps": 10}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_root(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    prepare_process(1)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> StageDir:
    prepare_process(1)
    folder = stage(tmp_path_factory.mktemp("unbroken"))
    fit(job_of(config(scenes)), folder, config(scenes).runtime, CPU)
    return folder


def config(scenes: Path, changes: dict[str, Any] | None = None) -> TrialConfig:
    return tiny_config({**LONG, **(changes or {})}, scenes)


def stage(path: Path) -> StageDir:
    path.mkdir(parents=True, exist_ok=True)
    return StageDir(path, "train_cam", "key")


def job_of(cfg: TrialConfig) -> Job:
    return cam_job(cfg)


def ids_of(scenes: Path, step: int) -> list[str]:
    """The images of a step (from 1), by the rule of the order and not by the loader."""
    epoch, index = divmod(step - 1, 2)
    listed = layout(scenes).ids("train")
    return [listed[i] for i in epoch_order(8, seed=0, epoch=epoch)[4 * index : 4 * index + 4]]


def told(message: str) -> tuple[dict[str, str], list[str]]:
    """Terms and images of a message."""
    terms, images = (re.search(rf"^  {word}: (.*)$", message, re.M) for word in ("terms", "images of the batch"))
    assert images is not None, message
    pairs = [] if terms is None else [pair.rsplit(" ", 1) for pair in terms[1].split(", ")]
    return {name: value for name, value in pairs}, images[1].split(", ")


def assert_goes_on(scenes: Path, folder: StageDir, unbroken: StageDir) -> None:
    """Without the fault, training goes on from what was left and ends as if nothing had been."""
    fit(job_of(config(scenes)), folder, config(scenes).runtime, CPU)
    assert curve(folder) == curve(unbroken)
    after, wanted = (torch.load(checkpoints(f)[0], weights_only=True)["net"] for f in (folder, unbroken))
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def test_a_learning_rate_that_is_too_large_is_told_at_its_step(tmp_path: Path, scenes: Path) -> None:
    folder = stage(tmp_path)
    with pytest.raises(ValueError, match=r"^step 2 of 6 \(epoch 1\): .*not finite; lower train.learning_rate") as info:
        fit(job_of(config(scenes, {"train.learning_rate": 1e30})), folder, RuntimeConfig(), CPU)
    terms, images = told(str(info.value))
    assert images == ids_of(scenes, 2)
    assert {"loss", "cls", "er", "ecr", "min_pool", "cross_prototype", "cross_cam", "intra_view"} <= terms.keys()
    first = str(info.value).split("\n")[0]
    assert "loss" in first and terms["loss"] in ("nan", "inf")
    assert all((name in first) == (value in ("nan", "inf", "-inf")) for name, value in terms.items())
    assert curve(folder) == [] and checkpoints(folder) == []


def test_a_gradient_that_is_not_finite_is_told_at_its_own_step(
    tmp_path: Path, scenes: Path, unbroken: StageDir
) -> None:
    job, folder, calls = job_of(config(scenes)), stage(tmp_path), []

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grad * float("nan") if len(calls) == 3 else grad

    next(p for p in job.net.parameters() if p.requires_grad).register_hook(spoil)
    with pytest.raises(ValueError, match=r"^step 3 of 6 \(epoch 2\): largest gradient not finite") as info:
        fit(job, folder, config(scenes).runtime, CPU)
    terms, images = told(str(info.value))
    assert terms["largest gradient"] == "nan" and float(terms["loss"]) > 0, "the loss itself was finite there"
    assert len(calls) == 4 and images == ids_of(scenes, 3)
    assert [step for step, _ in curve(folder)] == [2] and [p.name for p in checkpoints(folder)] == ["epoch-00001.pt"]
    assert_goes_on(scenes, folder, unbroken)


def spoiled_after(job: Job, step: int) -> Job:
    """The job, in which a weight becomes NaN in the update of a step (from 1): no loss of that epoch sees it."""
    update, calls = job.optimizer.step, []

    def spoil(*args: Any) -> None:
        update(*args)
        calls.append(1)
        if len(calls) == step:
            with torch.no_grad():
                next(iter(job.net.parameters())).view(-1)[0] = float("nan")

    job.optimizer.step = spoil  # type: ignore[method-assign, assignment]
    return job


@pytest.mark.parametrize(("step", "left"), [(2, []), (6, ["epoch-00002.pt", "epoch-00001.pt"])])
def test_weights_that_are_not_finite_reach_no_checkpoint(
    tmp_path: Path, scenes: Path, unbroken: StageDir, step: int, left: list[str]
) -> None:
    folder = stage(tmp_path)
    with pytest.raises(ValueError, match=rf"^step {step} of 6 .*: 1 weight\(s\) not finite after it, .*weight") as info:
        fit(spoiled_after(job_of(config(scenes)), step), folder, config(scenes).runtime, CPU)
    assert told(str(info.value))[1] == ids_of(scenes, step)
    assert [path.name for path in checkpoints(folder)] == left and not (folder / "weights.pt").exists()
    assert_goes_on(scenes, folder, unbroken)


def test_a_checkpoint_that_holds_nan_is_passed_over(
    tmp_path: Path, scenes: Path, unbroken: StageDir, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, calls = stage(tmp_path), []
    job = job_of(config(scenes))

    def losses(net: Any, batch: Any, step: int) -> Any:
        calls.append(step)
        if step == 4:
            raise KeyboardInterrupt
        return job.losses(net, batch, step)

    with pytest.raises(KeyboardInterrupt):
        fit(dataclasses.replace(job, losses=losses), folder, config(scenes).runtime, CPU)
    newest = checkpoints(folder)[0]
    state = torch.load(newest, weights_only=True)
    next(iter(state["net"].values())).view(-1)[0] = float("inf")
    torch.save(state, newest)
    assert_goes_on(scenes, folder, unbroken)
    assert f"checkpoint {newest} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_told(
    tmp_path: Path, scenes: Path, unbroken: StageDir, error: Exception
) -> None:
    job, folder = job_of(config(scenes)), stage(tmp_path)

    def losses(net: Any, batch: Any, step: int) -> Any:
        if step == 3:
            raise error
        return job.losses(net, batch, step)

    with pytest.raises(
        torch.OutOfMemoryError, match=r"^step 4 of 6 \(epoch 2\): out of memory with 4 images of 48x48"
    ) as info:
        fit(dataclasses.replace(job, losses=losses), folder, config(scenes).runtime, CPU)
    message = str(info.value)
    assert told(message)[1] == ids_of(scenes, 4) and str(error) in message
    for word in ("runtime.workers", "runtime.gpus_per_worker", "train.crop_px", "train.batch_size", "1 worker(s)"):
        assert word in message
    assert_goes_on(scenes, folder, unbroken)


def test_another_runtime_error_is_told_as_it_is(tmp_path: Path, scenes: Path) -> None:
    def losses(net: Any, batch: Any, step: int) -> Any:
        raise RuntimeError("shapes do not fit")

    job = dataclasses.replace(job_of(config(scenes)), losses=losses)
    with pytest.raises(RuntimeError, match="^shapes do not fit$"):
        fit(job, stage(tmp_path), RuntimeConfig(), CPU)


@pytest.mark.slow
def test_all_workers_name_the_images_of_all(tmp_path: Path, scenes: Path) -> None:
    cfg = config(scenes, {"train.learning_rate": 1e30, "runtime.workers": 2})
    folder = stage(tmp_path)
    with pytest.raises(ValueError, match="^step 2 of 6") as info:
        LocalRuntime().train(worker, cam_payload(cfg, folder, layout(scenes)), cfg.runtime)
    assert told(str(info.value))[1] == ids_of(scenes, 2)
    assert curve(folder) == [] and checkpoints(folder) == []


def test_the_trial_fails_with_all_that_in_its_error(tmp_path: Path, scenes: Path) -> None:
    storage = Storage(tmp_path)
    plan = Planner(storage).plan(config(scenes, {"train.learning_rate": 1e30}))
    for attempt in (1, 2):
        with pytest.raises(ValueError, match="^step 2 of 6"):
            run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
        trial = storage.trial(plan.key)
        error = trial.error()
        assert error is not None and (error["stage"], error["attempt"]) == ("train_cam", attempt)
        assert told(error["message"])[1] == ids_of(scenes, 2)
        assert trial.state()["state"] == "FAILED" and trial.result() is None
    folder = storage.stage(*plan.stages[0])
    assert curve(folder) == [] and checkpoints(folder) == [], "nothing for a tracker, nothing to resume from"
    assert read_json(folder / "manifest.json") is None
