"""Every field that decides a number is read by what makes the numbers: one that is cut off would give equal rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tiny_run import scenes_root, tiny_config

import ppc
from ppc.artifacts import Storage
from ppc.base_config import BackboneConfig, Section
from ppc.config import TrialConfig
from ppc.planning import Planner
from ppc.runtime import LocalRuntime
from ppc.trial import run_trial

PACKAGE = Path(ppc.__file__).parent
# These turn a config into keys, checks and estimates, and make no number.
ELSEWHERE = ("base_config.py", "config.py", "net_config.py", "checks.py", "planning.py")
RUNS: list[dict[str, Any]] = [
    {
        "method.name": "eps_seam", "seeds.splits": ["train", "val"], "seeds.protocol": "val_subset", "train.epochs": 1,
        "stages": [
            "train_cam", "make_seeds", "refine_crf", "train_psa", "refine_psa", "train_irn", "refine_irn", "train_seg",
            "predict_seg", "evaluate",
        ],
        "irn.radius": 4, "irn.train.crop_px": 64, "irn.train.batch_size": 4, "irn.train.epochs": 1,
        "irn.walk.log2_steps": 4, "segmentation.masks": "mask", "psa.walk.crf": "seam_aff",
    },
    {
        "method.name": "seam", "stages": ["train_cam", "make_seeds", "train_psa", "refine_psa", "evaluate"],
        "psa.preset": "seam", "seeds.protocol": "fixed", "train.epochs": 1,
    },
]  # fmt: skip

NETS = ("psa", "irn", "segmentation")
FILLED = {f"{section}.preset" for section in ("contrast", *NETS)}  # config.py gives their fields to others
BY_BACKBONE_OF = {f"{net}.backbone.{name}" for net in NETS for name in BackboneConfig.model_fields}
BY_RAY = {"runtime.engine", "runtime.max_failures", "runtime.resource_wait_s"}


def fields_of(model: type[BaseModel], place: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """(dotted name, section, field) of all that is no section itself."""
    for name, field in model.model_fields.items():
        kind, dotted = field.annotation, f"{place}{name}"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields_of(kind, f"{dotted}.")
        else:
            yield dotted, model, name


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[tuple[type, str]]:
    """The fields that code of ppc looks at, as (section, field)."""
    found = set[tuple[type, str]]()
    original = BaseModel.__getattribute__

    def watched(self: BaseModel, name: str) -> Any:
        if name in type(self).model_fields:
            path = Path(sys._getframe(1).f_code.co_filename)
            if path.is_relative_to(PACKAGE) and path.name not in ELSEWHERE:
                found.add((type(self), name))
        return original(self, name)

    monkeypatch.setattr(Section, "__getattribute__", watched, raising=False)
    return found


def test_every_field_that_is_in_a_key_is_read(tmp_path: Path, read: set[tuple[type, str]]) -> None:
    storage, root = Storage(tmp_path / "storage"), scenes_root(tmp_path)
    for changes in RUNS:
        plan = Planner(storage).plan(tiny_config(changes, root))
        run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())
    unread = {dotted for dotted, section, name in fields_of(TrialConfig) if (section, name) not in read}
    assert {name for name in unread if not name.startswith("data.")} == FILLED | BY_BACKBONE_OF | BY_RAY
