"""Pictures of what a trial made of chosen images: image, CAM, seed, mask, truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ppc.artifacts import Storage
from ppc.config import TrialConfig
from ppc.figures import contact_row, overlay, read_palette_png
from ppc.ledger import FINISHED, TrialRow
from ppc.names import check_name
from ppc.places import atomic_write
from ppc.stages.make_seeds import read_cam
from ppc.trial import open_data

Picture = npt.NDArray[np.uint8]


def pick_row(rows: Sequence[TrialRow], variant: str | None, seed: int | None) -> TrialRow:
    """The first finished trial of a variant and seed; ValueError lists what there is."""
    for row in rows:
        if row.state == FINISHED and variant in (None, row.variant) and seed in (None, row.seed):
            return row
    have = ", ".join(row.label for row in rows if row.state == FINISHED) or "none"
    raise ValueError(f"no finished trial of variant {variant}, seed {seed}; finished: {have}")


def gallery(storage: Storage, row: TrialRow, image_ids: Sequence[str] = ()) -> Picture:
    """A row of pictures for each image, (H, W, 3) uint8. Without ids: the fixed set that has overlays."""
    cfg = TrialConfig.model_validate(row.config)
    dataset = open_data(cfg.data, storage)
    keys = {stage["name"]: stage["key"] for stage in row.stages}
    seeds = storage.stage("make_seeds", keys["make_seeds"])
    split = cfg.seeds.splits[0]
    image_ids = image_ids or (row.result or {}).get("overlays") or dataset.ids(split)[:1]
    rows = []
    for image_id in image_ids:
        loaded = read_cam(seeds / "cams" / f"{check_name(image_id, 'image')}.npz")
        if loaded is None:
            raise ValueError(
                f"no CAM of image {image_id} in {seeds.path}; it has those of {', '.join(cfg.seeds.splits)}"
            )
        image, (_, cam_KHW) = dataset.image(image_id), loaded
        heat = np.clip(cam_KHW.max(0), 0, 1) if len(cam_KHW) else np.zeros(image.shape[:2], np.float32)
        pictures = {
            "image": image,
            "CAM": overlay(image, heat),
            "seed": read_palette_png(seeds / "seeds" / f"{image_id}.png"),
        }
        if "refine_crf" in keys:
            masks = storage.stage("refine_crf", keys["refine_crf"]) / "masks"
            pictures["mask (CRF)"] = read_palette_png(masks / f"{image_id}.png")
        if dataset.has_masks(split):
            pictures["truth"] = dataset.mask(image_id, split=split)
        rows.append(contact_row(list(pictures.values()), list(pictures)))
    width = max(picture.shape[1] for picture in rows)
    padded = [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in rows]
    return np.concatenate(padded)


def save_picture(picture: Picture, path: Path) -> None:
    """Write a picture as PNG."""
    with atomic_write(path) as handle:
        Image.fromarray(picture).save(handle, "PNG")
