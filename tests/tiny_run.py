"""A trial that takes seconds on one CPU, and what several test files do with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppc.artifacts import StageDir, read_journal
from ppc.config import TrialConfig
from ppc.data import VocLayout, make_scenes
from ppc.loading import override_all, validate_trial
from ppc.stages.train_cam import make_job
from ppc.stages.training import Payload
from ppc.train import Job

SCENES = {"num_classes": 3, "num_train": 8, "num_val": 4, "image_px": 48, "seed": 0}
TINY: dict[str, Any] = {
    "data.scenes.num_classes": 3, "data.scenes.num_train": 8, "data.scenes.num_val": 4, "data.scenes.image_px": 48,
    "contrast.projector_dim": 8, "contrast.prototype_top_k": 4, "views.target_px": 32,
    "train.epochs": 2, "train.batch_size": 4, "train.crop_px": 48, "train.resize_long_px": [48, 64],
    "psa.train.epochs": 2, "psa.train.batch_size": 4, "psa.train.crop_px": 48, "psa.radius": 3,
    "seeds.scales": [1.0], "seeds.val_subset_images": 3, "seeds.overlays": 2,
    "segmentation.train.epochs": 2, "segmentation.train.batch_size": 4, "segmentation.train.crop_px": 48,
    "segmentation.test.scales": [1.0, 1.5],
    "runtime.log_every_steps": 1, "runtime.images_per_task": 3,
}  # fmt: skip
ALL_VIEWS: dict[str, Any] = {"views.flip": True, "views.rotate_deg": 20, "views.translate_px": 4}


def scenes_root(base: Path) -> Path:
    """The tiny generated dataset under a folder; made once."""
    return make_scenes(base / "tiny-scenes", **SCENES)


def tiny_config(changes: Mapping[str, Any] | None = None, root: Path | None = None) -> TrialConfig:
    """The tiny trial with some dotted fields changed, on the dataset at `root`."""
    values = {**TINY, **(changes or {}), **({} if root is None else {"data.root": str(root)})}
    return validate_trial(override_all({}, list(values.items())), "tiny")


def layout(root: Path) -> VocLayout:
    """The dataset at a folder."""
    return VocLayout(root)


def cam_payload(cfg: TrialConfig, folder: StageDir, dataset: VocLayout | None = None) -> Payload:
    """What a worker of train_cam is sent."""
    return Payload(cfg, folder, {}, dataset or layout(Path(str(cfg.data.root))), make_job)


def cam_job(cfg: TrialConfig, device: torch.device | None = None) -> Job:
    """The training of a trial's CAM net."""
    return make_job(cam_payload(cfg, StageDir(Path("nowhere"), "train_cam", "0")), device or torch.device("cpu"))


def formula_batch(num_images: int = 4, num_fg: int = 3, size: int = 48, shift: float = 0.0) -> dict[str, Any]:
    """A batch that no generator of random numbers has a part in: waves for images, labels in turn."""
    n, c = torch.arange(num_images)[:, None, None, None], torch.arange(3)[None, :, None, None]
    y, x = torch.arange(size)[None, None, :, None], torch.arange(size)[None, None, None, :]
    image = torch.sin(0.13 * (n + 1) * x + 0.07 * (c + 2) * y + 0.9 * n + shift) + torch.cos(0.21 * x * (c + 1) - y / 3)
    classes = torch.arange(num_fg)[None]
    label = ((classes + torch.arange(num_images)[:, None]) % max(2, num_fg - 1) == 0).float()
    saliency = (image.mean(dim=1, keepdim=True) / 2 + 0.5).clamp(0, 1)
    return {
        "image_N3HW": image.float(), "label_NK": label, "sample_seed_N": torch.arange(num_images) + 17,
        "saliency_N1HW": saliency.float(),
    }  # fmt: skip


def curve(folder: StageDir) -> list[tuple[int, dict[str, float]]]:
    """Steps and metrics of a journal, apart from what depends on the clock."""
    points, _ = read_journal(folder / "journal.jsonl")
    return [(p["step"], {k: v for k, v in p["m"].items() if not k.startswith("speed/")}) for p in points]


def weights_of(folder: StageDir) -> dict[str, Tensor]:
    """The trained weights of a stage."""
    net: dict[str, Tensor] = torch.load(folder / "weights.pt", weights_only=True)["net"]
    return net


def products(folder: Path) -> dict[str, bytes]:
    """Contents of all files of a stage that are results, by their relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.suffix in (".npz", ".png", ".pt")
    }


def manifest_result(folder: StageDir) -> dict[str, Any]:
    """The result that a finished stage declared."""
    result: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["result"]
    return result
