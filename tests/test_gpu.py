"""On a CUDA device: the numbers of the CPU, half precision, and memory that does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ALL_VIEWS, cam_job, curve, formula_batch, layout, scenes_root, tiny_config

from ppc.artifacts import StageDir, Storage
from ppc.config import TrialConfig
from ppc.data.loader import epoch_order
from ppc.methods import Losses, build_net
from ppc.planning import Planner
from ppc.prototypes import ALONE
from ppc.runtime import LocalRuntime
from ppc.train import checkpoints, fit
from ppc.trial import run_trial

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
VARIANTS: dict[str, dict[str, Any]] = {
    "official": {},
    "paper": {"contrast.preset": "paper"},
    "views": ALL_VIEWS,
    "cam": {"method.name": "cam", "views.target_px": 48},
    "no_contrast": {"contrast.prototype_top_k": 0},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes_root(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def loss_and_gradients(cfg: TrialConfig, device: torch.device) -> dict[str, torch.Tensor]:
    net = build_net(cfg, 3, pretrained=False).double().to(device).train()
    batch = formula_batch()
    batch["image_N3HW"] = batch["image_N3HW"].double()
    loss, terms = Losses(cfg, ALONE, 1)(net, batch, 5)
    loss.backward()
    grads = {f"d {n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert len(grads) > 10
    return {name: x.detach().cpu() for name, x in {"loss": loss, **terms, **grads}.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_the_cpu(name: str) -> None:
    cfg = tiny_config(VARIANTS[name])
    there, here = loss_and_gradients(cfg, GPU), loss_and_gradients(cfg, CPU)
    assert there.keys() == here.keys()
    for what, value in here.items():
        torch.testing.assert_close(there[what], value, rtol=1e-7, atol=1e-10, msg=lambda text, w=what: f"{w}: {text}")


def stage(path: Path) -> StageDir:
    path.mkdir(parents=True, exist_ok=True)
    return StageDir(path, "train_cam", "key")


def trained(cfg: TrialConfig, folder: Path, device: torch.device) -> list[tuple[int, dict[str, float]]]:
    fit(cam_job(cfg, device), stage(folder), cfg.runtime, device)
    return curve(stage(folder))


def test_a_loss_curve_is_that_of_the_cpu(tmp_path: Path, scenes: Path) -> None:
    cfg = tiny_config({"train.epochs": 3}, scenes)
    there, here = trained(cfg, tmp_path / "gpu", GPU), trained(cfg, tmp_path / "cpu", CPU)
    assert [step for step, _ in there] == [step for step, _ in here] == list(range(1, 7))
    for (_, mine), (_, theirs) in zip(there, here, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5)


def test_half_precision_trains_close_to_single(tmp_path: Path, scenes: Path) -> None:
    single = trained(tiny_config({"train.epochs": 3}, scenes), tmp_path / "single", GPU)
    half = trained(tiny_config({"train.epochs": 3, "train.precision": "bf16"}, scenes), tmp_path / "half", GPU)
    assert half != single
    assert half[-1][1]["train/cls"] == pytest.approx(single[-1][1]["train/cls"], rel=0.05)


def test_a_gpu_out_of_memory_is_told_and_the_trial_goes_on_when_there_is_room(tmp_path: Path, scenes: Path) -> None:
    big = {
        "train.epochs": 2, "train.crop_px": 640, "train.resize_long_px": [640, 640], "views.target_px": 64,
        "stages": ["train_cam", "make_seeds", "evaluate"],
    }  # fmt: skip
    storage = Storage(tmp_path)
    plan = Planner(storage).plan(tiny_config(big, scenes))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        with pytest.raises(Exception, match=r"^step 1 of 4 \(epoch 1\): out of memory with 4 images of 640x640"):
            run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    trial = storage.trial(plan.key)
    error = trial.error()
    assert trial.state()["state"] == "FAILED" and error is not None and error["stage"] == "train_cam"
    names = sorted(path.stem for path in (scenes / "JPEGImages").iterdir())
    train = [name for name in names if name in layout(scenes).ids("train")]
    expected = [layout(scenes).ids("train")[i] for i in epoch_order(len(train), seed=0, epoch=0)[:4]]
    assert f"images of the batch: {', '.join(expected)}" in error["message"]
    assert "ppc study resume STUDY --set runtime.workers=2" in error["message"]
    folder = storage.stage(*plan.stages[0])
    assert curve(folder) == [] and checkpoints(folder) == []
    assert run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())["metrics"]
