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
    assert (trial.contrast.temperature, trial.contrast.projector_dim) == (0.1, 128)


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
