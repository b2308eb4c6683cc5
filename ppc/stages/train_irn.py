"""Train IRNet on the labels that the seeds' CAMs are sure of (METHOD 10).

Products: `labels/ID.png` (0 background, 255 unsure, else the class), `weights.pt`. Both phases look at
`data.train_split` alone; the first one's labels are there for the second wherever it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ppc.affinity import affinity_losses, pair_labels
from ppc.artifacts import Progress, StageDir
from ppc.backbones import backbone_problem, build_backbone
from ppc.boundaries import boundary_affinity, confident_labels, displacement_losses
from ppc.config import TrialConfig
from ppc.crf import PRESETS, refine_seed
from ppc.data import Dataset
from ppc.data.irn import IrnTrainSet
from ppc.figures import palette_png
from ppc.irn_net import STRIDE, IrnNet, head_groups, levels_problem
from ppc.net_config import IrnLabelsConfig
from ppc.normalisation import Normalisation
from ppc.optim import effective_momentum, make_sgd
from ppc.places import StoragePath, size_of
from ppc.prototypes import Workers
from ppc.seeding import derive_seed
from ppc.stages.context import StageContext
from ppc.stages.make_seeds import seedless, whole_cam
from ppc.stages.training import Payload, job_of, load_trained, train_net
from ppc.train import Job, gather, rank

CROP_STEP = 16  # pixels: the coarsest cell of a backbone, so that a crop has whole ones


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    cfg: IrnLabelsConfig
    folder: StageDir
    seeds: StageDir
    dataset: Dataset


def run(context: StageContext) -> dict[str, Any]:
    """Write the labels that are not there yet, then train."""
    cfg, dataset = context.cfg, context.dataset
    if (problem := seedless(cfg, dataset)) is not None:
        raise ValueError(problem)
    ids = list(dataset.ids(cfg.data.train_split))
    progress = Progress(context.folder / "progress.json", total=len(ids), unit="image", used=context.rt.meter.read)
    shared = Shared(cfg.irn.labels, context.folder, context.inputs["make_seeds"], dataset)
    context.rt.map(label_chunk, shared, ids, cfg.runtime, lambda done, _: progress.update(done))
    return {f"irn_{name}": value for name, value in train_net(context, make_job).items()}


# -- labels


def label_chunk(shared: Shared, ids: Sequence[str], device: torch.device) -> None:
    """Write the labels of some images: the CRF's at the high and at the low score, put together."""
    for image_id in ids:
        path = shared.folder / "labels" / f"{image_id}.png"
        if size_of(path) is not None:  # it was written whole
            continue
        keys, cam_KHW = whole_cam(shared.seeds, image_id)
        image_HW3 = shared.dataset.image(image_id)
        fg_label_HW, bg_label_HW = (
            torch.from_numpy(
                refine_seed(
                    image_HW3,
                    cam_KHW,
                    keys,
                    background=score,
                    num_classes=shared.dataset.num_classes + 1,
                    params=PRESETS[shared.cfg.crf_preset],
                )
            ).long()
            for score in (shared.cfg.fg_score, shared.cfg.bg_score)
        )
        palette_png(confident_labels(fg_label_HW, bg_label_HW).numpy(), path)


# -- training


def make_job(payload: Payload, device: torch.device) -> Job:
    """Net, optimiser, batches and losses of a trial, for this worker."""
    cfg, irn = payload.cfg, payload.cfg.irn
    net = build_irn_net(cfg, pretrained=True)
    samples = IrnTrainSet(
        payload.dataset,
        cfg.data.train_split,
        payload.folder / "labels",
        crop_px=irn.train.crop_px,
        scale=irn.scale,
        normalise=net.backbone.normalisation.apply,
        seed=cfg.seed,
    )
    groups = head_groups(
        net,
        weight_decay=irn.train.weight_decay,
        displacement_lr_mult=irn.train.new_layer_lr_mult,
        bias_lr_mult=irn.train.bias_lr_mult,
    )
    momentum = effective_momentum(irn.train.momentum, irn.train.weight_decay)
    optimizer = make_sgd(groups, lr=irn.train.learning_rate, momentum=momentum)
    losses = IrnLosses(irn.radius, Workers(rank(), gather))
    return replace(job_of(net, samples, losses, irn.train, payload, device, "irn.train"), optimizer=optimizer)


@dataclass(frozen=True)
class IrnLosses:
    """The loss of one batch: this worker's share of (positive + negative) / 2 + displacements / 2, and of its terms."""

    radius: int
    workers: Workers

    def __call__(self, net: nn.Module, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms are weighted already: their sum is the loss (METHOD 10)."""
        device = next(net.parameters()).device
        out = net(batch["image_N3HW"].to(device, non_blocking=True))
        with torch.autocast(device.type, enabled=False):
            edge, displacement = (x if x.dtype == torch.float64 else x.float() for x in out)
            labels = pair_labels(batch["label_Nhw"].to(device, non_blocking=True), radius=self.radius)
            boundary = affinity_losses(boundary_affinity(edge, radius=self.radius), labels, workers=self.workers)
            moved = displacement_losses(displacement, labels, radius=self.radius, workers=self.workers)
        terms = {f"boundary_{kind}": value for kind, value in boundary.items()}
        terms |= {f"displacement_{kind}": value for kind, value in moved.items()}
        return torch.stack(list(terms.values())).sum(), terms


def build_irn_net(cfg: TrialConfig, *, pretrained: bool) -> IrnNet:
    """The trial's IRNet, initialised from its seed; `pretrained` loads the backbone's weight file."""
    backbone = cfg.backbone_of("irn")
    return IrnNet(
        build_backbone(
            backbone.name,
            output_stride=backbone.output_stride,
            weights=backbone.weights if pretrained else None,
            normalisation=backbone.normalisation,
            seed=derive_seed("backbone", cfg.seed),
        ),
        seed=derive_seed("irn", cfg.seed),
    )


@lru_cache(maxsize=1)
def load_irn_net(cfg_json: str, path: StoragePath, device: torch.device) -> tuple[IrnNet, Normalisation]:
    """A trained IRNet in eval mode and its normalisation; kept for the next call of this process.

    ValueError when the file is damaged or holds another net.
    """
    net = build_irn_net(TrialConfig.model_validate_json(cfg_json), pretrained=False)
    return net, load_trained(net, path, device)


# -- what a config asks for and cannot get


def problems(cfg: TrialConfig) -> Iterator[tuple[str, str]]:
    """What of section irn cannot be, as (dotted field, problem)."""
    if "train_irn" not in cfg.stages:
        return
    crop_px, radius = cfg.irn.train.crop_px, cfg.irn.radius
    if crop_px % CROP_STEP:
        yield "irn.train.crop_px", f"{crop_px} is not a multiple of {CROP_STEP}"
    elif crop_px // STRIDE <= 2 * (radius - 1):
        yield (
            "irn.train.crop_px",
            f"{crop_px} pixels are {crop_px // STRIDE} cells, which hold no pairs of irn.radius {radius}: "
            f"more than {2 * (radius - 1) * STRIDE} are needed",
        )
    if cfg.irn.labels.crf_preset not in PRESETS:
        yield "irn.labels.crf_preset", f"no preset {cfg.irn.labels.crf_preset!r}; there are {', '.join(PRESETS)}"
    backbone = cfg.backbone_of("irn")
    if (problem := _levels_problem(backbone.name, backbone.output_stride)) is not None:
        yield "irn.backbone.name", f"{backbone.name} {problem}"


@cache
def _levels_problem(name: str, output_stride: int) -> str | None:
    """Why IRNet cannot read a backbone that can be built; nothing is allocated for it."""
    if backbone_problem(name, output_stride) is not None:
        return None  # told already
    with torch.device("meta"):
        backbone = build_backbone(name, output_stride=output_stride, weights=None, normalisation="auto", seed=0)
    return levels_problem(backbone.level_info)
