"""What the stages that train a net share: the worker, the optimiser of a config, and `weights.pt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from io import BytesIO
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import torch
from torch import nn

from ppc.artifacts import StageDir, read_json, write_json
from ppc.backbones import Backbone
from ppc.base_config import OptimConfig
from ppc.config import TrialConfig
from ppc.data import Dataset
from ppc.data.loader import Loader, TrainSet
from ppc.locks import locked
from ppc.normalisation import Normalisation
from ppc.optim import effective_momentum, make_sgd, param_groups
from ppc.places import StoragePath, atomic_write, read_bytes
from ppc.stages.context import StageContext
from ppc.train import Job, fit, rank, world_size
from ppc.weights import load_checked


@dataclass(frozen=True)
class Payload:
    """What a training worker is sent; `make_job(payload, device)` is a function of a module, so that it can travel."""

    cfg: TrialConfig
    folder: StageDir
    inputs: Mapping[str, StageDir]
    dataset: Dataset
    make_job: Callable[[Payload, torch.device], Job]


def train_net(context: StageContext, make_job: Callable[[Payload, torch.device], Job]) -> dict[str, Any]:
    """Train on the cluster or here; the last checkpoint becomes `weights.pt`. What is known of the weights it began
    with, for the stage's result."""
    cfg, folder = context.cfg, context.folder
    context.rt.train(worker, Payload(cfg, folder, context.inputs, context.dataset, make_job), cfg.runtime)
    report = read_json(folder / "weights_report.json")
    return {} if report is None else {"weights_report": report}


def worker(payload: Payload, device: torch.device) -> None:
    """One training worker. Two of the same stage never write at once: the first holds a lock until it dies."""
    cfg, folder = payload.cfg, payload.folder
    alone = locked(folder / ".train.lock") if rank() == 0 else nullcontext()
    with alone:
        job = payload.make_job(payload, device)
        if rank() == 0:
            _report_weights(job.net, folder)
        fit(job, folder, cfg.runtime, device)
        if rank() == 0:
            save_net(job.net, folder / "weights.pt")


def _backbone(net: nn.Module) -> Backbone:
    backbone = net.backbone
    assert isinstance(backbone, Backbone)
    return backbone


def _report_weights(net: nn.Module, folder: StageDir) -> None:
    """Say which pretrained tensors were loaded, here and in the stage's result."""
    report = _backbone(net).report
    if report is not None:
        print(report, flush=True)
        write_json(folder / "weights_report.json", {**asdict(report), "loaded": len(report.loaded)})


def optimizer_of(net: nn.Module, cfg: OptimConfig) -> torch.optim.Optimizer:
    """SGD over the four groups of METHOD 1.2, with the rates of a config."""
    groups = param_groups(
        net,
        weight_decay=cfg.weight_decay,
        new_layer_lr_mult=cfg.new_layer_lr_mult,
        bias_lr_mult=cfg.bias_lr_mult,
    )
    return make_sgd(groups, lr=cfg.learning_rate, momentum=effective_momentum(cfg.momentum, cfg.weight_decay))


def loader_of(samples: TrainSet, cfg: OptimConfig, trial: TrialConfig, device: torch.device) -> Loader:
    """This worker's batches of a training set."""
    return Loader(
        samples,
        batch_size=cfg.batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=trial.runtime.loader_workers,
        pin_memory=device.type == "cuda",
    )


def job_of(
    net: nn.Module,
    samples: TrainSet,
    losses: Any,
    cfg: OptimConfig,
    payload: Payload,
    device: torch.device,
    section: str,
) -> Job:
    """The training of a net with the rates of `cfg`, the config section of that dotted name."""
    loader = loader_of(samples, cfg, payload.cfg, device)
    return Job(
        net=net,
        optimizer=optimizer_of(net, cfg),
        batches=loader.epoch,
        losses=losses,
        epochs=cfg.epochs,
        steps_per_epoch=len(loader),
        poly_power=cfg.poly_power,
        precision=cfg.precision,
        ids=loader.global_ids,
        section=section,
    )


def save_net(net: nn.Module, path: StoragePath) -> None:
    """Write the net's weights with its input normalisation."""
    state = {
        "net": {k: v.cpu() for k, v in net.state_dict().items()},
        "normalisation": _backbone(net).normalisation.to_dict(),
    }
    with atomic_write(path) as handle:
        torch.save(state, handle)


def load_trained(net: nn.Module, path: StoragePath, device: torch.device) -> Normalisation:
    """Load `weights.pt` into a net and put it in eval mode on the device; the input normalisation it was trained with.

    ValueError when the file is gone, is damaged or holds another net.
    """
    again = "delete its folder and run again"
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, though its stage is done; {again}") from None
    try:
        state = load_checked(BytesIO(content), torch.device("cpu"))
    except (RuntimeError, EOFError, OSError, UnpicklingError, BadZipFile) as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged ({told}); {again}") from error
    try:
        net.load_state_dict(state["net"])
        normalisation = Normalisation.from_dict(state["normalisation"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold this trial's net ({error}); {again}") from error
    net.to(device).eval()
    return normalisation
