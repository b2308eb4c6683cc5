"""The contract of methods, refinements and segmentation nets: whichever are put together, a trial runs to its end.

Each of the 8 methods meets each refinement, and the heads go round, so that each head meets each refinement and each
method too. Trials share what is trained in one storage. Numbers of such tiny nets say nothing; what is looked at is
what others rely on: which files there are, what is in them, and what the result names.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_run import tiny_config

from ppc.artifacts import Storage
from ppc.checks import metrics_of
from ppc.config import UNREAD_BY_METHOD, TrialConfig
from ppc.data import VocLayout
from ppc.deeplab import SEG_HEADS
from ppc.figures import VOC_PALETTE
from ppc.loading import TINY
from ppc.planning import Planner, TrialPlan, open_data
from ppc.runtime import LocalRuntime
from ppc.stages.make_seeds import read_cam
from ppc.stages.products import PRODUCTS, products_of, splits_of
from ppc.trial import run_trial

HEADS = list(SEG_HEADS)
METHODS = list(UNREAD_BY_METHOD)
REFINEMENTS = {
    "mask": ["refine_crf"],
    "psa_mask": ["train_psa", "refine_psa"],
    "irn_mask": ["train_irn", "refine_irn"],
}
SEGMENTATION = ["train_seg", "predict_seg"]
NETS = ("psa", "irn", "segmentation")
OWN = {name: v for name, v in TINY.items() if name.split(".")[0] in NETS and not isinstance(v, dict)}  # fields alone
CASES = [
    (method, contrast, refinement, HEADS[(m + r + 2 * contrast) % len(HEADS)])
    for (m, method), contrast, (r, refinement) in product(enumerate(METHODS), (False, True), enumerate(REFINEMENTS))
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One root for all trials: they share what is trained."""
    return Storage(tmp_path_factory.mktemp("contract"))


def config(method: str, contrast: bool, refinement: str, head: str) -> TrialConfig:
    """A trial of all kinds of stages."""
    stages = ["train_cam", "make_seeds", *REFINEMENTS[refinement]]
    changes: dict[str, Any] = {**OWN, "method.name": method, "train.epochs": 1}
    changes["contrast.prototype_top_k"] = 4 if contrast else 0
    changes["contrast.map_source"] = "cam" if method in ("cam", "eps") else "refined"
    stages += SEGMENTATION
    changes |= {"segmentation.head": head, "segmentation.masks": refinement}
    return tiny_config({**changes, "stages": [*stages, "evaluate"]})


def run(storage: Storage, plan: TrialPlan) -> dict[str, Any]:
    return run_trial(plan.config, plan.key, plan.stages, storage, LocalRuntime())


@pytest.mark.parametrize(("method", "contrast", "refinement", "head"), CASES)
def test_a_trial_of_any_parts_runs_to_its_end(
    method: str, contrast: bool, refinement: str, head: str, storage: Storage
) -> None:
    plan = Planner(storage).plan(config(method, contrast, refinement, head))
    result = run(storage, plan)
    dataset = open_data(plan.config.data, storage)
    assert set(metrics_of(plan.config, dataset)) <= set(result["metrics"])
    keys = dict(plan.stages)
    for name in products_of(keys):
        for split in splits_of(name, plan.config):
            assert 0 <= result["metrics"][f"{name}_miou_{split}"] <= 1
            assert result["counts"][split] == len(dataset.ids(split))
            stage, folder = PRODUCTS[name]
            look_at(Path(storage.stage(stage, keys[stage]).path) / folder, dataset, split, of_tags=name != "seg")
    look_at_cams(Path(storage.stage("make_seeds", keys["make_seeds"]).path) / "cams", dataset)
    assert [stage["name"] for stage in result["stages"]] == list(plan.config.stages)
    again = run(storage, Planner(storage).plan(plan.config))
    assert again == result, "a finished trial is not run again"


def look_at(folder: Path, dataset: VocLayout, split: str, *, of_tags: bool) -> None:
    """Every image of the split has a palette PNG of its size, with labels of the dataset, or of its own tags alone."""
    for image_id in dataset.ids(split):
        with Image.open(folder / f"{image_id}.png") as image:
            assert image.mode == "P"
            label_HW = np.asarray(image)
            assert (np.asarray(image.convert("RGB")) == VOC_PALETTE[label_HW]).all()
        assert label_HW.shape == dataset.image_size(image_id)
        tags = np.flatnonzero(dataset.image_label(image_id, split=split)) + 1
        allowed = {0, *tags.tolist()} if of_tags else set(range(dataset.num_classes + 1))
        assert set(np.unique(label_HW).tolist()) <= allowed


def look_at_cams(folder: Path, dataset: VocLayout) -> None:
    """Every image has maps of its own classes, finite and at its size."""
    for image_id in dataset.ids("train"):
        loaded = read_cam(folder / f"{image_id}.npz")
        assert loaded is not None
        keys, cam_KHW = loaded
        assert keys.tolist() == np.flatnonzero(dataset.image_label(image_id, split="train")).tolist()
        assert cam_KHW.shape == (len(keys), *dataset.image_size(image_id)) and np.isfinite(cam_KHW).all()


def test_trials_share_what_they_have_in_common_and_nothing_else(storage: Storage) -> None:
    planner = Planner(storage)
    plans: Mapping[Any, TrialPlan] = {case: planner.plan(config(*case)) for case in CASES}
    assert len({plan.key for plan in plans.values()}) == len(plans)
    for stage in ("train_cam", "make_seeds"):
        keys = {(method, contrast): dict(plan.stages)[stage] for (method, contrast, *_), plan in plans.items()}
        assert len(set(keys.values())) == len(keys) == 2 * len(METHODS)
        assert {dict(plan.stages)[stage] for plan in plans.values()} == set(keys.values())


def test_the_cases_meet_in_pairs() -> None:
    for first, second in ((0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        values = [{case[i] for case in CASES} for i in (first, second)]
        assert {(case[first], case[second]) for case in CASES} == set(product(*values))
