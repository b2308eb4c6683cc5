"""Published figures: what is refused and where, and how each format of the report shows them beside ours."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fake_study import FakeStudy
from rich.console import Console

from ppc.artifacts import write_json
from ppc.loading import load_study
from ppc.published import VOC_IMAGES, check_published
from ppc.report import build_report, columns, markdown, print_report, write_report
from ppc.schema import ConfigError

BASE, FOUR = "prototype_top_k=0", "prototype_top_k=4"
ROWS: list[dict[str, Any]] = [
    {"variant": BASE, "values": {"mask_miou_train": 41.5, "seed_miou_train": 36.0}, "source": "a paper"},
    {"variant": FOUR, "values": {"mask_miou_train": 40.0}, "source": "its README"},
    {"method": "Another | one", "values": {"seed_miou_train": 48.3, "mask_miou_train": 66.5}, "source": "a thread"},
    {"method": "A third", "values": {"seed_miou_val": 50.0}, "source": "a list"},
]


def on_voc(tmp_path: Path, *, images: int = VOC_IMAGES["train"], **changes: Any) -> FakeStudy:
    """Two variants of two seeds on all of VOC's train: masks 0.40, 0.42 and 0.50, 0.51; seeds are 0.05 lower."""
    study = FakeStudy(tmp_path)
    for index, miou in enumerate((0.40, 0.42, 0.50, 0.51)):
        study.finish(index, miou)
        path = study.storage.trial(study.entry(index)["key"]).path / "result.json"
        write_json(path, {**json.loads(path.read_text()), "counts": {"train": images}})
    study.study["data"][0] |= {"generated": False, "name": "voc"}
    study.study |= {"published": ROWS, "twin": "full", **changes}
    write_json(study.storage.study("demo").path / "study.json", study.study)
    return study


def printed(study: FakeStudy, **how: Any) -> str:
    out = io.StringIO()
    print_report(build_report(study.storage, "demo"), Console(file=out, **how))
    return out.getvalue()


def test_the_paper_stands_beside_ours_with_our_difference(tmp_path: Path) -> None:
    report = build_report(on_voc(tmp_path).storage, "demo")
    base, four = report.lines
    # means of ours by hand: masks 0.41 and 0.505, seeds 0.36 and 0.455
    assert base.published["mask_miou_train"].difference == pytest.approx(0.41 - 0.415)
    assert base.published["seed_miou_train"].difference == pytest.approx(0.0, abs=1e-12)
    assert four.published["mask_miou_train"].difference == pytest.approx(0.505 - 0.400)
    assert "seed_miou_train" not in four.published
    text = markdown(report)
    assert columns(report)[:6] == [
        "variant", "mask_miou_train", "published mask_miou_train", "n", "vs baseline", "seed_miou_train"
    ]  # fmt: skip
    assert f"| {BASE} | 41.00 ± 1.41 | 41.50 (ours -0.50) | 2 | baseline |" in text
    assert f"| {FOUR} | **50.50 ± 0.71** | 40.00 (ours +10.50) |" in text
    assert "| published | mask_miou_train | seed_miou_train | seed_miou_val | source |" in text
    assert "| Another \\| one | 66.50 | 48.30 | - | a thread |" in text
    assert f"- published, {BASE}: mask_miou_train 41.50, seed_miou_train 36.00 (a paper)" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_terminal_and_log_have_them_too(tmp_path: Path, terminal: bool) -> None:
    text = printed(on_voc(tmp_path), width=250, force_terminal=terminal)
    assert "41.50 (ours -0.50)" in text and "published mask_miou_train" in text
    (another,) = [line for line in text.splitlines() if line.startswith("Another | one")]
    assert another.split()[-4:] == ["48.30", "-", "a", "thread"]
    assert f"published, {FOUR}: mask_miou_train 40.00 (its README)" in text


def test_csv_and_json_have_them_as_fractions(tmp_path: Path) -> None:
    storage = on_voc(tmp_path).storage
    paths = write_report(build_report(storage, "demo"), tmp_path / "report", storage)
    rows = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    assert [row["variant"] for row in rows] == [BASE, FOUR, "Another | one", "A third"]
    assert [row["is_published_row"] for row in rows] == ["False", "False", "True", "True"]
    assert float(rows[1]["published_mask_miou_train"]) == 0.4 and float(rows[1]["ours_mask_miou_train"]) == 0.505
    assert float(rows[1]["difference_mask_miou_train"]) == pytest.approx(0.105)
    assert (rows[2]["published_mask_miou_train"], rows[2]["mean"], rows[2]["source"]) == ("0.665", "", "a thread")
    data = json.loads(paths[2].read_text())
    assert data["lines"][0]["published"]["mask_miou_train"]["value"] == 0.415
    assert data["other_methods"][1] == {"name": "A third", "values": {"seed_miou_val": 0.5}, "source": "a list"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"twin": "scenes"}, "this is the twin --scenes of the study, on generated data"),
        ({"data": [{"name": "scenes", "fingerprint": "ab", "generated": True}]}, "this study is on generated data"),
        ({"images": 952}, "train has 952 images here and 1,464 there"),
    ],
)
def test_no_difference_to_other_images(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    report = build_report(on_voc(tmp_path, **changes).storage, "demo")
    told = dict(report.header)["published"]
    assert told.startswith("of VOC 2012 at full size; ") and said in told and "no difference is given" in told
    assert all(claim.difference is None for line in report.lines for claim in line.published.values())
    assert "| 41.50 |" in markdown(report) and "(ours" not in markdown(report)


def test_columns_are_chosen_and_ordered(tmp_path: Path) -> None:
    study = on_voc(tmp_path, columns=["seed_miou_val", "seed_miou_train", "mask_miou_train"], published=[])
    report = build_report(study.storage, "demo")
    heads = ["variant", "seed_miou_val", "seed_miou_train", "mask_miou_train", "n", "vs baseline"]
    assert columns(report)[:6] == heads
    assert f"| {FOUR} | - | 45.50 ± 0.71 | **50.50 ± 0.71** | 2 |" in markdown(report)
    assert "published" not in markdown(report)


FILE = """\
name: s
base: {stages: [train_cam, make_seeds, evaluate]}
design: {kind: list, variants: [{name: a}, {name: b, set: {contrast.temperature: 0.2}}]}
metric: seed_miou_train
published:
  - {variant: a, values: {seed_miou_train: 55.4}, source: here}
"""


def problems(tmp_path: Path, more: str) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(FILE + more)
    with pytest.raises(ConfigError) as error:
        check_published(load_study(path))
    return str(error.value).replace(str(path), "s.yaml")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{variant: aa, values: {seed_miou_train: 1}, source: x}", "s.yaml:7: published.1.variant: no variant 'aa'"),
        ("{variant: b, values: {mask_miou_train: 1}, source: x}", "s.yaml:7: published.1.values.mask_miou_train: "),
        ("{method: m, values: {seed_miou_trian: 1}, source: x}", "did you mean seed_miou_train?"),
        ("{method: m, values: {bg_score: 1}, source: x}", "is no IoU"),
        ("{variant: a, values: {seed_miou_train: 2}, source: x}", "there is a published seed_miou_train of 'a' before"),
        ("{variant: b, values: {seed_miou_train: 155}, source: x}", "s.yaml:7: published.1.values.seed_miou_train: "),
        ("{variant: b, values: {seed_miou_train: -1}, source: x}", "greater than or equal to 0"),
        ("{variant: b, values: {seed_miou_train: 61.5}}", "published.1.source: is missing"),
        ("{variant: b, values: {seed_miou_train: 61.5}, source: ' '}", "s.yaml:7: published.1.source: "),
        ("{values: {seed_miou_train: 61.5}, source: x}", "should have either `variant`"),
        ("{variant: a, method: m, values: {seed_miou_train: 61.5}, source: x}", "should have either `variant`"),
        ("{variant: b, values: {}, source: x}", "published.1.values"),
    ],
)  # fmt: skip
def test_what_is_refused_says_where(tmp_path: Path, row: str, said: str) -> None:
    assert said in problems(tmp_path, f"  - {row}\n")


def test_columns_that_no_trial_gives_are_refused(tmp_path: Path) -> None:
    assert "columns: these stages and splits give no 'mask_miou_train'" in problems(
        tmp_path, "columns: [mask_miou_train]"
    )


def test_a_published_figure_of_a_split_of_voc_that_is_not_run_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(FILE + "  - {variant: b, values: {seed_miou_val: 58.4}, source: README}\n")
    check_published(load_study(path))
