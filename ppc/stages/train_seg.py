"""Train the segmentation net on label maps of this trial, or on the dataset's own. Product: `weights.pt`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppc.backbones import build_backbone
from ppc.config import TrialConfig
from ppc.data import Dataset
from ppc.data.loader import Normalise, TrainSet
from ppc.data.transforms import apply_crop, augment_segment
from ppc.deeplab import SegNet, official_momentum
from ppc.dropout import set_dropout_seeds
from ppc.figures import read_palette_png
from ppc.normalisation import Normalisation
from ppc.places import StoragePath, size_of
from ppc.seeding import derive_rng, derive_seed
from ppc.segmentation import IGNORE, segmentation_loss
from ppc.stages.context import StageContext
from ppc.stages.products import PRODUCTS
from ppc.stages.training import Payload, job_of, load_trained, train_net
from ppc.train import Job, gather
from ppc.weights import initialisation

TRUTH = "truth"


def run(context: StageContext) -> dict[str, Any]:
    """Train on the cluster or here. The result says what trained the net, and from what it started."""
    cfg, dataset = context.cfg, context.dataset
    trained = train_net(context, make_job)
    return {
        "segmentation": {
            "initialisation": initialisation(trained.get("weights_report")),
            "masks": cfg.segmentation.masks,
            **trained,
        },
        "class_names": ["background", *dataset.class_names],
        "counts": {cfg.data.train_split: len(dataset.ids(cfg.data.train_split))},
        "label_source": dataset.label_source,
    }


def masks_of(payload: Payload) -> StoragePath | None:
    """Folder of the label maps that train the net; None: the dataset's own."""
    name = payload.cfg.segmentation.masks
    if name == TRUTH:
        return None
    stage, folder = PRODUCTS[name]
    return payload.inputs[stage] / folder


def make_job(payload: Payload, device: torch.device) -> Job:
    """Net, optimiser, batches and loss of a trial's segmentation net, for this worker."""
    cfg, own = payload.cfg, payload.cfg.segmentation
    net = build_seg_net(cfg, payload.dataset.num_classes, pretrained=True)
    samples = SegTrainSet(
        payload.dataset,
        cfg.data.train_split,
        masks=masks_of(payload),
        scale=own.scale,
        hsv=own.hsv,
        crop_px=own.train.crop_px,
        normalise=net.backbone.normalisation.apply,
        seed=cfg.seed,
    )
    return job_of(net, samples, SegLoss(), own.train, payload, device, "segmentation.train")


def build_seg_net(cfg: TrialConfig, num_fg: int, *, pretrained: bool) -> SegNet:
    """The trial's segmentation net, initialised from its seed; `pretrained` loads the backbone's weight file."""
    own, backbone = cfg.segmentation, cfg.backbone_of("segmentation")
    body = build_backbone(
        backbone.name,
        output_stride=backbone.output_stride,
        weights=backbone.weights if pretrained else None,
        normalisation=backbone.normalisation,
        seed=derive_seed("segmentation backbone", cfg.seed),
    )
    at_body, at_head = own.bn_momentum_backbone, own.bn_momentum_head
    return SegNet(
        body,
        num_classes=num_fg + 1,
        head=own.head,
        dropout=own.dropout,
        batch_norm=own.batch_norm,
        momentum_backbone=official_momentum(backbone.name, "backbone") if at_body == "official" else at_body,
        momentum_head=official_momentum(backbone.name, "head") if at_head == "official" else at_head,
        seed=derive_seed("segmentation head", cfg.seed),
    )


@lru_cache(maxsize=1)
def load_seg_net(cfg_json: str, num_fg: int, path: StoragePath, device: torch.device) -> tuple[SegNet, Normalisation]:
    """A trained net in eval mode and its normalisation; kept for the next call of this process.

    ValueError when the file is damaged or holds another net.
    """
    net = build_seg_net(TrialConfig.model_validate_json(cfg_json), num_fg, pretrained=False)
    return net, load_trained(net, path, device)


class SegTrainSet(TrainSet):
    """Augmented images with their label maps: those in a folder of this trial, or the split's own masks."""

    def __init__(
        self,
        layout: Dataset,
        split: str,
        *,
        masks: StoragePath | None,
        scale: tuple[float, float],
        hsv: bool,
        crop_px: int,
        normalise: Normalise,
        seed: int,
    ) -> None:
        """`masks` holds ID.png; None: the masks of the dataset."""
        super().__init__(layout.ids(split), seed=seed)
        self.layout, self.split, self.masks = layout, split, masks
        self.scale, self.hsv, self.crop_px, self.normalise = scale, hsv, crop_px, normalise

    def label(self, image_id: str) -> NDArray[np.uint8]:
        """Label map (H, W): 0 background, 1..K, 255 ignored. ValueError, naming both sides, for one that cannot be."""
        if self.masks is None:
            return self.layout.mask(image_id, split=self.split)
        path = self.masks / f"{image_id}.png"
        if size_of(path) is None:
            raise ValueError(
                f"{path}: there is no pseudo mask of {image_id}, an image of data.train_split {self.split}, on which "
                "the segmentation net trains; were the masks made for other splits? see seeds.splits"
            )
        label_HW: NDArray[np.uint8] = read_palette_png(path)
        if unknown := [v for v in np.unique(label_HW).tolist() if self.layout.num_classes < v < IGNORE]:
            raise ValueError(
                f"{path}: class {unknown[0]}, but the dataset {self.layout.root} has the classes 0 to "
                f"{self.layout.num_classes} (and 255, ignored); delete {self.masks.parent}, so that they are made again"
            )
        height, width = self.layout.image_size(image_id)
        if label_HW.shape != (height, width):
            raise ValueError(
                f"{path}: {label_HW.shape[1]}x{label_HW.shape[0]} pixels, but its image in {self.layout.root} has "
                f"{width}x{height}; delete {self.masks.parent}, so that they are made again"
            )
        return label_HW

    def sample(self, epoch: int, image_id: str) -> dict[str, Any]:
        """Image and label map by the same draw; the crop is padded with 0 (after normalisation) and with 255."""
        image_HW3, label_HW, box = augment_segment(
            self.layout.image(image_id),
            self.label(image_id),
            scale=self.scale,
            hsv=self.hsv,
            crop_px=self.crop_px,
            rng=derive_rng("segment", self.seed, epoch, image_id),
        )
        image_HW3 = self.normalise(image_HW3).permute(1, 2, 0).numpy()
        return {
            "image_3HW": torch.from_numpy(apply_crop(image_HW3, box, fill=0)).permute(2, 0, 1).contiguous(),
            "label_HW": torch.from_numpy(apply_crop(label_HW, box, fill=IGNORE)),
            "id": image_id,
            "sample_seed": derive_seed("segment sample", self.seed, epoch, image_id),
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples stacked: images float32, labels uint8, seeds int64."""
        return {
            "image_N3HW": torch.stack([s["image_3HW"] for s in samples]),
            "label_NHW": torch.stack([s["label_HW"] for s in samples]),
            "ids": [s["id"] for s in samples],
            "sample_seed_N": torch.tensor([s["sample_seed"] for s in samples], dtype=torch.int64),
        }


@dataclass(frozen=True)
class SegLoss:
    """The loss of one batch, as `train.fit` wants it: this worker's share."""

    def __call__(self, net: nn.Module, batch: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Forward, and the cross-entropy over the labelled pixels of all workers."""
        device = next(net.parameters()).device
        label_NHW = batch["label_NHW"].to(device, non_blocking=True)
        set_dropout_seeds(net, [int(seed) for seed in batch["sample_seed_N"]])
        logit_NChw = net(batch["image_N3HW"].to(device, non_blocking=True))
        num_pixels = gather((label_NHW != IGNORE).sum().view(1)).sum()
        with torch.autocast(device.type, enabled=False):
            wide = logit_NChw if logit_NChw.dtype == torch.float64 else logit_NChw.float()
            loss = segmentation_loss(wide, label_NHW, num_pixels_global=num_pixels)
        return loss, {"cross_entropy": loss}
