"""IRN's refinement: a random walk of the CAM that IRNet's class boundaries stop (METHOD 10). Product: `masks/ID.png`.

It differs from the official code in two things. The CAM of the walk is the seeds' own, brought to stride 4; the
official code makes all CAMs a second time, summed at that stride before they are normalised (on the recorded one the
two differ by 0.002 on average). And images may be larger than a training crop; the official code cuts them off there
without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ppc.artifacts import Progress, StageDir
from ppc.boundaries import walk_cam
from ppc.cam import seed_from_cam
from ppc.config import TrialConfig
from ppc.data import Dataset
from ppc.figures import palette_png
from ppc.irn_net import STRIDE, edges
from ppc.places import StoragePath, size_of
from ppc.stages.context import StageContext
from ppc.stages.make_seeds import images_of, whole_cam
from ppc.stages.train_irn import load_irn_net


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    cfg: TrialConfig
    folder: StageDir
    seeds: StageDir
    weights: StoragePath
    dataset: Dataset


def run(context: StageContext) -> dict[str, Any]:
    """Refine every image that has a CAM."""
    cfg, inputs = context.cfg, context.inputs
    ids = list(dict.fromkeys(image_id for _, image_id in images_of(cfg, context.dataset)))
    progress = Progress(context.folder / "progress.json", total=len(ids), unit="image", used=context.rt.meter.read)
    weights = inputs["train_irn"] / "weights.pt"
    shared = Shared(cfg, context.folder, inputs["make_seeds"], weights, context.dataset)
    context.rt.map(refine_chunk, shared, ids, cfg.runtime, lambda done, _: progress.update(done), use_gpu=True)
    return {}


def refine_chunk(shared: Shared, ids: Sequence[str], device: torch.device) -> None:
    """Write the masks of some images."""
    irn = shared.cfg.irn
    for image_id in ids:
        path = shared.folder / "masks" / f"{image_id}.png"
        if size_of(path) is not None:  # it was written whole
            continue
        keys, cam_KHW = whole_cam(shared.seeds, image_id)
        walked_KHW = torch.zeros(cam_KHW.shape)
        if len(keys):
            net, normalisation = load_irn_net(shared.cfg.model_dump_json(), shared.weights, device)
            image_3HW = normalisation.apply(shared.dataset.image(image_id)).to(device)
            walked_KHW = walk_cam(
                torch.from_numpy(cam_KHW).to(device),
                edges(net, image_3HW, canvas_px=irn.train.crop_px),
                stride=STRIDE,
                radius=irn.walk.radius,
                beta=irn.walk.beta,
                log2_steps=irn.walk.log2_steps,
            )
        palette_png(seed_from_cam(walked_KHW.cpu().numpy(), keys, bg_score=irn.walk.bg_score), path)
