"""Measure what a study costs: its own stages on a few generated images of the size of its data, on this machine.

Crop, batch, backbone and method are the study's; weights are random. Steps are timed by the journal, without the first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from ppc.artifacts import StageDir, Storage, read_journal, read_json
from ppc.checks import optim_of
from ppc.config import TrialConfig
from ppc.estimate import Rate, distinct, keep, key_of, like, measured, rate_of
from ppc.loading import override_all
from ppc.planning import Planner
from ppc.runtime import LocalRuntime
from ppc.schema import validate
from ppc.stages import NETS, OPTIM
from ppc.trial import run_trial

PHOTO_PX = 500  # long side of a photograph of VOC
STEPS = 4  # of each net, the first untimed


def measure(configs: Sequence[TrialConfig], storage: Storage, say: Callable[[str], None]) -> None:
    """Time all stages of a study that no finished stage of the storage is like, and keep the rates there.

    ValueError where the study wants GPUs and there is none here.
    """
    known = measured(storage)
    for stage, cfg in distinct(configs):
        if key_of(stage, like(stage, cfg)) in known:
            continue
        if cfg.runtime.gpus_per_worker and not torch.cuda.is_available():
            raise ValueError(
                "--measure: the study wants GPUs and this machine has none; measure on one that has, or estimate for "
                "CPUs: --set runtime.gpus_per_worker=0"
            )
        say(f"measuring {stage} and what is before it: {', '.join(cfg.stages)}")
        records = _records(cfg)
        keep(storage, records)
        known |= {key_of(name, what): rate for name, what, rate in records}


def _records(cfg: TrialConfig) -> list[tuple[str, dict[str, Any], Rate]]:
    """The rates of all stages of a trial, from a run of a small one in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="ppc-measure-") as folder:
        storage = Storage.at(folder)
        plan = Planner(storage).plan(small(cfg))
        run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
        return [(name, like(name, cfg), _rate(storage.stage(name, key), cfg)) for name, key in plan.stages]


def small(cfg: TrialConfig) -> TrialConfig:
    """The trial with generated images in place of its own, as many as its largest batch, for a few steps."""
    largest = max((optim_of(cfg, OPTIM[stage]).batch_size for stage in cfg.stages if stage in OPTIM), default=1)
    generated = cfg.data.name == "scenes"
    changes: dict[str, Any] = {
        "data.name": "scenes", "data.root": None, "data.labels": "auto", "data.train_split": "train",
        "data.scenes.num_train": max(2, largest), "data.scenes.num_val": 2, "data.on_broken": "stop",
        "data.scenes.image_px": cfg.data.scenes.image_px if generated else PHOTO_PX,
        "seeds.splits": ["train"], "seeds.protocol": "fixed", "seeds.overlays": 0, "segmentation.test.splits": ["val"],
        "runtime.workers": 1, "runtime.log_every_steps": 1, "runtime.loader_workers": 0,
    }  # fmt: skip
    for net in ("backbone", *(f"{net}.backbone" for net in NETS.values() if net != "backbone")):
        changes[f"{net}.weights"] = None
    for section in OPTIM.values():
        steps_an_epoch = max(1, largest // optim_of(cfg, section).batch_size)
        changes[f"{section}.epochs"] = max(2, -(-STEPS // steps_an_epoch))
    raw = override_all(cfg.model_dump(mode="json"), list(changes.items()))
    return validate(TrialConfig, raw, "measurement")


def _rate(folder: StageDir, cfg: TrialConfig) -> Rate:
    manifest, progress = folder.manifest(), read_json(folder / "progress.json")
    assert manifest is not None and progress is not None
    where = "on a GPU here" if torch.cuda.is_available() else "on this CPU"
    source = f"{progress['total']} {progress['unit']}s {where}, generated images"
    if folder.stage not in NETS:
        return rate_of(manifest, progress["total"], source)
    points, _ = read_journal(folder / "journal.jsonl")
    speeds = [value for point in points for name, value in point["m"].items() if name.startswith("speed/")]
    step_s = 1 / median(speeds[1:] or speeds)
    runtime = cfg.runtime
    return Rate(step_s, step_s * runtime.cpus_per_worker, step_s * runtime.gpus_per_worker, source)
