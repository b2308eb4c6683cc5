"""A search: proposals depend on results alone, and a study that is killed in a round ends as one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_study import QUIET
from typer.testing import CliRunner

import ppc.local_study
from ppc.artifacts import Storage
from ppc.checks import check_trial
from ppc.cli import app
from ppc.definition import define_search
from ppc.launch import Where, run_study
from ppc.ledger import FAILED, FINISHED, PENDING, TrialRow, read_rows
from ppc.loading import ConfigError, load_study
from ppc.search import Search, next_round, results, start
from ppc.study import expand, shared_base
from ppc.study_config import StudyConfig

pytest.importorskip("optuna")
AXES: dict[str, Any] = {
    "contrast.temperature": {"low": 0.05, "high": 0.5, "log": True},
    "contrast.prototype_top_k": [2, 4, 8],
    "contrast.bg_score": {"low": 0.1, "high": 0.3, "step": 0.05},
    "contrast.projector_dim": {"low": 4, "high": 12},
}
LOCAL = Where(local=True, tracking="none")


def study_of(axes: dict[str, Any] | None = None, seeds: tuple[int, ...] = (0,), **search: Any) -> StudyConfig:
    raw = {
        "name": "s", "trial_seeds": list(seeds), "metric": "mask_miou_train", "tiny": {"train.epochs": 1},
        "design": {"kind": "search", "axes": axes or AXES, "search": {"num_variants": 4, "batch": 2, **search}},
    }  # fmt: skip
    return StudyConfig.model_validate(raw)


def started(study: StudyConfig) -> Search:
    expand(study, twin="tiny", check=check_trial)
    return start(study, shared_base(study, twin="tiny"), None)


def rows_of(search: Search, value: Any) -> list[TrialRow]:
    """Rows in which each trial has the value of a function of its variant's place and seed; None is a failure."""
    rows = []
    specs = search.specs([changes for made in search.rounds for changes in made])
    names = list(dict.fromkeys(spec.variant for spec in specs))
    for spec in specs:
        number = value(names.index(spec.variant), spec.seed)
        result = None if number is None else {"metrics": {"mask_miou_train": number}}
        rows.append(
            TrialRow(
                key=f"{spec.variant}/{spec.seed}", variant=spec.variant, variant_key=spec.variant, seed=spec.seed,
                factors=spec.factors, config={}, stages=[], state=FAILED if number is None else FINISHED, attempt=1,
                stage=None, progress=None, result=result, error=None, started_ms=0, ended_ms=0, reused=False,
            )
        )  # fmt: skip
    return rows


def test_proposals_are_valid_different_and_the_same_again() -> None:
    search = started(study_of(num_variants=7, batch=7))
    (first,) = search.rounds
    assert first[0] == {} and len(first) == 8
    assert len({str(changes) for changes in first}) == 8
    for changes in first[1:]:
        assert 0.05 <= changes["contrast.temperature"] <= 0.5 and changes["contrast.prototype_top_k"] in (2, 4, 8)
        steps = (changes["contrast.bg_score"] - 0.1) / 0.05
        assert abs(steps - round(steps)) < 1e-6 and isinstance(changes["contrast.projector_dim"], int)
    assert started(study_of(num_variants=7, batch=7)).rounds == search.rounds
    assert started(study_of(num_variants=7, batch=7, sampler_seed=1)).rounds != search.rounds


def test_the_next_round_depends_on_results_and_not_on_the_order_of_rows() -> None:
    search = started(study_of(num_variants=14, batch=12, seeds=(0, 1)))
    rows = rows_of(search, lambda place, seed: 0.1 * place + 0.01 * seed)
    proposed = next_round(search, rows)
    assert len(proposed) == 2 and next_round(search, rows[::-1]) == proposed
    assert next_round(Search.load(search.dump()), rows) == proposed, "a resume reads what a launch wrote"
    assert next_round(search, rows_of(search, lambda place, seed: -0.1 * place)) != proposed
    assert proposed[0] not in search.rounds[0] and proposed[1] not in search.rounds[0]


def test_a_search_of_an_older_version_goes_on_if_it_looked_for_the_largest_value() -> None:
    search = started(study_of())
    for direction in ("maximize", "minimize"):
        data = json.loads(json.dumps(search.dump()))
        data["study"]["design"]["search"]["direction"] = direction
        if direction == "maximize":
            assert Search.load(data)._space() == search._space() and Search.load(data).rounds == search.rounds
            continue
        with pytest.raises(ValueError, match="study s was searched for the smallest mask_miou_train"):
            Search.load(data)


def test_the_value_of_a_variant_is_the_mean_of_its_seeds_and_a_failure_is_none() -> None:
    search = started(study_of(seeds=(0, 1)))
    told = results(search, rows_of(search, lambda place, seed: None if (place, seed) == (1, 1) else place + seed))
    assert told is not None and [value for _, value in told] == [0.5, None, 2.5]
    rows = rows_of(search, lambda place, seed: 1.0)
    rows[-1] = TrialRow(**{**rows[-1].__dict__, "state": PENDING, "result": None})
    assert results(search, rows) is None and next_round(search, rows) == [], "a round waits for all trials"
    assert next_round(search, rows_of(search, lambda place, seed: None)) == [], "all failed: it is not their fault"


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"contrast.temprature": [0.1]}, "contrast.temperature"),
        ({"runtime.workers": [1, 2]}, "never changes a number"),
        ({"seed": [0, 1]}, "trial_seeds"),
        ({"contrast.prototype_top_k": {"low": 1.5, "high": 4}}, "whole number"),
        ({"method.name": {"low": 0, "high": 1}}, "is no number; list its values"),
        ({"contrast.prototype_top_k": [4, 8]}, "the axes have 2 combinations only"),
    ],
)
def test_a_wrong_axis_is_one_clear_error(axes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expand(study_of(axes), twin="tiny", check=check_trial)


def outcome(storage: Storage) -> list[tuple[str, Any]]:
    rows = read_rows(storage, storage.study("s").definition())
    assert all(row.state == FINISHED for row in rows)
    return [(row.label, row.result and row.result["metrics"]) for row in rows]


def test_a_search_that_is_killed_in_a_round_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of()
    base = shared_base(study, twin="tiny")
    calm = Storage(tmp_path / "calm")
    assert run_study(calm, "s", LOCAL, QUIET, define_search(study, base, calm)) == 0
    expected = outcome(calm)
    assert len(expected) == 5 and expected[0][0] == "base s=0"

    storage = Storage(tmp_path / "killed")
    run, ran = ppc.local_study.run_trial, []

    def interrupted_once(*args: Any) -> Any:
        ran.append(1)
        if len(ran) == 4:  # in the second round: the first has three trials
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(ppc.local_study, "run_trial", interrupted_once)
    assert run_study(storage, "s", LOCAL, QUIET, define_search(study, base, storage)) == 1
    states = [row.state for row in read_rows(storage, storage.study("s").definition())]
    assert states == [FINISHED] * 3 + [PENDING] * 2, "the round was written whole before it ran"
    assert run_study(storage, "s", LOCAL, QUIET) == 0
    assert outcome(storage) == expected and len(ran) == 6

    again = define_search(study, base, storage)  # launched again: nothing is proposed anew, nothing runs
    assert run_study(storage, "s", LOCAL, QUIET, again) == 0
    assert outcome(storage) == expected and len(ran) == 6


def test_a_round_that_another_study_has_finished_does_not_end_the_search(tmp_path: Path) -> None:
    study = study_of()
    base = shared_base(study, twin="tiny")
    storage = Storage(tmp_path)
    assert run_study(storage, "s", LOCAL, QUIET, define_search(study, base, storage)) == 0
    expected = outcome(storage)
    (storage.study("s").path / "study.json").unlink()
    assert run_study(storage, "s", LOCAL, QUIET, define_search(study, base, storage)) == 0
    assert outcome(storage) == expected


def test_a_dry_run_prints_the_axes_and_the_first_round(tmp_path: Path) -> None:
    file = Path(__file__).parent.parent / "experiments" / "scenes_search.yaml"
    done = CliRunner().invoke(app, ["study", "launch", str(file), "--dry-run", "--storage", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "contrast.temperature: 0.02 to 0.5, log" in done.output and "10 trials" in done.output
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_range_of_a_file_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "name: s\ndesign:\n  kind: search\n  axes:\n    contrast.temperature: {low: 0.5, high: 0.1}\n"
        "  search: {num_variants: 2}\n"
    )
    with pytest.raises(ConfigError, match=r"s.yaml:5: .*low should be below high, got 0.5 and 0.1"):
        load_study(file)
