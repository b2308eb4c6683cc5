"""Train AffinityNet on what the CAMs are sure of (METHOD 8).

Products: `labels/ID.npz` (keys K; low and high (C,H,W) float32: what the CRF makes of [background, classes] at the low
and the high background power), and `weights.pt`, the net with its input normalisation.

N images of a worker's batch, K an image's own classes, C = K+1, h w the grid of 8 pixels a cell.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any, TypedDict
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from ppc.affinity import STRIDE, affinity_label, affinity_losses, pair_affinity, pair_labels, power_background
from ppc.affinity_net import AffinityNet
from ppc.artifacts import Progress, StageDir
from ppc.backbones import build_backbone
from ppc.config import TrialConfig
from ppc.crf import PRESETS, refine_scores
from ppc.data import Dataset
from ppc.data.loader import Normalise, TrainSet
from ppc.data.transforms import augment_affinity
from ppc.dropout import set_dropout_seeds
from ppc.faults import StorageError
from ppc.normalisation import Normalisation
from ppc.places import StoragePath, atomic_write, read_bytes, size_of
from ppc.prototypes import Workers
from ppc.seeding import derive_rng, derive_seed
from ppc.stages.context import StageContext
from ppc.stages.make_seeds import seedless, whole_cam
from ppc.stages.training import Payload, job_of, load_trained, train_net
from ppc.train import Job, gather, rank


def problems(cfg: TrialConfig) -> Iterator[tuple[str, str]]:
    """What of section psa cannot be, as (dotted field, problem)."""
    psa = cfg.psa
    for field, name in (("psa.labels.crf", psa.labels.crf), ("psa.walk.crf", psa.walk.crf)):
        if name is not None and name not in PRESETS:
            yield field, f"no preset {name!r}; there are {', '.join(PRESETS)}"
    if "train_psa" not in cfg.stages:
        return
    backbone = cfg.backbone_of("psa")
    if backbone.output_stride != STRIDE:
        section = "backbone" if backbone is cfg.backbone else "psa.backbone"
        yield f"{section}.output_stride", f"is {backbone.output_stride}, but AffinityNet (train_psa) needs {STRIDE}"
    least = STRIDE * (2 * psa.radius - 1)
    if psa.train.crop_px % STRIDE or psa.train.crop_px < least:
        yield (
            "psa.train.crop_px",
            f"{psa.train.crop_px} is not a multiple of {STRIDE}, or less than the {least} that pairs of psa.radius "
            f"{psa.radius} need",
        )


# -- the stage


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    cfg: TrialConfig
    folder: StageDir
    seeds: StageDir
    dataset: Dataset


def run(context: StageContext) -> dict[str, Any]:
    """Make the labels of the training split that are not there yet, then train."""
    cfg, dataset, folder = context.cfg, context.dataset, context.folder
    if (problem := seedless(cfg, dataset)) is not None:
        raise ValueError(problem)
    ids = list(dict.fromkeys(dataset.ids(cfg.data.train_split)))
    progress = Progress(folder / "progress.json", total=len(ids), unit="image", used=context.rt.meter.read)
    shared = Shared(cfg, folder, context.inputs["make_seeds"], dataset)
    context.rt.map(label_chunk, shared, ids, cfg.runtime, lambda done, _: progress.update(done))
    return {f"psa_{name}": value for name, value in train_net(context, make_job).items()}


def label_chunk(shared: Shared, ids: Sequence[str], device: torch.device) -> None:
    """Write the label scores of some images."""
    labels = shared.cfg.psa.labels
    for image_id in ids:
        path = shared.folder / "labels" / f"{image_id}.npz"
        if size_of(path) is not None:  # it was written whole
            continue
        keys, cam_KHW = whole_cam(shared.seeds, image_id)
        image_HW3 = shared.dataset.image(image_id)
        low_CHW, high_CHW = (
            refine_scores(
                image_HW3,
                power_background(torch.from_numpy(cam_KHW), bg_power=power).numpy(),
                keys,
                num_classes=shared.dataset.num_classes + 1,
                params=PRESETS[labels.crf],
            )
            for power in (labels.bg_power_low, labels.bg_power_high)
        )
        with atomic_write(path) as handle:  # most scores are next to 0 or 1: packed they are a fraction
            np.savez_compressed(handle, keys=keys, low=low_CHW, high=high_CHW)


def read_scores(path: StoragePath) -> tuple[Any, Any]:
    """The scores (C,H,W) of an image at the low and at the high power. ValueError when the file is damaged."""
    try:
        with np.load(BytesIO(read_bytes(path))) as stored:
            return stored["low"], stored["high"]
    except StorageError:
        raise
    except (EOFError, ValueError, KeyError, OSError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} does not hold the label scores of an image; delete it and run again") from error


# -- batches


class Sample(TypedDict):
    """One augmented image and its affinity labels: 0 background, 255 unsure, else a class of this image."""

    image_3HW: Tensor
    label_hw: Tensor
    id: str
    sample_seed: int


class AffinitySet(TrainSet):
    """Augmented images with their affinity labels, from the scores in a folder."""

    def __init__(
        self,
        layout: Dataset,
        split: str,
        *,
        labels: StoragePath,
        crop_px: int,
        color_jitter: bool,
        normalise: Normalise,
        seed: int,
    ) -> None:
        """`normalise` takes uint8 (H, W, 3) to a float32 tensor (3, H, W), pixel by pixel."""
        super().__init__(layout.ids(split), seed=seed)
        self.layout, self.labels, self.normalise = layout, labels, normalise
        self.crop_px, self.color_jitter = crop_px, color_jitter

    def sample(self, epoch: int, image_id: str) -> Sample:
        """The image and its scores cropped and mirrored alike, the scores brought to labels."""
        scores = read_scores(self.labels / f"{image_id}.npz")
        image_HW3, score_XHW = augment_affinity(
            self.layout.image(image_id),
            np.concatenate(scores),
            crop_px=self.crop_px,
            color_jitter=self.color_jitter,
            rng=derive_rng("augment", self.seed, epoch, image_id),
        )
        low_CHW, high_CHW = torch.from_numpy(score_XHW).chunk(2)
        return {
            "image_3HW": self.normalise(image_HW3),  # with its padding (METHOD 1.1), unlike the CAM net's
            "label_hw": affinity_label(low_CHW, high_CHW),
            "id": image_id,
            "sample_seed": derive_seed("sample", self.seed, epoch, image_id),
        }

    def collate(self, samples: list[Sample]) -> dict[str, Any]:
        """Stack samples into a batch."""
        return {
            "image_N3HW": torch.stack([s["image_3HW"] for s in samples]),
            "label_Nhw": torch.stack([s["label_hw"] for s in samples]),
            "ids": [s["id"] for s in samples],
            "sample_seed_N": torch.tensor([s["sample_seed"] for s in samples], dtype=torch.int64),
        }


# -- net and loss


def build_net(cfg: TrialConfig, *, pretrained: bool) -> AffinityNet:
    """The trial's AffinityNet, initialised from its seed; `pretrained` loads the backbone's weight file."""
    chosen = cfg.backbone_of("psa")
    backbone = build_backbone(
        chosen.name,
        output_stride=chosen.output_stride,
        weights=chosen.weights if pretrained else None,
        normalisation=chosen.normalisation,
        seed=derive_seed("psa backbone", cfg.seed),
    )
    return AffinityNet(backbone, seed=derive_seed("psa head", cfg.seed))


@dataclass(frozen=True)
class AffinityLoss:
    """The loss of one batch, as `train.fit` wants it: this worker's share of the sum and of each term."""

    radius: int
    workers: Workers

    def __call__(self, net: nn.Module, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Features, affinities of the pairs, and the balanced cross-entropy of METHOD 8. Without pairs it is 0."""
        device = next(net.parameters()).device
        set_dropout_seeds(net, [int(s) for s in batch["sample_seed_N"]])
        feature_NDhw = net(batch["image_N3HW"].to(device, non_blocking=True))
        if feature_NDhw.dtype in (torch.bfloat16, torch.float16):
            feature_NDhw = feature_NDhw.float()  # half precision has too few digits for losses
        with torch.autocast(device.type, enabled=False):
            labels = pair_labels(batch["label_Nhw"].to(device, non_blocking=True), radius=self.radius)
            affinity_NEyx = pair_affinity(feature_NDhw, radius=self.radius)
            terms = affinity_losses(affinity_NEyx, labels, workers=self.workers)
        return torch.stack(list(terms.values())).sum(), terms


def make_job(payload: Payload, device: torch.device) -> Job:
    """Net, optimiser, batches and loss of a trial's AffinityNet, for this worker."""
    cfg = payload.cfg
    net = build_net(cfg, pretrained=True)
    samples = AffinitySet(
        payload.dataset,
        cfg.data.train_split,
        labels=payload.folder / "labels",
        crop_px=cfg.psa.train.crop_px,
        color_jitter=cfg.psa.color_jitter,
        normalise=net.backbone.normalisation.apply,
        seed=cfg.seed,
    )
    losses = AffinityLoss(cfg.psa.radius, Workers(rank(), gather))
    return job_of(net, samples, losses, cfg.psa.train, payload, device, "psa.train")


@lru_cache(maxsize=1)
def load_net(cfg_json: str, path: StoragePath, device: torch.device) -> tuple[AffinityNet, Normalisation]:
    """A trained AffinityNet in eval mode and its normalisation; kept for the next call of this process.

    ValueError when the file is damaged or holds another net.
    """
    net = build_net(TrialConfig.model_validate_json(cfg_json), pretrained=False)
    return net, load_trained(net, path, device)
