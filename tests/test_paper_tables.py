"""The files of the paper's tables: they validate, their twins expand and run, and every figure names its source."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from ppc.artifacts import Storage
from ppc.checks import check_trial
from ppc.definition import define
from ppc.launch import Where, run_study
from ppc.ledger import FINISHED, read_rows
from ppc.loading import load_study, load_trial
from ppc.published import check_published
from ppc.study import baseline, expand
from ppc.study_config import Twin
from ppc.twins import study_of

PAPER = Path(__file__).parent.parent / "experiments" / "paper"
TABLES = sorted(PAPER.glob("table*.yaml"))


def stem(path: Path) -> str:
    return path.stem


def test_all_seven_are_there() -> None:
    assert [path.stem for path in TABLES] == [f"table{number}" for number in range(1, 8)]


def test_the_base_is_the_papers_size() -> None:
    trial = load_trial(PAPER / "paper_base.yaml")
    assert not list(check_trial(trial))
    assert (trial.backbone.name, trial.train.crop_px, trial.train.batch_size, trial.train.epochs) == (
        "resnet38d", 448, 8, 8
    )  # fmt: skip
    assert (trial.views.target_px, trial.contrast.prototype_top_k, trial.data.train_split) == (128, 32, "train_aug")
    contrast, train, method = trial.contrast, trial.train, trial.method
    assert (contrast.temperature, contrast.projector_dim, contrast.start_after) == (0.1, 128, 0)
    assert (contrast.cross_prototype_weight, contrast.cross_cam_weight, contrast.intra_view_weight) == (0.1, 0.1, 0.1)
    assert (contrast.negative_rank_from * 21, contrast.negative_rank_to * 21) == pytest.approx((3, 13))
    assert (contrast.map_source, contrast.prototype_features, contrast.tie_rule) == ("refined", "raw", "first_index")
    assert (method.dropout, method.cls_weight, method.min_pool_weight, method.er_weight, method.ecr_weight) == (
        0.5, 1, 1, 1, 1
    )  # fmt: skip
    assert (train.new_layer_lr_mult, train.bias_lr_mult, train.poly_power, train.color_jitter) == (10, 2, 0.9, True)
    assert (train.precision, trial.backbone.normalisation) == ("fp32", "auto")


def test_the_walks_and_nets_of_the_tables_are_the_official_ones() -> None:
    specs = expand(load_study(PAPER / "table1.yaml"), check=check_trial)
    trial = next(spec.config for spec in specs if spec.variant == "SEAM + PPC")
    psa, irn, walk = trial.psa, trial.irn, trial.psa.walk
    assert (psa.labels.bg_power_low, psa.labels.bg_power_high, psa.labels.crf, psa.radius) == (4, 24, "ppc_aff", 5)
    assert (walk.background, walk.bg_score, walk.beta, walk.log2_steps) == ("constant", 0.27, 8, 6) and walk.fit_radius
    assert (irn.labels.fg_score, irn.labels.bg_score, irn.radius, irn.train.learning_rate) == (0.3, 0.05, 10, 0.1)
    assert (irn.walk.radius, irn.walk.beta, irn.walk.log2_steps, irn.walk.bg_score) == (5, 10, 8, 0.25)
    segmentation = load_study(PAPER / "table3.yaml")
    own = expand(segmentation, check=check_trial)[0].config.segmentation
    assert (own.batch_norm, own.dropout, own.test.crf, own.test.flip) == ("statistics", 0.5, "deeplab_test", True)
    assert own.test.scales == (0.5, 0.75, 1, 1.25, 1.5, 1.75) and own.scale == (0.5, 1.5)


@pytest.mark.parametrize("path", TABLES, ids=stem)
def test_it_validates_and_its_twins_expand(path: Path) -> None:
    study = load_study(path)
    check_published(study)
    full = expand(study, check=check_trial)
    assert len(full) == 3 * len({spec.variant for spec in full}) and study.published
    twins: tuple[Twin, ...] = ("tiny", "scenes")
    for twin in twins:
        specs = expand(study, twin=twin, check=check_trial)
        assert [(s.variant, s.seed) for s in specs] == [(s.variant, s.seed) for s in full]
        assert all((s.config.data.name, s.config.backbone.weights) == ("scenes", None) for s in specs)
        assert all(s.config.backbone_of(net).name == "tiny" for s in specs for net in ("psa", "irn", "segmentation"))
        assert len({s.config.model_dump_json() for s in specs}) == len(specs)
        assert baseline(study_of(study, twin), specs) == baseline(study, full)


def test_every_header_has_command_paper_and_cost() -> None:
    for path in TABLES:
        head = path.read_text().partition("\nname:")[0]
        assert all(f"# {word}:" in head for word in ("Command", "Paper", "Cost")), path
        assert f"experiments/paper/{path.name}" in head


@pytest.mark.slow
@pytest.mark.parametrize("path", TABLES, ids=stem)
def test_it_runs_tiny(path: Path, tmp_path: Path) -> None:
    """The first and the last row, and the baseline: one trial each."""
    study = load_study(path, overrides=["trial_seeds=[0]"])
    storage, small = Storage(tmp_path), study_of(study, "tiny")
    specs = expand(study, twin="tiny", check=check_trial)
    specs = [spec for spec in specs if spec.variant in (specs[0].variant, specs[-1].variant, baseline(small, specs))]
    definition = define(small, specs, baseline(small, specs), storage, twin="tiny")
    with (tmp_path / "log").open("w") as log:
        assert run_study(storage, small.name, Where(local=True, tracking="none"), Console(file=log), definition) == 0
    rows = read_rows(storage, storage.study(small.name).definition())
    assert rows and all(row.state == FINISHED for row in rows)
    assert "no difference is given" in (tmp_path / "studies" / small.name / "report" / "report.md").read_text()
