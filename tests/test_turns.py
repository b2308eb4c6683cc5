"""Which trial starts next: none that would only wait, where another has work of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_study import FakeStudy
from tiny_study import QUIET, make_study

from ppc.artifacts import StageDir, Storage
from ppc.launch import Where, run_study
from ppc.ledger import missing, read_rows
from ppc.turns import Turns


class SharedStudy(FakeStudy):
    """Two variants of three seeds; the variants of a seed share its training."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, seeds=(0, 1, 2))
        for entry in self.study["trials"]:
            entry["stages"][0]["key"] = f"t-{entry['seed']}"

    def train(self, seed: int) -> None:
        self.storage.stage("train_cam", f"t-{seed}").finish({}, wall_s=1)


@pytest.fixture
def shared(tmp_path: Path) -> SharedStudy:
    return SharedStudy(tmp_path)


def turns_of(study: FakeStudy) -> Turns:
    return Turns(missing(study.rows), study.storage)


def names(turns: Turns, number: int) -> list[str]:
    rows = [turns.take() for _ in range(number)]
    return [f"K{row.factors['contrast.prototype_top_k']} s{row.seed}" for row in rows if row is not None]


def test_trials_with_trainings_of_their_own_keep_their_order(tmp_path: Path) -> None:
    turns = turns_of(FakeStudy(tmp_path, seeds=(0, 1)))
    assert names(turns, 5) == ["K0 s0", "K4 s0", "K0 s1", "K4 s1"]


def test_a_trial_whose_training_is_being_made_is_passed_over(shared: SharedStudy) -> None:
    turns = turns_of(shared)
    assert names(turns, 3) == ["K0 s0", "K0 s1", "K0 s2"]
    assert names(turns, 1) == ["K4 s0"], "all that are left would wait: the first of them"


def test_its_turn_comes_when_the_training_is_done(shared: SharedStudy) -> None:
    turns = turns_of(shared)
    assert names(turns, 1) == ["K0 s0"]
    shared.train(0)
    assert names(turns, 2) == ["K4 s0", "K0 s1"], "nobody waits for a training that is there"


def test_or_when_who_made_it_has_ended_without_it(shared: SharedStudy) -> None:
    turns = turns_of(shared)
    (row,) = [turns.take()]
    assert row is not None and names(turns, 1) == ["K0 s1"]
    turns.end(row.key)  # it failed
    assert names(turns, 1) == ["K4 s0"]


def test_storage_that_does_not_answer_costs_the_order_alone(
    shared: SharedStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_answer(stage: StageDir) -> None:
        raise TimeoutError(stage.path)

    turns = turns_of(shared)
    monkeypatch.setattr(StageDir, "manifest", no_answer)
    assert names(turns, 7) == ["K0 s0", "K4 s0", "K0 s1", "K4 s1", "K0 s2", "K4 s2"]


def test_a_launch_trains_both_seeds_before_it_looks_at_one_twice(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, axes={"seeds.map": ["method", "cam"]})
    where = Where(local=True, tracking="none", max_concurrent=2)
    assert run_study(storage, "k", where, QUIET) == 0
    rows = sorted(read_rows(storage, study), key=lambda row: row.started_ms or 0)
    trained = [row.stages[0]["key"] for row in rows]
    assert len(set(trained)) == 2 and trained[0] != trained[1] and {row.seed for row in rows[:2]} == {0, 1}
