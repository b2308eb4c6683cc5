"""Predict with the segmentation net: scales, mirror, mean of the logits, dense CRF. Product: `masks/ID.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ppc.artifacts import Progress, StageDir
from ppc.config import TrialConfig
from ppc.crf import LABEL_GT_PROB, PRESETS, CrfParams, crf_labels, crf_soft
from ppc.data import Dataset
from ppc.deeplab import SegNet
from ppc.figures import palette_png
from ppc.normalisation import Normalisation
from ppc.places import StoragePath, size_of
from ppc.segmentation import merge_logits
from ppc.stages.context import StageContext
from ppc.stages.train_seg import load_seg_net


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    cfg: TrialConfig
    folder: StageDir
    weights: StoragePath
    dataset: Dataset


def run(context: StageContext) -> dict[str, Any]:
    """Predict every image of the test splits."""
    cfg, dataset = context.cfg, context.dataset
    ids = list(dict.fromkeys(i for split in cfg.segmentation.test.splits for i in dataset.ids(split)))
    progress = Progress(context.folder / "progress.json", total=len(ids), unit="image", used=context.rt.meter.read)
    shared = Shared(cfg, context.folder, context.inputs["train_seg"] / "weights.pt", dataset)
    context.rt.map(predict_chunk, shared, ids, cfg.runtime, lambda done, _: progress.update(done), use_gpu=True)
    return {"segmentation": {"crf": cfg.segmentation.test.crf}}


def predict_chunk(shared: Shared, ids: Sequence[str], device: torch.device) -> None:
    """Write the label maps of some images that are not there yet."""
    cfg, dataset, test = shared.cfg, shared.dataset, shared.cfg.segmentation.test
    params = None if test.crf is None else PRESETS[test.crf]
    for image_id in ids:
        path = shared.folder / "masks" / f"{image_id}.png"
        if size_of(path) is not None:  # it was written whole
            continue
        net, normalisation = load_seg_net(cfg.model_dump_json(), dataset.num_classes, shared.weights, device)
        image = dataset.image(image_id)
        prob_CHW = predict(net, normalisation, image, scales=test.scales, flip=test.flip, device=device)
        palette_png(label_of(image, prob_CHW, params), path)


@torch.inference_mode()
def predict(
    net: SegNet,
    normalisation: Normalisation,
    image_HW3: NDArray[np.uint8],
    *,
    scales: Sequence[float],
    flip: bool,
    device: torch.device,
) -> NDArray[np.float32]:
    """Class probabilities (C, H, W) of an image (METHOD 11): the normalised image is resized, cubic, to each scale."""
    height, width = image_HW3.shape[:2]
    normalised_HW3 = normalisation.apply(image_HW3).permute(1, 2, 0).numpy()
    logits: list[Tensor] = []
    for scale in scales:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        scaled = normalised_HW3 if scale == 1 else cv2.resize(normalised_HW3, size, interpolation=cv2.INTER_CUBIC)
        view_3HW = torch.from_numpy(np.ascontiguousarray(scaled)).permute(2, 0, 1).to(device)
        logits.append(net(view_3HW[None])[0].float())
        if flip:
            logits.append(net(view_3HW.flip(-1)[None])[0].flip(-1).float())
    prob_CHW: NDArray[np.float32] = merge_logits(logits, size=(height, width)).cpu().numpy()
    return prob_CHW


def label_of(
    image_HW3: NDArray[np.uint8], prob_CHW: NDArray[np.float32], params: CrfParams | None
) -> NDArray[np.uint8]:
    """Label map of class probabilities, after the CRF if there is one."""
    if params is not None and params.unary == "soft":
        prob_CHW = crf_soft(image_HW3, prob_CHW, params=params)
    elif params is not None:
        prob_CHW = crf_labels(
            image_HW3, prob_CHW.argmax(0), num_labels=len(prob_CHW), gt_prob=LABEL_GT_PROB, params=params
        )
    label_HW: NDArray[np.uint8] = prob_CHW.argmax(0).astype(np.uint8)
    return label_HW
