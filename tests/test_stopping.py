"""The rules of early stopping, without a cluster: what is compared, who is kept, what tables and status say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from fake_study import FakeStudy
from tiny_study import make_study

from ppc.artifacts import Journal, StageDir, Storage, write_json
from ppc.checks import check_trial
from ppc.config import TrialConfig
from ppc.definition import define
from ppc.ledger import FINISHED, INTERRUPTED, PENDING, STOPPED, counts, missing
from ppc.ray_stopping import Early, KeepingAsha, reporting
from ppc.report import build_report, cells, markdown
from ppc.run_record import trial_tags
from ppc.status import status_lines
from ppc.stopping import EpochReader, Keepers, epoch_values, must_run, no_effect
from ppc.study import baseline, expand
from ppc.study_config import EarlyStopping, StudyConfig

STOP = {"epoch": 2, "metric": "train/cls", "value": 0.53}


def points(steps: list[int], value: Any) -> list[dict[str, Any]]:
    return [{"t": 0, "step": step, "m": {"train/cls": value(step)}} for step in steps]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
def test_the_mean_of_an_epoch_does_not_depend_on_how_often_points_are_written(every: int) -> None:
    per_epoch, epochs = 7, 3
    loss = [random.Random(step).random() for step in range(per_epoch * epochs)]
    ends = [
        epoch * per_epoch + i + 1
        for epoch in range(epochs)
        for i in range(per_epoch)
        if (i + 1) % every == 0 or i + 1 == per_epoch
    ]
    windows, before = dict[int, float](), 0
    for end in ends:
        windows[end], before = sum(loss[before:end]) / (end - before), end
    found = list(epoch_values(points(ends, windows.get), "train/cls", per_epoch))
    means = [sum(loss[e * per_epoch : (e + 1) * per_epoch]) / per_epoch for e in range(epochs)]
    assert [epoch for epoch, _ in found] == [1, 2, 3]
    assert [value for _, value in found] == pytest.approx(means)


def test_a_stage_is_read_epoch_by_epoch_and_its_last_one_is_not_told(tmp_path: Path) -> None:
    folder = StageDir(tmp_path, "train_cam", "key")
    reader = EpochReader(folder, "train/cls")
    assert reader.new() == []
    write_json(folder / "progress.json", {"total": 6, "epochs": 3, "epoch": 1})
    journal = Journal(folder / "journal.jsonl")
    told = []
    for step in range(1, 7):
        journal.write(step, {"train/cls": float(step)})
        told += [(step, *found) for found in reader.new()]
    journal.close()
    assert told == [(2, 1, 1.5), (4, 2, 3.5)]


def states_of(study: FakeStudy, **early: Any) -> None:
    study.study["early_stopping"] = EarlyStopping(**early).model_dump(mode="json")
    write_json(study.storage.study(study.name).path / "study.json", study.study)


def stop(study: FakeStudy, index: int) -> None:
    study.start(index)
    study.storage.trial(study.entry(index)["key"]).write_state(state=STOPPED, stopped=STOP)


def test_no_order_of_stops_and_failures_takes_the_baseline_or_the_last_seed(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, ks=(0, 4, 8, 16), seeds=(0, 1, 2))
    rows = study.rows
    keys = [row.key for row in rows]
    for draw in range(200):
        chance = random.Random(draw)
        keepers, alive, failed = Keepers(rows, study.study["baseline"], keys), set(keys), set[str]()
        for key in chance.choices(keys, k=40):
            if key in alive and chance.random() < 0.15:
                keepers.lose(key)
                failed.add(key)
                alive.discard(key)
            elif key in alive and keepers.may_stop(key):
                keepers.lose(key)
                alive.discard(key)
        for row in rows:
            mine = {other.key for other in rows if other.variant == row.variant}
            assert mine & alive or mine & failed, "a variant lost all its seeds though one had not failed"
            if row.variant == study.study["baseline"]:
                assert row.key in alive | failed
    assert not any(Keepers(rows, study.study["baseline"], keys, keys).may_stop(key) for key in keys)


def test_a_trial_that_is_two_variants_is_kept_for_either(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, ks=(0, 4, 8), seeds=(0, 1))
    twin = {**study.entry(0), "variant": "twin", "same_as": "prototype_top_k=0"}
    study.study["trials"] += [{**twin, "key": study.entry(2)["key"]}]  # the twin has this one seed alone
    keepers = Keepers(study.rows, study.study["baseline"], [])
    assert not keepers.may_stop(study.entry(2)["key"]) and keepers.may_stop(study.entry(4)["key"])


def test_a_stopped_trial_is_not_missing_unless_asked_or_needed(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, seeds=(0, 1))
    states_of(study)
    stop(study, 3)
    study.finish(0, 0.6)
    rows = study.rows
    assert [row.state for row in rows] == [FINISHED, PENDING, PENDING, STOPPED]
    assert [row.key for row in missing(rows)] == [study.entry(i)["key"] for i in (2, 1)], "seed by seed"
    assert [row.key for row in missing(rows, stopped=True)] == [study.entry(i)["key"] for i in (2, 1, 3)]
    assert must_run(rows, study.study["baseline"]) == frozenset()
    stop(study, 1)  # by another study, of which it is not the baseline
    stop(study, 2)
    rows = study.rows
    needed = must_run(rows, study.study["baseline"])
    assert needed == {study.entry(1)["key"], study.entry(2)["key"]}
    assert {row.key for row in missing(rows, needed)} == needed
    study.study["early_stopping"] = None  # a study that stops nothing takes it for interrupted
    assert [row.state for row in study.rows] == [FINISHED, INTERRUPTED, INTERRUPTED, INTERRUPTED]


def test_table_status_and_tags_say_what_was_stopped(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, seeds=(0, 1))
    states_of(study)
    for index, miou in enumerate((0.60, 0.62, 0.64)):
        study.finish(index, miou)
    stop(study, 3)
    rows = study.rows
    assert counts(rows) == {FINISHED: 3, STOPPED: 1}
    report = build_report(study.storage, study.name)
    line = report.lines[1]
    assert line.n == 1 and line.mean == pytest.approx(0.64) and line.stopped == {1: "epoch 2, train/cls 0.53"}
    row = cells(line, report)
    assert row[2] == "1 of 2" and "seed 1 stopped at epoch 2, train/cls 0.53" in row[-1]
    text = markdown(report)
    assert "1 trial(s) were stopped early" in text and "study resume demo --stopped" in text
    assert "have no result" not in text
    (said,) = [line for line in status_lines(rows, generated=True) if "stopped" in line]
    assert "prototype_top_k=4 s=1" in said and "stopped at epoch 2, train/cls 0.53" in said
    assert trial_tags(rows[3], study.study, None)["ppc.stopped"] == "epoch 2, train/cls 0.53"
    assert "ppc.stopped" not in trial_tags(rows[2], study.study, None)


def test_what_early_stopping_cannot_do_is_said(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, seeds=(0, 1))
    assert no_effect(study.study, local=True) == ""
    states_of(study)
    assert no_effect(study.study, local=False) == ""
    assert "--local" in no_effect(study.study, local=True)
    states_of(study, min_epochs=TrialConfig().train.epochs)
    assert "min_epochs" in no_effect(study.study, local=False)
    study.study["trial_seeds"] = [0]
    assert "there is one" in no_effect(study.study, local=False)


def test_a_metric_that_no_training_has_is_refused(tmp_path: Path) -> None:
    raw = {
        "name": "k",
        "design": {"kind": "grid", "axes": {"method.name": ["cam", "seam"]}},
        "base": {"contrast": {"prototype_top_k": 0}},
        "early_stopping": {"metric": "train/er"},
    }
    study = StudyConfig.model_validate(raw)
    specs = expand(study, twin="tiny")
    with pytest.raises(ValueError, match="^name=cam: early_stopping.metric: .* no 'train/er'; there are: train/loss"):
        define(study, specs, baseline(study, specs), Storage(tmp_path))


def test_only_the_training_that_has_the_metric_is_compared(tmp_path: Path) -> None:
    """The nets of PSA, IRN and DeepLab come after the CAM net, and their journals have other names."""
    study = FakeStudy(tmp_path, ks=(0, 4), seeds=(0, 1))
    study.entry(2)["stages"][1] = {"name": "train_psa", "key": "p"}
    for trial in study.study["trials"]:
        trial["config"]["train"]["epochs"] = 3
    for stage, key, name in (
        ("train_cam", study.entry(2)["stages"][0]["key"], "train/cls"),
        ("train_psa", "p", "psa/loss"),
    ):
        folder = study.storage.stage(stage, key)
        write_json(folder / "progress.json", {"total": 6, "epochs": 3, "epoch": 1})
        journal = Journal(folder / "journal.jsonl")
        for step in range(1, 7):
            journal.write(step, {name: float(step)})
        journal.close()
    rule = EarlyStopping.model_validate({"metric": "train/cls", "mode": "min", "min_epochs": 1})
    early = Early(rule, study.rows, study.study["baseline"], frozenset(), frozenset())
    assert KeepingAsha(early, study.rows, study.storage).judge(study.entry(2)["key"], 1, 0.5) is None
    folder = study.storage.stage("train_psa", "p")
    with reporting(folder, "train/cls"):
        folder.ask_stop({"epoch": 1})
    assert folder.stop_asked() is not None, "nothing was done here"


def test_a_search_is_not_stopped_early(tmp_path: Path) -> None:
    axes = {"contrast.temperature": {"low": 0.1, "high": 0.3}}
    design = {"kind": "search", "axes": axes, "search": {"num_variants": 2}}
    raw = {"name": "k", "base": {}, "design": design, "early_stopping": {"metric": "train/cls", "mode": "min"}}
    with pytest.raises(ValueError, match="early_stopping: is not for kind search"):
        expand(StudyConfig.model_validate(raw), twin="tiny", check=check_trial)


@pytest.mark.parametrize("metric", ["bg_score", "silent_maps_train"])
def test_a_study_is_decided_by_what_is_better_when_it_is_larger(metric: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"metric: .*'{metric}' cannot decide; take a mIoU .*mask_miou_train"):
        make_study(Storage(tmp_path), metric=metric)
