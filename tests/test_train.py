"""The training loop: any number of workers, any interruption, the same numbers."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ALL_VIEWS, cam_job, cam_payload, curve, layout, scenes_root, tiny_config, weights_of
from torch import Tensor

import ppc.train
from ppc.artifacts import StageDir, read_json
from ppc.config import RuntimeConfig, TrialConfig
from ppc.data.labels import DataError
from ppc.data.loader import CamTrainSet
from ppc.methods import METHODS, Losses
from ppc.prototypes import Workers
from ppc.runtime import LocalRuntime, prepare_process
from ppc.stages.training import save_net, worker
from ppc.train import Job, checkpoints, fit, gather, rank, sum_over_workers, world_size

CPU = torch.device("cpu")
LONG = {"train.epochs": 3, "train.momentum": 0.9}  # 6 steps; momentum is state that a resume could lose
METHOD_X_PRESET = [(method, preset) for method in METHODS for preset in ("official", "paper")]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_root(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def config(scenes: Path, changes: dict[str, Any] | None = None) -> TrialConfig:
    return tiny_config({**ALL_VIEWS, **(changes or {})}, scenes)


def stage(path: Path, key: str = "key") -> StageDir:
    path.mkdir(parents=True, exist_ok=True)
    return StageDir(path, "train_cam", key)


def trained(cfg: TrialConfig, folder: StageDir) -> StageDir:
    worker(cam_payload(cfg, folder), CPU)
    return folder


# -- workers


@dataclass(frozen=True)
class Everything:
    """All that one group of processes does: starting processes is what takes the time."""

    folder: Path
    scenes: Path


def in_float64(cfg: TrialConfig, folder: StageDir) -> None:
    """Loss, terms and gradients of one step of the global batch, by the root worker's hand."""
    job = cam_job(cfg)
    net = job.net
    net.double().train()
    batch = dict(next(iter(job.batches(0))))
    batch["image_N3HW"] = batch["image_N3HW"].double()
    loss, terms = Losses(cfg, Workers(rank(), gather), world_size())(net, batch, 3)
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    values = torch.stack([loss.detach(), *(t.detach().double() for t in terms.values())])
    sum_over_workers([values, *grads.values()])
    if rank() == 0:
        torch.save({"values": dict(zip(["loss", *terms], values, strict=True)), "grads": grads}, folder / "step.pt")


def job_in_float64(cfg: TrialConfig) -> Job:
    """A training in float64, where no rounding turns a ReLU over."""
    job = cam_job(cfg)
    job.net.double()

    def batches(epoch: int) -> Iterator[Any]:
        return ({**batch, "image_N3HW": batch["image_N3HW"].double()} for batch in job.batches(epoch))

    return dataclasses.replace(job, batches=batches)


def trained_in_float64(cfg: TrialConfig, folder: StageDir) -> StageDir:
    job = job_in_float64(cfg)
    fit(job, folder, cfg.runtime, CPU)
    if rank() == 0:
        save_net(job.net, folder / "weights.pt")
    return folder


def all_jobs(payload: Everything, device: torch.device) -> None:
    for method, preset in METHOD_X_PRESET:
        cfg = config(payload.scenes, {"method.name": method, "contrast.preset": preset, "seed": 1})
        folder = StageDir(payload.folder / f"{method}-{preset}", "train_cam", "key")
        worker(cam_payload(cfg, folder, layout(payload.scenes)), device)
        in_float64(cfg, folder)
        trained_in_float64(cfg, StageDir(folder.path / "float64", "train_cam", "key"))
    begun = StageDir(payload.folder / "begun-alone", "train_cam", "key")
    trained_in_float64(config(payload.scenes, LONG), begun)


@pytest.fixture(scope="module")
def by_workers(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> dict[int, Path]:
    """Folders of the same jobs done by 1, 2 and 4 processes."""
    folders = {}
    for number in (1, 2, 4):
        folders[number] = tmp_path_factory.mktemp(f"workers-{number}")
        for method, preset in METHOD_X_PRESET:
            (folders[number] / f"{method}-{preset}" / "float64").mkdir(parents=True)
        with pytest.raises(StopError):
            train_until(config(scenes, LONG), stage(folders[number] / "begun-alone"), 3, make_job=job_in_float64)
        LocalRuntime().train(all_jobs, Everything(folders[number], scenes), RuntimeConfig(workers=number))
    return folders


def assert_close(actual: dict[str, Any], expected: dict[str, Any], *, rtol: float, atol: float = 0.0) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        a, e = torch.as_tensor(actual[name]), torch.as_tensor(expected[name])
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize(("method", "preset"), METHOD_X_PRESET)
def test_float64_loss_and_gradients_do_not_depend_on_the_number_of_workers(
    by_workers: dict[int, Path], method: str, preset: str, number: int
) -> None:
    one, many = (torch.load(by_workers[n] / f"{method}-{preset}" / "step.pt") for n in (1, number))
    assert {"loss", "cls", "cross_prototype", "cross_cam", "intra_view"} <= one["values"].keys()
    shares = {"silent_share", "bg_share", "prototype_similarity"}  # diagnostics: added up in float32
    assert_close(*({k: v for k, v in x["values"].items() if k not in shares} for x in (many, one)), rtol=1e-10)
    assert_close(*({k: v for k, v in x["values"].items() if k in shares} for x in (many, one)), rtol=1e-6)
    for name, grad in one["grads"].items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(many["grads"][name], grad, rtol=1e-10, atol=1e-10 * scale)
    assert any(grad.abs().max() > 0 for grad in one["grads"].values())


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize(("method", "preset"), METHOD_X_PRESET)
def test_a_whole_training_gives_the_same_curve_and_weights_with_any_number_of_workers(
    by_workers: dict[int, Path], method: str, preset: str, number: int
) -> None:
    one, many = (StageDir(by_workers[n] / f"{method}-{preset}", "train_cam", "key") for n in (1, number))
    assert [step for step, _ in curve(many)] == [step for step, _ in curve(one)] == [1, 2, 3, 4]
    for (_, got), (_, wanted) in zip(curve(many), curve(one), strict=True):
        assert_close(got, wanted, rtol=1e-5)
    # The weights are compared in float64: in float32 a sum of other order can turn one ReLU over, and with it a
    # gradient. One was looked at, of eps with 2 workers and seed 0: in step 3 one of 6,144 inputs of the fourth ReLU is
    # within 2e-6 of 0, and on the other side of it; after that biases are 2e-3 off. Hence seed 1, without such a one.
    one, many = (StageDir(by_workers[n] / f"{method}-{preset}" / "float64", "train_cam", "key") for n in (1, number))
    for (_, got), (_, wanted) in zip(curve(many), curve(one), strict=True):
        assert_close(got, wanted, rtol=1e-6)
    weights = weights_of(one)
    for name, weight in weights_of(many).items():
        # relative to the layer's largest weight, since one near 0 has no relative accuracy; measured: at most 5e-15
        assert weight.dtype == torch.float64
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-12 * weights[name].abs().max().item())


# -- interruption


class StopError(Exception):
    """What ends a training in a test."""


def stopped_at(job: Job, at: int, *, kill: bool = False) -> Job:
    """The job, which ends when the batch of step `at` (from 0) is asked for."""

    def batches(epoch: int) -> Iterator[Any]:
        for index, batch in enumerate(job.batches(epoch)):
            if epoch * job.steps_per_epoch + index == at:
                if kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise StopError
            yield batch

    return dataclasses.replace(job, batches=batches)


def train_until(
    cfg: TrialConfig, folder: StageDir, at: int, *, kill: bool = False, make_job: Callable[[TrialConfig], Job] = cam_job
) -> None:
    prepare_process(1)  # as every runtime does: with another number of threads sums are split in other ways
    fit(stopped_at(make_job(cfg), at, kill=kill), folder, cfg.runtime, CPU)


def assert_identical(one: StageDir, other: StageDir) -> None:
    assert curve(one) == curve(other)
    weights = weights_of(other)
    for name, weight in weights_of(one).items():
        assert torch.equal(weight, weights[name]), name


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> StageDir:
    torch.set_num_threads(1)
    return trained(config(scenes, LONG), stage(tmp_path_factory.mktemp("unbroken")))


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_stopped_at_any_step_and_run_again_it_ends_bit_identical(
    tmp_path: Path, scenes: Path, unbroken: StageDir, at: int
) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    with pytest.raises(StopError):
        train_until(cfg, folder, at)
    assert [step for step, _ in curve(folder)] == list(range(1, at + 1))
    assert len(checkpoints(folder)) == min(at // 2, 2)
    before = (folder / "journal.jsonl").read_bytes()
    assert_identical(trained(cfg, folder), unbroken)
    assert (folder / "journal.jsonl").read_bytes().startswith(before), "points are written once and never changed"


def test_stopped_again_and_again_it_ends_bit_identical(tmp_path: Path, scenes: Path, unbroken: StageDir) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    for at in (1, 3, 3, 5):
        with pytest.raises(StopError):
            train_until(cfg, folder, at)
    assert_identical(trained(cfg, folder), unbroken)


def test_a_process_killed_in_the_middle_of_an_epoch_leaves_what_the_next_needs(
    tmp_path: Path, scenes: Path, unbroken: StageDir
) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=train_until, args=(cfg, folder, 3), kwargs={"kill": True})
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in checkpoints(folder)] == ["epoch-00001.pt"]
    assert_identical(trained(cfg, folder), unbroken)


def test_checkpoints_less_often_than_epochs_only_cost_time(tmp_path: Path, scenes: Path, unbroken: StageDir) -> None:
    cfg, folder = config(scenes, {**LONG, "runtime.checkpoint_every_epochs": 2}), stage(tmp_path)
    with pytest.raises(StopError):
        train_until(cfg, folder, 3)
    assert checkpoints(folder) == []
    assert_identical(trained(cfg, folder), unbroken)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, scenes: Path, unbroken: StageDir, keep: float, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    with pytest.raises(StopError):
        train_until(cfg, folder, 4)
    newest, before = checkpoints(folder)
    whole = newest.read_bytes()
    newest.write_bytes(whole[: int(len(whole) * keep)])
    torch.load(before, weights_only=True)  # this one is good
    assert_identical(trained(cfg, folder), unbroken)
    assert f"checkpoint {newest} is damaged" in capsys.readouterr().out


def test_a_checkpoint_with_flipped_bytes_falls_back_too(
    tmp_path: Path, scenes: Path, unbroken: StageDir, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    with pytest.raises(StopError):
        train_until(cfg, folder, 5)
    newest = checkpoints(folder)[0]
    data = bytearray(newest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(255 - byte for byte in data[middle : middle + 64])
    newest.write_bytes(data)
    assert_identical(trained(cfg, folder), unbroken)
    assert f"checkpoint {newest} is damaged" in capsys.readouterr().out


def test_when_all_checkpoints_are_damaged_it_starts_anew(tmp_path: Path, scenes: Path, unbroken: StageDir) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    with pytest.raises(StopError):
        train_until(cfg, folder, 5)
    for path in checkpoints(folder):
        path.write_bytes(b"not a checkpoint")
    assert_identical(trained(cfg, folder), unbroken)


def test_new_checkpoints_are_kept_beside_later_ones_that_are_damaged(
    tmp_path: Path, scenes: Path, unbroken: StageDir
) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    with pytest.raises(StopError):
        train_until(cfg, folder, 5)
    assert [path.name for path in checkpoints(folder)] == ["epoch-00002.pt", "epoch-00001.pt"]
    for path in checkpoints(folder):
        path.rename(path.with_name(path.name.replace("0000", "0001"))).write_bytes(b"not a checkpoint")
    with pytest.raises(StopError):
        train_until(cfg, folder, 3)
    assert [path.name for path in checkpoints(folder)] == ["epoch-00001.pt"]
    assert_identical(trained(cfg, folder), unbroken)


def test_a_checkpoint_that_cannot_be_read_now_is_not_a_damaged_one(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    with pytest.raises(StopError):
        train_until(cfg, folder, 3)
    before = {path: path.read_bytes() for path in checkpoints(folder)}

    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(ppc.train, "read_bytes", refused)
    with pytest.raises(PermissionError):
        trained(cfg, folder)
    assert {path: path.read_bytes() for path in checkpoints(folder)} == before


def test_workers_that_would_go_on_from_different_checkpoints_are_refused(
    tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, folder = config(scenes, LONG), stage(tmp_path)
    with pytest.raises(StopError):
        train_until(cfg, folder, 5)
    monkeypatch.setattr(ppc.train, "gather", lambda start: torch.cat([start, start - 1]))  # as two workers would
    with pytest.raises(RuntimeError, match=r"the workers would go on from epochs \[1, 2\]; resume the study"):
        trained(cfg, folder)


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path, scenes: Path) -> None:
    cfg = config(scenes, LONG)
    with pytest.raises(StopError):
        train_until(cfg, stage(tmp_path, "one"), 2)
    with pytest.raises(ValueError, match="belongs to stage key one, not other"):
        trained(cfg, stage(tmp_path, "other"))


def test_a_checkpoint_of_another_net_is_an_error_and_not_a_new_start(tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(StopError):
        train_until(config(scenes, LONG), stage(tmp_path), 2)
    with pytest.raises(RuntimeError, match="fc_proj"):
        trained(config(scenes, {**LONG, "contrast.projector_dim": 9}), stage(tmp_path))


@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_go_on_from_the_checkpoint_of_one(
    by_workers: dict[int, Path], scenes: Path, tmp_path: Path, number: int
) -> None:
    folder = StageDir(by_workers[number] / "begun-alone", "train_cam", "key")
    unbroken = trained_in_float64(config(scenes, LONG), stage(tmp_path))
    assert len(curve(folder)) > 3 and curve(folder)[:3] == curve(unbroken)[:3]
    for (_, got), (_, wanted) in zip(curve(folder), curve(unbroken), strict=True):
        assert_close(got, wanted, rtol=1e-6)


# -- seeds, logging, precision


def test_the_seed_decides_the_curve_and_loading_processes_do_not(tmp_path: Path, scenes: Path) -> None:
    one = trained(config(scenes, {"seed": 1}), stage(tmp_path / "1"))
    again = trained(config(scenes, {"seed": 1, "runtime.loader_workers": 2}), stage(tmp_path / "again"))
    other = trained(config(scenes, {"seed": 2}), stage(tmp_path / "2"))
    assert_identical(one, again)
    for term in ("cls", "er", "ecr", "min_pool", "cross_prototype", "cross_cam", "intra_view"):
        values = [[m[f"train/{term}"] for _, m in curve(folder)] for folder in (one, other)]
        assert all(a != b for a, b in zip(*values, strict=True)), term


def test_global_random_state_plays_no_part(tmp_path: Path, scenes: Path) -> None:
    torch.manual_seed(1)
    one = trained(config(scenes), stage(tmp_path / "1"))
    torch.manual_seed(2)
    torch.rand(7)
    assert_identical(one, trained(config(scenes), stage(tmp_path / "2")))


def test_a_point_is_the_mean_over_the_steps_since_the_last(tmp_path: Path, scenes: Path) -> None:
    cfg = {"train.batch_size": 2, "train.epochs": 2}  # 4 steps an epoch
    each = curve(trained(config(scenes, cfg), stage(tmp_path / "1")))
    thirds = curve(trained(config(scenes, {**cfg, "runtime.log_every_steps": 3}), stage(tmp_path / "3")))
    assert [step for step, _ in thirds] == [3, 4, 7, 8], "the end of an epoch closes a window"
    loss = [m["train/loss"] for _, m in each]
    wanted = [sum(loss[0:3]) / 3, loss[3], sum(loss[4:7]) / 3, loss[7]]
    assert [m["train/loss"] for _, m in thirds] == pytest.approx(wanted, rel=1e-6)
    lr = [m["train/lr"] for _, m in each]
    assert lr == pytest.approx([0.01 * (1 - step / 8) ** 0.9 for step in range(8)])


def test_progress_ends_at_all_steps(tmp_path: Path, scenes: Path) -> None:
    progress = read_json(trained(config(scenes), stage(tmp_path)) / "progress.json")
    assert {k: progress[k] for k in ("done", "total", "unit", "epoch", "epochs")} == {
        "done": 4, "total": 4, "unit": "step", "epoch": 2, "epochs": 2,
    }  # fmt: skip


def test_bf16_stays_near_float32(tmp_path: Path, scenes: Path) -> None:
    full = curve(trained(config(scenes), stage(tmp_path / "32")))
    half = curve(trained(config(scenes, {"train.precision": "bf16"}), stage(tmp_path / "16")))
    for (_, a), (_, b) in zip(half, full, strict=True):
        for term in ("cls", "er", "ecr", "loss"):
            assert a[f"train/{term}"] == pytest.approx(b[f"train/{term}"], rel=0.05), term
    assert half != full


def test_a_loss_that_is_not_finite_ends_training_with_its_step(tmp_path: Path, scenes: Path) -> None:
    cfg, folder = config(scenes), stage(tmp_path)
    job = cam_job(cfg)

    def poisoned(epoch: int) -> Iterator[Any]:
        for index, batch in enumerate(job.batches(epoch)):
            yield batch if (epoch, index) != (1, 0) else {**batch, "image_N3HW": batch["image_N3HW"] * torch.inf}

    with pytest.raises(ValueError, match=r"^step 3 of 4 \(epoch 2\): loss, .* not finite; lower train.learning_rate"):
        fit(dataclasses.replace(job, batches=poisoned), folder, cfg.runtime, CPU)
    assert [path.name for path in checkpoints(folder)] == ["epoch-00001.pt"], "the last good state is kept"


def test_gather_and_sum_alone_change_nothing() -> None:
    x: Tensor = torch.arange(6.0, requires_grad=True).view(2, 3)
    assert torch.equal(gather(x), x) and not gather(x).requires_grad
    y = torch.ones(3)
    sum_over_workers([y])
    assert torch.equal(y, torch.ones(3))
    assert (rank(), world_size()) == (0, 1)


# -- what goes wrong in a process that reads images


@pytest.mark.parametrize("processes", [0, 2])
def test_a_broken_image_is_the_same_error_wherever_it_is_read(processes: int, tmp_path: Path, scenes: Path) -> None:
    root = Path(shutil.copytree(scenes, tmp_path / "copy"))
    path = min((root / "JPEGImages").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name}: not readable as an image") as caught:
        trained(config(root, {"runtime.loader_workers": processes, "train.batch_size": 2}), stage(tmp_path / "out"))
    assert caught.value.of_image


def test_a_loader_that_dies_is_named(tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: object, epoch: int, image_id: str) -> None:
        os._exit(9)

    monkeypatch.setattr(CamTrainSet, "sample", die)
    with pytest.raises(RuntimeError, match=r"a process that reads images died.*runtime\.loader_workers"):
        trained(config(scenes, {"runtime.loader_workers": 1}), stage(tmp_path))
