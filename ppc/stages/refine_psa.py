"""Random walk of each image's scores over AffinityNet's affinities (METHOD 8). Product: `masks/ID.png`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppc.affinity import (
    STRIDE,
    constant_background,
    fit_radius,
    mask_from_scores,
    pad_to_grid,
    power_background,
    walk_scores,
)
from ppc.artifacts import Progress, StageDir
from ppc.config import TrialConfig
from ppc.crf import PRESETS, refine_scores
from ppc.data import Dataset
from ppc.figures import palette_png
from ppc.net_config import PsaWalkConfig
from ppc.places import StoragePath, size_of
from ppc.stages.context import StageContext
from ppc.stages.make_seeds import images_of, whole_cam
from ppc.stages.train_psa import load_net


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    cfg: TrialConfig
    folder: StageDir
    seeds: StageDir
    weights: StoragePath
    dataset: Dataset


def run(context: StageContext) -> dict[str, Any]:
    """Walk for every image that has a CAM."""
    cfg, folder = context.cfg, context.folder
    ids = list(dict.fromkeys(image_id for _, image_id in images_of(cfg, context.dataset)))
    progress = Progress(folder / "progress.json", total=len(ids), unit="image", used=context.rt.meter.read)
    weights = context.inputs["train_psa"] / "weights.pt"
    shared = Shared(cfg, folder, context.inputs["make_seeds"], weights, context.dataset)
    context.rt.map(refine_chunk, shared, ids, cfg.runtime, lambda done, _: progress.update(done), use_gpu=True)
    return {}


def refine_chunk(shared: Shared, ids: Sequence[str], device: torch.device) -> None:
    """Write the masks of some images."""
    cfg, walk = shared.cfg, shared.cfg.psa.walk
    for image_id in ids:
        path = shared.folder / "masks" / f"{image_id}.png"
        if size_of(path) is not None:  # it was written whole
            continue
        net, normalisation = load_net(cfg.model_dump_json(), shared.weights, device)
        keys, cam_KHW = whole_cam(shared.seeds, image_id)
        image_HW3 = shared.dataset.image(image_id)
        radius = walk_radius(image_id, image_HW3.shape[:2], cfg)
        with torch.inference_mode():
            padded_3HW = pad_to_grid(normalisation.apply(image_HW3).to(device))
            feature_Dhw = net(padded_3HW[None])[0]
            score_CHW = with_background(torch.from_numpy(cam_KHW).to(device), walk)
            walked_CHW = walk_scores(
                score_CHW, feature_Dhw, radius=radius, beta=walk.beta, log2_steps=walk.log2_steps
            ).cpu()
        if walk.crf is not None:
            q_CHW = refine_scores(
                image_HW3, walked_CHW, keys, num_classes=shared.dataset.num_classes + 1, params=PRESETS[walk.crf]
            )
            walked_CHW = torch.from_numpy(q_CHW)
        palette_png(mask_from_scores(walked_CHW, keys), path)


def with_background(cam_KHW: Tensor, walk: PsaWalkConfig) -> Tensor:
    """The scores (C,H,W) that walk: the CAM, with the background that the config says in front."""
    if walk.background == "power":
        return power_background(cam_KHW, bg_power=walk.bg_power)
    return constant_background(cam_KHW, bg_score=walk.bg_score)


def walk_radius(image_id: str, size: tuple[int, int], cfg: TrialConfig) -> int:
    """The radius of the pairs of an image of `size` pixels. ValueError where it is too small for any."""
    h, w = (-(-side // STRIDE) for side in size)
    radius = cfg.psa.radius
    if cfg.psa.walk.fit_radius:
        return fit_radius(h, w, radius=radius)
    if h < radius or w < 2 * radius - 1:
        raise ValueError(
            f"{image_id}: {h} x {w} cells of {STRIDE} pixels have no pairs of psa.radius {radius}; set "
            "psa.walk.fit_radius=true, which takes a smaller radius for such an image"
        )
    return radius
