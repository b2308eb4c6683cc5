"""Train the CAM net on image tags. Product: `weights.pt`, the net with the input normalisation it was trained with."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from ppc.config import SALIENCY, TrialConfig
from ppc.data.loader import CamTrainSet
from ppc.methods import Losses, build_net, net_normalisation
from ppc.nets import CamNet
from ppc.normalisation import Normalisation
from ppc.places import StoragePath
from ppc.prototypes import Workers
from ppc.stages.context import StageContext
from ppc.stages.training import Payload, job_of, load_trained, train_net
from ppc.train import Job, gather, rank, world_size


def run(context: StageContext) -> dict[str, Any]:
    """Train on the cluster or here."""
    cfg, dataset = context.cfg, context.dataset
    return {
        **train_net(context, make_job),
        "class_names": ["background", *dataset.class_names],
        "counts": {cfg.data.train_split: len(dataset.ids(cfg.data.train_split))},
        "label_source": dataset.label_source,
    }


def make_job(payload: Payload, device: torch.device) -> Job:
    """Net, optimiser, batches and losses of a trial, for this worker."""
    cfg, dataset = payload.cfg, payload.dataset
    net = build_net(cfg, dataset.num_classes, pretrained=True)
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
    steps = cfg.train.epochs * (len(samples) // cfg.train.batch_size)
    alone = math.floor(cfg.contrast.start_after * steps + 1e-9)  # below 1, so the last step is never alone
    losses = Losses(cfg, Workers(rank(), gather), world_size(), contrast_from=alone)
    return job_of(net, samples, losses, cfg.train, payload, device, "train")


@lru_cache(maxsize=1)
def load_net(cfg_json: str, num_fg: int, path: StoragePath, device: torch.device) -> tuple[CamNet, Normalisation]:
    """A trained net in eval mode and its normalisation; kept for the next call of this process.

    ValueError when the file is damaged or holds another net.
    """
    net = build_net(TrialConfig.model_validate_json(cfg_json), num_fg, pretrained=False)
    return net, load_trained(net, path, device)
