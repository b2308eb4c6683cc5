"""Dense CRF on the seeds. Product: `masks/ID.png`, the pseudo masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ppc.affinity import power_background
from ppc.artifacts import Progress, StageDir
from ppc.config import CrfConfig
from ppc.crf import PRESETS, refine_seed
from ppc.data import Dataset
from ppc.figures import palette_png
from ppc.places import size_of
from ppc.stages.context import StageContext
from ppc.stages.make_seeds import images_of, whole_cam


@dataclass(frozen=True)
class Shared:
    """What all chunks of images share."""

    cfg: CrfConfig
    folder: StageDir
    seeds: StageDir
    dataset: Dataset
    bg_score: float | None  # None: a power of the CAM


def run(context: StageContext) -> dict[str, Any]:
    """Refine the seeds of every image that has one."""
    cfg, seeds = context.cfg, context.inputs["make_seeds"]
    manifest = seeds.manifest()
    assert manifest is not None
    score = None
    if cfg.crf.bg_power is None:
        score = manifest["result"]["metrics"]["bg_score"] if cfg.crf.bg_score == "seed" else float(cfg.crf.bg_score)
    ids = list(dict.fromkeys(image_id for _, image_id in images_of(cfg, context.dataset)))
    progress = Progress(context.folder / "progress.json", total=len(ids), unit="image", used=context.rt.meter.read)
    shared = Shared(cfg.crf, context.folder, seeds, context.dataset, score)
    context.rt.map(refine_chunk, shared, ids, cfg.runtime, lambda done, _: progress.update(done))
    return {} if score is None else {"crf_bg_score": score}


def refine_chunk(shared: Shared, ids: Sequence[str], device: torch.device) -> None:
    """Write the masks of some images."""
    for image_id in ids:
        path = shared.folder / "masks" / f"{image_id}.png"
        if size_of(path) is not None:  # it was written whole
            continue
        keys, cam_KHW = whole_cam(shared.seeds, image_id)
        mask_HW = refine_seed(
            shared.dataset.image(image_id),
            cam_KHW,
            keys,
            background=_power(shared.cfg, cam_KHW) if shared.bg_score is None else shared.bg_score,
            num_classes=shared.dataset.num_classes + 1,
            params=PRESETS[shared.cfg.preset],
        )
        palette_png(mask_HW, path)


def _power(cfg: CrfConfig, cam_KHW: NDArray[np.float32]) -> NDArray[np.float32]:
    assert cfg.bg_power is not None
    background_HW: NDArray[np.float32] = power_background(torch.from_numpy(cam_KHW), bg_power=cfg.bg_power)[0].numpy()
    return background_HW
