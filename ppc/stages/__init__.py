"""Stages: files in, files out. Each names what decides its result, so that it can be shared and run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ppc.artifacts import StageDir, content_key
from ppc.config import TrialConfig
from ppc.data import VocLayout
from ppc.runtime import Runtime
from ppc.stages.context import StageContext
from ppc.stages.evaluate import run as evaluate
from ppc.stages.make_seeds import run as make_seeds
from ppc.stages.refine_crf import run as refine_crf
from ppc.stages.train_cam import run as train_cam

__all__ = ["STAGES", "Stage", "StageContext", "plan_stages", "run_stage"]


@dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    `version` changes when the same inputs give other numbers. `reads` are the config sections that decide the result,
    `needs` the stages whose files it reads, `uses` those whose files it reads when the trial has them.
    """

    run: Callable[[StageContext], dict[str, Any]]
    version: int
    reads: tuple[str, ...]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


STAGES: dict[str, Stage] = {
    "train_cam": Stage(train_cam, 1, ("seed", "data", "backbone", "method", "contrast", "views", "train")),
    "make_seeds": Stage(make_seeds, 1, ("seed", "seeds"), needs=("train_cam",)),
    "refine_crf": Stage(refine_crf, 1, ("crf",), needs=("make_seeds",)),
    "evaluate": Stage(evaluate, 1, (), needs=("make_seeds",), uses=("refine_crf",)),
}


def plan_stages(cfg: TrialConfig, fingerprints: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names and content keys of a trial's stages.

    A key is made of the stage's version, the config it reads, the contents of data and weights, and the keys of the
    stages before it. ValueError for an unknown stage or one whose input no earlier stage makes.
    """
    keys: dict[str, str] = {}
    for name in cfg.stages:
        if name not in STAGES:
            raise ValueError(f"stages: no stage {name!r}; there are {', '.join(STAGES)}")
        stage = STAGES[name]
        absent = [need for need in stage.needs if need not in keys]
        if absent or name in keys:
            raise ValueError(
                f"stages: {name} needs {', '.join(absent)} before it" if absent else f"stages: {name} twice"
            )
        keys[name] = content_key(
            {
                "stage": name,
                "version": stage.version,
                "config": {section: cfg.decisive(section) for section in stage.reads},
                "inputs": {need: keys[need] for need in (*stage.needs, *stage.uses) if need in keys},
                "contents": dict(fingerprints),
            }
        )
    return list(keys.items())


def run_stage(
    name: str, cfg: TrialConfig, folder: StageDir, inputs: Mapping[str, StageDir], dataset: VocLayout, rt: Runtime
) -> dict[str, Any]:
    """Run one stage and return its result; the caller writes the manifest."""
    return STAGES[name].run(StageContext(cfg, folder, inputs, dataset, rt))
