"""Train the CAM net on image tags. Product: `weights.pt`, the net with the input normalisation it was trained with."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO
from pickle import UnpicklingError
from typing import Any

import torch

from ppc.artifacts import StageDir, read_json, write_json
from ppc.backbones import Normalisation
from ppc.config import SALIENCY, TrialConfig
from ppc.data import VocLayout
from ppc.data.loader import CamLoader, CamTrainSet
from ppc.methods import Losses, build_net, net_normalisation
from ppc.nets import CamNet
from ppc.optim import effective_momentum, make_sgd, param_groups
from ppc.places import StoragePath, atomic_write, locked, read_bytes
from ppc.prototypes import Workers
from ppc.stages.context import StageContext
from ppc.train import Job, fit, gather, rank, world_size


@dataclass(frozen=True)
class Payload:
    """What a training worker is sent."""

    cfg: TrialConfig
    folder: StageDir
    dataset: VocLayout


def run(context: StageContext) -> dict[str, Any]:
    """Train on the cluster or here; the last checkpoint becomes the weights."""
    cfg, folder, dataset = context.cfg, context.folder, context.dataset
    context.rt.train(worker, Payload(cfg, folder, dataset), cfg.runtime)
    report = read_json(folder / "weights_report.json")
    return {
        "class_names": ["background", *dataset.class_names],
        "counts": {cfg.data.train_split: len(dataset.ids(cfg.data.train_split))},
        "label_source": dataset.label_source,
        **({} if report is None else {"weights_report": report}),
    }


def worker(payload: Payload, device: torch.device) -> None:
    """One training worker. Two of the same stage never write at once: the first holds a lock until it dies."""
    cfg, folder = payload.cfg, payload.folder
    alone = locked(folder / ".train.lock") if rank() == 0 else nullcontext()
    with alone:
        job, net = make_job(payload.cfg, payload.dataset, device)
        if rank() == 0:
            _report_weights(net, folder)
        fit(job, folder, cfg.runtime, device)
        if rank() == 0:
            save_net(net, folder / "weights.pt")


def _report_weights(net: CamNet, folder: StageDir) -> None:
    """Say which pretrained tensors were loaded, here and in the stage's result."""
    report = net.backbone.report
    if report is not None:
        print(report, flush=True)
        write_json(folder / "weights_report.json", {**asdict(report), "loaded": len(report.loaded)})


def make_job(cfg: TrialConfig, dataset: VocLayout, device: torch.device) -> tuple[Job, CamNet]:
    """Net, optimiser, batches and losses of a trial, for this worker."""
    net = build_net(cfg, dataset.num_classes, pretrained=True)
    groups = param_groups(
        net,
        weight_decay=cfg.train.weight_decay,
        new_layer_lr_mult=cfg.train.new_layer_lr_mult,
        bias_lr_mult=cfg.train.bias_lr_mult,
    )
    momentum = effective_momentum(cfg.train.momentum, cfg.train.weight_decay)
    samples = CamTrainSet(
        dataset,
        cfg.data.train_split,
        crop_px=cfg.train.crop_px,
        resize_long_px=cfg.train.resize_long_px,
        color_jitter=cfg.train.color_jitter,
        normalise=net_normalisation(net).apply,
        seed=cfg.seed,
        with_saliency=cfg.method.name in SALIENCY,
    )
    loader = CamLoader(
        samples,
        batch_size=cfg.train.batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=cfg.runtime.loader_workers,
        pin_memory=device.type == "cuda",
    )
    job = Job(
        net=net,
        optimizer=make_sgd(groups, lr=cfg.train.learning_rate, momentum=momentum),
        batches=loader.epoch,
        losses=Losses(cfg, Workers(rank(), gather), world_size()),
        epochs=cfg.train.epochs,
        steps_per_epoch=len(loader),
        poly_power=cfg.train.poly_power,
        precision=cfg.train.precision,
        ids=loader.global_ids,
    )
    return job, net


def save_net(net: CamNet, path: StoragePath) -> None:
    """Write the net's weights with its input normalisation."""
    state = {
        "net": {k: v.cpu() for k, v in net.state_dict().items()},
        "normalisation": net_normalisation(net).to_dict(),
    }
    with atomic_write(path) as handle:
        torch.save(state, handle)


@lru_cache(maxsize=1)
def load_net(cfg_json: str, num_fg: int, path: StoragePath, device: torch.device) -> tuple[CamNet, Normalisation]:
    """A trained net in eval mode and its normalisation; kept for the next call of this process.

    ValueError when the file is damaged or holds another net.
    """
    net = build_net(TrialConfig.model_validate_json(cfg_json), num_fg, pretrained=False)
    try:
        state = torch.load(BytesIO(read_bytes(path)), map_location="cpu", weights_only=True)
        net.load_state_dict(state["net"])
    except (RuntimeError, EOFError, OSError, KeyError, UnpicklingError) as error:
        raise ValueError(f"{path} does not hold this trial's net ({error}); delete its folder and run again") from error
    return net.to(device).eval(), Normalisation.from_dict(state["normalisation"])
