"""A study's twins keep its design: all variants and seeds, sizes in them scaled to the generated scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppc.checks import check_trial
from ppc.loading import load_study, load_trial
from ppc.schema import ConfigError
from ppc.study import baseline, expand
from ppc.study_config import StudyConfig, Twin
from ppc.twins import as_twin, name_of, study_of, twin_of

ROOT = Path(__file__).parent.parent / "experiments"
VOC: dict[str, Any] = {
    "data": {"name": "voc", "root": "VOC2012", "train_split": "train_aug"},
    "backbone": {"name": "resnet38d", "weights": "w.params"},
    "seeds": {"splits": ["train", "train_aug"], "protocol": "val_subset", "val_subset_split": "train"},
    "segmentation": {"test": {"splits": ["val", "test"]}},
    "runtime": {"gpus_per_worker": 1},
}


def study(design: dict[str, Any], **more: Any) -> StudyConfig:
    return StudyConfig.model_validate({"name": "s", "base": VOC, "design": design, **more})


def test_scenes_keep_variants_seeds_and_what_is_no_size() -> None:
    axes = {"contrast.prototype_top_k": [0, 32], "train.epochs": [8, 16]}
    config = study({"kind": "grid", "axes": axes}, trial_seeds=[3, 4], scenes={"seeds.overlays": 1})
    full, small = expand(config), expand(config, twin="scenes", check=check_trial)
    assert [(s.variant, s.seed, s.factors) for s in small] == [(s.variant, s.seed, s.factors) for s in full]
    for spec in small:
        found = spec.config
        assert (found.data.name, found.data.root, found.data.train_split) == ("scenes", None, "train")
        assert (found.backbone.name, found.backbone.weights, found.runtime.gpus_per_worker) == ("tiny", None, 0)
        assert (found.train.crop_px, found.views.target_px, found.seeds.overlays) == (96, 64, 1)
        assert (found.seeds.splits, found.segmentation.test.splits) == (("train",), ("val",))
        assert found.psa.train.crop_px == 96 and found.segmentation.train.epochs == 4
    assert {s.config.train.epochs for s in small} == {8, 16}  # an axis keeps its values


def test_sizes_that_a_design_varies_are_scaled_and_stay_distinct() -> None:
    variants = [
        {"name": "small", "set": {"views.target_px": 128, "train.resize_long_px": [448, 768]}},
        {"name": "whole", "set": {"views.target_px": None}},
        {"name": "shifted", "set": {"views.translate_px": 50, "train.resize_long_px": [256, 512]}},
    ]
    config = study({"kind": "list", "variants": variants, "baseline": "small"})
    specs = {spec.variant: spec.config for spec in expand(config, twin="scenes", check=check_trial)}
    assert [specs[name].views.target_px for name in ("small", "whole", "shifted")] == [64, None, 64]
    assert specs["shifted"].views.translate_px == 25
    assert specs["small"].train.resize_long_px == (96, 165) and specs["shifted"].train.resize_long_px == (55, 110)
    assert specs["whole"].train.resize_long_px == (96, 165)  # the base's own, scaled as the others are


def test_walks_reach_the_same_share_of_an_image() -> None:
    axes = {"psa.walk.log2_steps": [6, 8]}
    config = study({"kind": "grid", "axes": axes, "baseline": {"psa.walk.log2_steps": 8}})
    specs = expand(config, twin="scenes")
    assert [(s.config.psa.walk.log2_steps, s.config.irn.walk.log2_steps) for s in specs] == [(2, 4), (4, 4)]
    assert baseline(study_of(config, "scenes"), specs) == "log2_steps=4"
    short = study({"kind": "list", "variants": [{"name": "a", "set": {"psa.walk.log2_steps": 1}}]})
    assert expand(short, twin="scenes")[0].config.psa.walk.log2_steps == 0


def test_a_baseline_that_a_scaled_axis_picks_is_found() -> None:
    config = study({"kind": "grid", "axes": {"views.target_px": [64, 128]}, "baseline": {"views.target_px": 128}})
    specs = expand(config, twin="scenes")
    assert [spec.variant for spec in specs] == ["target_px=32", "target_px=64"]
    assert baseline(study_of(config, "scenes"), specs) == "target_px=64"


def test_a_study_on_scenes_is_its_own_twin() -> None:
    config = load_study(ROOT / "scenes_k.yaml")
    assert [s.config for s in expand(config, twin="scenes")] == [s.config for s in expand(config)]


def test_names_and_choice() -> None:
    twins: tuple[Twin, ...] = ("full", "tiny", "scenes")
    assert [name_of("s", twin) for twin in twins] == ["s", "s-tiny", "s-scenes"]
    assert (twin_of(tiny=False, scenes=True), twin_of(tiny=True, scenes=False)) == ("scenes", "tiny")
    with pytest.raises(ValueError, match="name one"):
        twin_of(tiny=True, scenes=True)
    with pytest.raises(ConfigError, match="scenes: train.epoch: no such field"):
        expand(
            study({"kind": "grid", "axes": {"contrast.prototype_top_k": [0]}}, scenes={"train.epoch": 1}), twin="scenes"
        )


def test_one_trial_has_the_twin_too(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("data: {name: voc, root: VOC}\nbackbone: {name: resnet38d}\n")
    trial = load_trial(path, shrink=lambda raw: as_twin(raw, "scenes"), overrides=["train.epochs=2"])
    assert (trial.data.name, trial.backbone.name, trial.train.crop_px, trial.train.epochs) == ("scenes", "tiny", 96, 2)


@pytest.mark.parametrize("twin", ["tiny", "scenes"])
def test_metrics_are_those_of_the_splits_that_stand_for_the_studys_own(twin: Twin) -> None:
    columns = [
        "seed_miou_train_aug",
        "seed_miou_third",
        "seg_miou_test",
        "seg_miou_val",
        "bg_score",
        "silent_maps_third",
    ]
    config = study({"kind": "list", "variants": [{"name": "a"}]}, metric="mask_miou_third", columns=columns)
    small = study_of(config, twin)
    assert small.metric == "mask_miou_train"
    assert small.columns == ["seed_miou_train", "seg_miou_val", "bg_score", "silent_maps_train"]
    assert study_of(config, "full") == config
