"""What all studies of a storage have cost, and how they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_study import QUIET, make_study
from typer.testing import CliRunner

from ppc.artifacts import Progress, Storage, read_json, used_s
from ppc.cli import app
from ppc.costs import trial_cost
from ppc.launch import Where, run_study
from ppc.ledger import read_rows
from ppc.overview import as_data, overview_lines, overviews

LOCAL = Where(local=True, tracking="none")


def test_a_stage_is_paid_for_once(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    first = make_study(storage, name="a", k=[4], seeds=[0])
    assert run_study(storage, "a", LOCAL, QUIET) == 0
    second = make_study(storage, name="b", k=[4], seeds=[0, 1], tiny={"crf.bg_score": 0.3})
    assert run_study(storage, "b", LOCAL, QUIET) == 0
    (row,) = read_rows(storage, first)
    assert row.result is not None
    manifests = {s["name"]: storage.stage(s["name"], s["key"]).manifest() for s in row.stages}
    paid = sum(m["cost"]["cpu_s"] for m in manifests.values() if m is not None)
    assert row.result["cost"]["cpu_h"] == pytest.approx(paid / 3600) and paid > 0
    assert manifests["train_cam"] is not None and manifests["train_cam"]["ran"] == {"workers": 1, "cpus": 1, "gpus": 0}
    shared, own = read_rows(storage, second)  # the first reuses the CAM and the seeds of study a
    assert shared.result is not None and own.result is not None
    assert 0 < shared.result["cost"]["cpu_h"] < own.result["cost"]["cpu_h"]
    assert [s["reused"] for s in shared.result["stages"]] == [True, True, False, False]

    found = {one.study: one for one in overviews(storage)[0]}
    assert list(found) == ["b", "a"], "the one launched last first"
    costs = [trial_cost(storage, row)[0] for row in (shared, own)]
    assert found["b"].cpu_h == pytest.approx(sum(costs)) and found["b"].gpu_h == 0
    assert found["b"].states == {"FINISHED": 2} and found["b"].best is not None and found["a"].active_ms is not None
    heads, *lines = overview_lines(list(found.values()))
    assert heads.split()[0] == "study" and [line.split()[0] for line in lines] == ["b", "a"]
    assert as_data([found["a"]])[0]["best_mean"] == row.metric("mask_miou_train")


@pytest.mark.parametrize("content", ["{}", "[]", '{"trials": []}'])
def test_a_file_of_something_else_costs_no_other_study(content: str, tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    make_study(storage, name="good", k=[4], seeds=[0])
    (tmp_path / "studies" / "odd").mkdir()
    (tmp_path / "studies" / "odd" / "study.json").write_text(content)
    found, problems = overviews(storage)
    assert (
        [one.study for one in found] == ["good"] and len(problems) == 1 and "odd/study.json is damaged" in problems[0]
    )


def test_a_place_that_is_not_there_is_told(tmp_path: Path) -> None:
    for words in (["study", "list"], ["report", "--best"], ["sync", "--all"]):
        ran = CliRunner().invoke(app, [*words, "--storage", str(tmp_path / "tipo")])
        assert ran.exit_code == 0 and "tipo, which does not exist" in " ".join(ran.stdout.split())


def test_a_study_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    make_study(storage, name="good", k=[4], seeds=[0])
    make_study(storage, name="torn", k=[4], seeds=[0])
    (storage.study("torn").path / "study.json").write_text('{"name": "to')
    (storage.root / "studies" / "empty").mkdir()
    assert storage.study_names() == ["good", "torn"]
    found, problems = overviews(storage)
    assert [one.study for one in found] == ["good"] and len(problems) == 1
    ran = CliRunner().invoke(app, ["study", "list", "--storage", str(tmp_path)])
    assert ran.exit_code == 0 and "good" in ran.stdout and "torn" not in ran.stdout
    assert (
        ran.stderr == f"torn: {storage.study('torn').path}/study.json is damaged; launch its file again (ppc study "
        "launch FILE): what is finished is not run again\n"
    )
    listed = CliRunner().invoke(app, ["study", "list", "--storage", str(tmp_path), "--json"])
    assert [one["study"] for one in json.loads(listed.output)] == ["good"]
    assert read_json(storage.study("good").path / "study.json") is not None


def test_a_trial_that_another_study_finished_is_paid_for_once(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    make_study(storage, name="a", k=[4], seeds=[0])
    assert run_study(storage, "a", LOCAL, QUIET) == 0
    make_study(storage, name="b", k=[4], seeds=[0])
    assert run_study(storage, "b", LOCAL, QUIET) == 0
    found = {one.study: one for one in overviews(storage)[0]}
    assert found["a"].cpu_h > 0 and found["b"].cpu_h == 0 and found["b"].states == {"FINISHED": 1}


def test_attempts_add_up_and_a_trial_at_work_has_cost_something(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    study = make_study(storage, k=[4], seeds=[0])
    entry = study["trials"][0]
    folder = storage.stage("train_cam", entry["stages"][0]["key"])
    for _ in range(2):
        progress = Progress(folder / "progress.json", total=2, unit="step", cpus=2, gpus=0.5)
        progress._started -= 3600
        progress.update(2)
    cpu_s, gpu_s = used_s(folder / "progress.json")
    assert cpu_s == pytest.approx(4 * 3600, rel=0.01) and gpu_s == pytest.approx(3600, rel=0.01)
    storage.trial(entry["key"]).write_state(state="FAILED", stage="train_cam", stage_key=folder.key, attempt=2)
    (row,) = read_rows(storage, study)
    assert trial_cost(storage, row) == pytest.approx((4, 1), rel=0.01)


def test_the_list_of_a_storage_without_studies(tmp_path: Path) -> None:
    runner = CliRunner()
    empty = runner.invoke(app, ["study", "list", "--storage", str(tmp_path / "none")])
    assert empty.exit_code == 0 and "no study in" in empty.output
    refused = runner.invoke(app, ["study", "list", "--address", "auto"])
    assert isinstance(refused.exception, ValueError) and "only a job server" in str(refused.exception)
