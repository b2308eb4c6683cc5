"""The table of a study against numbers worked out by hand, and what it says of trials that have none."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from pathlib import Path

import pytest
from fake_study import FakeStudy
from rich.console import Console
from typer.testing import CliRunner

from ppc.artifacts import Storage, write_json
from ppc.cli import app
from ppc.live import REFRESH_S, LiveStatus
from ppc.report import build_report, duration, markdown, print_report, write_report
from ppc.report_table import remarks
from ppc.status import status_lines, status_table


@pytest.fixture
def fake(tmp_path: Path) -> FakeStudy:
    """K = 0, 4, 32 with seeds 0, 1, 2: one failed at K=4, two missing at K=32."""
    study = FakeStudy(tmp_path, ks=(0, 4, 32), seeds=(0, 1, 2))
    for index, miou in enumerate((0.40, 0.42, 0.47)):
        study.finish(index, miou, bg_score=0.2 + 0.05 * index, wall_s=100 + 50 * index)
    study.finish(3, 0.50)
    study.start(4)
    study.fail(4)
    study.finish(5, 0.51)
    study.finish(7, 0.44)
    study.start(6)
    return study


def printed(fake: FakeStudy, **how: object) -> str:
    out = io.StringIO()
    print_report(build_report(fake.storage, "demo"), Console(file=out, **how))  # type: ignore[arg-type]
    return out.getvalue()


def test_numbers_as_by_hand(fake: FakeStudy) -> None:
    base, four, many = build_report(fake.storage, "demo").lines
    assert (base.n, base.baseline, base.best, base.diff_mean) == (3, True, False, None)
    assert base.mean == pytest.approx(0.43, abs=1e-12)
    assert base.std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2), abs=1e-12)
    assert base.bg_score == pytest.approx(0.25)
    assert base.trial_s == pytest.approx(150)
    # K=4 has seeds 0 and 2: differences 0.10 and 0.04, to the same seeds of the baseline
    assert (four.n, four.pairs, four.best, four.seeds) == (2, 2, True, [0, 2])
    assert four.mean == pytest.approx(0.505)
    assert four.diff_mean == pytest.approx(0.07)
    assert four.diff_std == pytest.approx(math.sqrt(2 * 0.03**2))
    assert four.others["seed_miou_train"][0] == pytest.approx(0.455)
    assert four.states == {"FINISHED": 2, "FAILED": 1}
    assert (many.n, many.std, many.pairs, many.diff_std) == (1, None, 1, None)
    assert many.diff_mean == pytest.approx(0.02)
    assert many.states == {"FINISHED": 1, "RUNNING": 1, "PENDING": 1}


def test_markdown_prints_per_cent_marks_the_best_and_hides_nothing(fake: FakeStudy) -> None:
    text = markdown(build_report(fake.storage, "demo"))
    table = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| prototype")}
    assert "| 43.00 ± 3.61 | 3 | baseline |" in table["| prototype_top_k=0"]
    assert "| **50.50 ± 0.71** | 2 | +7.00 ± 4.24 (2 paired) |" in table["| prototype_top_k=4"]
    assert "| 44.00 | 1 | +2.00 (1 paired) |" in table["| prototype_top_k=32"]
    assert "2 finished, 1 failed" in table["| prototype_top_k=4"]
    assert text.count("**") == 2
    assert "one seed" in text
    assert "2 trial(s) have no result" in text and "1 trial(s) are at work" in text
    assert "prototype_top_k=4 s=1: RuntimeError in train_cam: no memory left" in text


def test_a_tested_variant_has_its_p_and_stars(fake: FakeStudy) -> None:
    fake.finish(4, 0.53)
    report = build_report(fake.storage, "demo")
    # differences 0.10, 0.11, 0.04: mean 0.0833, deviation 0.0379, t 3.812; p by a table of t for two degrees: 0.062
    text = markdown(report)
    assert "| n | vs baseline | p (Holm) |" in text
    assert "| +8.33 ± 3.79 (3 paired) | 0.062 |" in text and "not told from the noise of the seeds (p 0.062)" in text
    assert "No test, hence no star, for prototype_top_k=32: 1 shared seed(s), a test needs 3." in text
    fake.finish(5, 0.58)
    text = markdown(build_report(fake.storage, "demo"))
    assert r"| 0.00098 \*\*\* |" in text and r"more than the noise of the seeds (p 0.00098 \*\*\*)" in text
    (line,) = [line for line in printed(fake, width=40).splitlines() if line.startswith("prototype_top_k=4")]
    assert "53.67 ± 4.04 *" in line and "0.00098 ***" in line


def test_header_says_what_the_figures_are(fake: FakeStudy) -> None:
    header = dict(build_report(fake.storage, "demo").header)
    assert header["split"] == "train: 240 images"
    assert "per cent" in header["metric"]
    assert header["background score"].startswith("best_on_train") and "very masks" in header["background score"]
    assert header["absent classes"].startswith("zero")
    assert header["data"] == f"scenes (generated data), fingerprint {'ab' * 32}"
    assert "c" * 40 in header["code"]
    assert header["seeds"] == "0, 1, 2"
    assert header["trials"] == "6 finished, 1 running, 1 pending, 1 failed"


def test_real_data_is_not_called_generated(fake: FakeStudy) -> None:
    fake.study["data"][0] |= {"generated": False, "name": "voc"}
    write_json(fake.storage.study("demo").path / "study.json", fake.study)
    assert "generated" not in markdown(build_report(fake.storage, "demo"))


def test_a_study_without_results_is_a_table_of_dashes(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    report = build_report(study.storage, "demo")
    assert [(line.n, line.mean, line.best, line.trial_s) for line in report.lines] == [(0, None, False, None)] * 2
    assert "| prototype_top_k=4 | - | 0 | - | - | - | 2 pending |" in markdown(report)


def test_a_place_that_takes_no_report_still_gives_it(
    fake: FakeStudy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    folder = Path(fake.storage.study("demo").path) / "report"
    folder.write_text("a file where a folder must be made")
    for words, endings in (([], ["md", "html"]), (["--format", "csv"], [])):
        ran = CliRunner().invoke(app, ["report", "demo", "--storage", str(fake.storage.root), *words])
        assert ran.exit_code == 0 and "prototype_top_k=4" in ran.stdout, (ran.stdout, ran.exception)
        elsewhere = Path(ran.stderr.rpartition("; the report is in ")[2].strip())
        assert str(folder) in ran.stderr and elsewhere.parent == tmp_path and (elsewhere / "report.html").is_file()
        for ending in endings:
            assert f"report: {elsewhere}/report.{ending}" in ran.stdout


def test_no_such_study_names_the_others(fake: FakeStudy) -> None:
    with pytest.raises(ValueError, match="demo"):
        build_report(fake.storage, "dem")


def test_reused_trials_are_called_so(fake: FakeStudy) -> None:
    fake.study["created_ms"] += 3_600_000
    write_json(fake.storage.study("demo").path / "study.json", fake.study)
    report = build_report(fake.storage, "demo")
    assert report.lines[0].reused == 3
    assert "3 finished; 3 reused" in markdown(report)
    assert any("finished (reused)" in line for line in status_lines(fake.rows, generated=True))


def test_files_hold_the_same_numbers_unrounded(fake: FakeStudy, tmp_path: Path) -> None:
    paths = write_report(build_report(fake.storage, "demo"), tmp_path / "report", fake.storage)
    assert [path.name for path in paths] == ["report.md", "report.csv", "report.json", "report.tex", "report.html"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(path.name for path in paths)
    rows = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    assert [row["contrast.prototype_top_k"] for row in rows] == ["0", "4", "32"]
    assert float(rows[1]["mean"]) == pytest.approx(0.505, abs=1e-15)
    assert (rows[2]["std"], rows[1]["failed"], rows[0]["failed"]) == ("", "1", "0")
    data = json.loads(paths[2].read_text())
    assert data["lines"][1]["diff_mean"] == pytest.approx(0.07)
    assert data["lines"][1]["values"]["mask_miou_train"] == {"0": 0.5, "2": 0.51}


def test_log_gets_plain_lines_without_control_codes(fake: FakeStudy) -> None:
    text = printed(fake, width=40)
    assert "\x1b" not in text
    assert "│" not in text
    assert "50.50 ± 0.71 *" in text
    heads, *lines = [
        line for line in text.splitlines() if line.startswith(("variant", "prototype_top_k=0  ", "prototype_top_k=4  "))
    ]
    assert all(line[heads.index("vs baseline") - 1] == " " for line in lines)


def test_terminal_gets_a_table(fake: FakeStudy) -> None:
    text = printed(fake, width=160, force_terminal=True)
    assert "\x1b[1m" in text and "50.50 ± 0.71" in text and "study demo" in text


def test_status_tells_each_trials_state(fake: FakeStudy) -> None:
    stage = fake.storage.stage("train_cam", fake.entry(6)["stages"][0]["key"])
    write_json(
        stage / "progress.json", {"done": 3, "total": 12, "unit": "step", "epoch": 1, "epochs": 4, "left_s": 42.0}
    )
    lines = status_lines(fake.rows, generated=True)
    assert len(lines) == 10
    found = {line.partition(" s=")[0] + line.partition(" s=")[2][0]: line for line in lines[1:]}
    assert "mask_miou_train 40.00" in found["prototype_top_k=00"]
    assert "failed" in found["prototype_top_k=41"] and "no memory left" in found["prototype_top_k=41"]
    assert "on the device" not in "\n".join(lines)
    assert "3/12 step, epoch 1/4  42 s" in found["prototype_top_k=320"]
    assert "pending" in found["prototype_top_k=322"]


def test_status_table_takes_brackets_in_errors(fake: FakeStudy) -> None:
    fake.fail(6, "bad [/red] index [3]")
    out = io.StringIO()
    Console(file=out, width=200, force_terminal=True).print(status_table(fake.rows, title="demo", generated=True))
    assert "bad [/red] index [3]" in out.getvalue()


def test_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    study.fail(0, "no [/data/voc]: pip install -e '.[timm]'")
    for entry in study.study["trials"]:
        entry["variant"] = f"[bold]{entry['variant']}"
    study.study |= {"note": "[red]", "baseline": "[bold]prototype_top_k=0", "metric": "seed_miou_[red]"}
    write_json(study.storage.study("demo").path / "study.json", study.study)
    for terminal in (False, True):
        text = printed(study, width=250, force_terminal=terminal)
        assert "no [/data/voc]: pip install -e '.[timm]'" in text
        assert "[bold]prototype_top_k=4" in text and "seed_miou_[red]" in text
    out = io.StringIO()
    table = status_table(study.rows, title="[bold]demo", generated=False)
    Console(file=out, width=250, force_terminal=True).print(table)
    assert "[bold]demo" in out.getvalue() and "pip install -e '.[timm]'" in out.getvalue()


def test_generated_data_are_called_so_beside_the_figures(fake: FakeStudy) -> None:
    assert "result (generated data)" in status_lines(fake.rows, generated=True)[0]
    assert "generated" not in "\n".join(status_lines(fake.rows, generated=False))
    out = io.StringIO()
    Console(file=out, width=250).print(status_table(fake.rows, title="demo: 6", generated=True))
    assert "demo: 6 (generated data)" in out.getvalue()


def test_the_live_table_calls_generated_data_so(fake: FakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    said, out, deadline = "", io.StringIO(), time.monotonic() + 30 * REFRESH_S
    with LiveStatus(fake.storage, fake.study, Console(file=io.StringIO())):
        while "result (generated data)" not in (said := said + capsys.readouterr().out):
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
    with LiveStatus(fake.storage, fake.study, Console(file=out, width=250, force_terminal=True)):
        while "(generated data)" not in out.getvalue():
            assert time.monotonic() < deadline, out.getvalue()
            time.sleep(0.1)


def test_csv_says_what_each_figure_is_measured_on(fake: FakeStudy, tmp_path: Path) -> None:
    fake.study["trials"][3]["same_as"] = "prototype_top_k=0"
    write_json(fake.storage.study("demo").path / "study.json", fake.study)
    report = build_report(fake.storage, "demo")
    rows = list(csv.DictReader(io.StringIO(write_report(report, tmp_path / "report", fake.storage)[1].read_text())))
    told = [(row["split"], row["count"], row["protocol"], row["generated"]) for row in rows]
    assert told == [("train", "240", "best_on_train", "True")] * 3
    assert [row["same_as"] for row in rows] == ["", "prototype_top_k=0", ""]
    assert "same trial as prototype_top_k=0" in markdown(report)


@pytest.mark.parametrize(("metric", "text"), [("mask_miou_train_aug", "train_aug: 10582 images"), ("bg_score", None)])
def test_split_is_that_of_the_metric(tmp_path: Path, metric: str, text: str | None) -> None:
    study = FakeStudy(tmp_path)
    study.finish(0, 0.4)
    path = study.storage.trial(study.entry(0)["key"]).path / "result.json"
    write_json(path, {**json.loads(path.read_text()), "counts": {"train": 1464, "train_aug": 10582}})
    write_json(study.storage.study("demo").path / "study.json", {**study.study, "metric": metric})
    assert dict(build_report(study.storage, "demo").header).get("split") == text


def test_status_of_nothing_is_headings_alone() -> None:
    assert status_lines([], generated=False) == ["trial  state"]


@pytest.mark.parametrize(("seconds", "text"), [(None, "-"), (7.4, "7 s"), (150, "2.5 min"), (7560, "2.1 h")])
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (50, "val_subset: the best one for the masks of 50 images drawn from train"),
        (1464, "val_subset: the best one for all 240 masks of train, the very masks that the metric is measured on"),
    ],
)
def test_a_subset_that_is_the_whole_split_is_called_so(images: int, told: str, tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    for index, entry in enumerate(study.study["trials"]):
        entry["config"]["seeds"] |= {"protocol": "val_subset", "val_subset_split": "train", "val_subset_images": images}
        study.finish(index, 0.5)
        path = study.storage.trial(entry["key"]).path / "result.json"
        write_json(path, {**json.loads(path.read_text()), "protocol": "val_subset"})
    write_json(study.storage.study("demo").path / "study.json", study.study)
    assert dict(build_report(study.storage, "demo").header)["background score"] == told


def test_the_verdict_takes_no_means_of_other_seeds_for_a_gain(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, seeds=(0, 1, 2, 3))
    for index, miou in enumerate((0.1, 0.6, 0.601, 0.602, None, 0.55, 0.5505, 0.5519)):
        if miou is not None:
            study.finish(index, miou)
    text = markdown(build_report(study.storage, "demo"))
    assert "but of other seeds than the baseline's: over those that both have it is -5.02 ± 0.03." in text
    assert "more than the noise" not in text


@pytest.mark.parametrize(
    ("mious", "told"),
    [
        ((0.6, 0.601, 0.602, 0.5, 0.5011, 0.5019), "More than the noise of the seeds below it: prototype_top_k=4."),
        ((0.6, 0.7, 0.65, 0.55, 0.75, 0.5), "No variant can be told from it by more than the noise of the seeds."),
        ((0.6, None, 0.65, 0.55, None, 0.5), "There is no test of the others, so they cannot be told from noise."),
    ],
)
def test_the_verdict_on_a_best_baseline_speaks_of_noise(
    mious: tuple[float | None, ...], told: str, tmp_path: Path
) -> None:
    study = FakeStudy(tmp_path, seeds=(0, 1, 2))
    for index, miou in enumerate(mious):
        if miou is not None:
            study.finish(index, miou)
    text = markdown(build_report(study.storage, "demo"))
    assert "The best mean is the baseline's, prototype_top_k=0" in text and told in text


def test_protocol_of_a_fixed_score_gives_the_score(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    for entry in study.study["trials"]:
        entry["config"]["seeds"] |= {"protocol": "fixed", "bg_score": 0.3}
    write_json(study.storage.study("demo").path / "study.json", study.study)
    assert dict(build_report(Storage(tmp_path), "demo").header)["background score"] == "fixed at 0.3"


def test_variants_whose_nets_leave_present_classes_without_seeds_are_named(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    for index, silent in enumerate((0.6, 0.8, 0.08, 0.04)):
        study.finish(index, 0.5, silent=silent)
    report = build_report(study.storage, "demo")
    named = [line for line in remarks(report) if "nowhere above 0" in line]
    assert len(named) == 1 and named[0].startswith("Maps of present classes (train)")
    assert "no seed: prototype_top_k=0 70%, prototype_top_k=4 6%. These nets" in named[0]
    assert "silent_maps_train" not in markdown(report), "it is told in words, not as a column of mIoU"


def test_a_variant_above_the_baseline_over_their_shared_seeds_is_not_called_worse(tmp_path: Path) -> None:
    """The baseline has a fourth seed that the variant has not, and it is a good one: it has the best mean."""
    study = FakeStudy(tmp_path, ks=(0, 4), seeds=(0, 1, 2, 3))
    for index, miou in enumerate((0.40, 0.41, 0.42, 0.60, 0.43, 0.4401, 0.4502)):
        study.finish(index, miou)
    report = build_report(study.storage, "demo")
    assert report.lines[0].best and report.lines[1].test is not None and report.lines[1].test.stars == "***"
    (verdict, *_) = remarks(report)
    assert "below it" not in verdict
    assert "Over the seeds that both have, more than the noise above it: prototype_top_k=4." in verdict


def test_rows_of_other_images_or_protocols_are_not_to_be_ranked(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, ks=(0, 4), seeds=(0, 1))
    for index in range(4):
        study.finish(index, 0.4 + index / 100)
    assert not any("do not rank" in line for line in remarks(build_report(study.storage, "demo")))
    for index in (2, 3):
        path = study.storage.trial(study.entry(index)["key"]).path / "result.json"
        result = json.loads(path.read_text())
        write_json(path, {**result, "counts": {"train": 5 + index}})
        study.entry(index)["config"]["seeds"]["protocol"] = "fixed"
    write_json(study.storage.study("demo").path / "study.json", study.study)
    told = [line for line in remarks(build_report(study.storage, "demo")) if "do not rank" in line]
    assert told == [
        "These figures are not of the same number of images, so do not rank them: prototype_top_k=0 240; "
        "prototype_top_k=4 7; 8.",
        "These figures are not of the same protocol, so do not rank them: prototype_top_k=0 best_on_train; "
        "prototype_top_k=4 fixed.",
    ]
