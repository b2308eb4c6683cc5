"""Tiny studies for the tests that run them."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

from ppc.artifacts import Storage
from ppc.checks import check_trial
from ppc.definition import define, save
from ppc.study import baseline, expand
from ppc.study_config import StudyConfig

QUIET = Console(file=open(os.devnull, "w"))  # lives as long as the tests


def make_study(storage: Storage, name: str = "k", **changes: Any) -> dict[str, Any]:
    """A tiny study of three K and two seeds, saved."""
    axes = changes.pop("axes", {"contrast.prototype_top_k": changes.pop("k", [0, 4, 32])})
    raw: dict[str, Any] = {
        "name": name,
        "base": {"runtime": changes.pop("runtime", {}), "train": changes.pop("train", {})},
        "design": {"kind": "grid", "axes": axes},
        "trial_seeds": changes.pop("seeds", [0, 1]),
        "tiny": changes.pop("tiny", {}),
        "metric": changes.pop("metric", "mask_miou_train"),
        "early_stopping": changes.pop("early_stopping", None),
    }
    assert not changes
    study = StudyConfig.model_validate(raw)
    specs = expand(study, twin="tiny", check=check_trial)
    definition = define(study, specs, baseline(study, specs), storage)
    save(definition, storage)
    return definition
