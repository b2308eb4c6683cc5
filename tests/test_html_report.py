"""The HTML page by parsing it: nothing from outside, every variant, points where the data put them, pictures named."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_study import CLASSES, FakeStudy
from PIL import Image

from ppc.artifacts import write_json
from ppc.html_charts import HEIGHT_PX, MOST_POINTS, Chart, Point, _binned, _means, axis_chart, loss_charts, score_charts
from ppc.html_pictures import MOST_VARIANTS
from ppc.html_report import build_page, confusions, page
from ppc.report import build_report, latex

VOID = {"meta", "link", "img", "input"}
MIOUS = {0: (0.40, 0.42, 0.47), 4: (0.50, 0.53, 0.58), 32: (0.41, None, None)}  # K -> by seed


class Page(HTMLParser):
    """Elements of a page in order: (tag, attributes, text inside); an unclosed or misplaced end is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open, [self.found[i][0] for i in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.open[-1]][0] == tag, (tag, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.found[index][2].append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attrs, "".join(text).strip())
            for name, attrs, text in self.found
            if name == tag and all(attrs.get(key.rstrip("_").replace("_", "-")) == v for key, v in wanted.items())
        ]


@pytest.fixture
def fake(tmp_path: Path) -> FakeStudy:
    """K = 0, 4, 32 of three seeds with journals; one trial of K=32 failed, one is at work."""
    study = FakeStudy(tmp_path, ks=tuple(MIOUS), seeds=(0, 1, 2))
    for index, miou in enumerate(miou for mious in MIOUS.values() for miou in mious):
        study.journal(index, range(10, 40, 10))
        if miou is not None:
            study.finish(index, miou)
            path = study.storage.trial(study.entry(index)["key"]).path / "result.json"
            confusion = {"mask_train": [[90, 5, 5], [20, 80, 0], [0, 0, 0]]}
            write_json(path, {**json.loads(path.read_text()), "confusion": confusion})
    study.start(7)
    study.fail(7, "no <b>memory</b> left")
    study.start(8)
    return study


def parsed(study: FakeStudy) -> Page:
    return Page(build_page(build_report(study.storage, "demo"), study.storage))


def test_the_latex_table_can_be_taken_from_the_page(fake: FakeStudy) -> None:
    ((attributes, text),) = parsed(fake).all("pre", id="latex")
    assert text == latex(build_report(fake.storage, "demo")).strip() and attributes["tabindex"] == "0"


def test_it_is_whole_and_alone(fake: FakeStudy) -> None:
    text = build_page(build_report(fake.storage, "demo"), fake.storage)
    assert text.startswith("<!doctype html>") and '<meta charset="utf-8">' in text
    found = Page(text)
    ids = [attrs["id"] for _, attrs, _ in found.found if "id" in attrs]
    assert len(ids) == len(set(ids)) and {"table", "facts", "trials", "slider", "variant"} <= set(ids)
    named = {
        name
        for _, attrs, _ in found.found
        for key in ("aria-labelledby", "for")
        for name in (attrs.get(key) or "").split()
    }
    assert named <= set(ids)
    for _, attrs, _ in found.found:
        for key in ("src", "href", "action", "data"):
            assert (attrs.get(key) or "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text and "http" not in text.replace('http-equiv="', "")
    assert all(attrs.get("alt") for attrs, _ in found.all("img")) and found.all("img")
    levels = [int(tag[1]) for tag, _, _ in found.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert all(attrs.get("tabindex") == "0" for attrs, _ in found.all("div", class_="scroll"))
    assert build_page(build_report(fake.storage, "demo"), fake.storage) == text, "made twice it is sent once"


def test_the_table_and_the_trials_hide_nothing(fake: FakeStudy) -> None:
    found = parsed(fake)
    heads = [text for _, text in found.all("th", scope="row")]
    for k in MIOUS:
        assert heads.count(f"prototype_top_k={k}") == 2, "in the table and among the trials"
    cells = [text for _, text in found.all("td")]
    assert "53.67 ± 4.04 (best)" in cells and "+10.67 ± 0.58 (3 paired)" in cells and "0.00098 ***" in cells
    assert "1 finished, 1 running, 1 failed" in cells
    states = [(attrs["data-state"], text) for attrs, text in found.all("td") if "data-state" in attrs]
    assert states[:3] == [("FINISHED", "40.00"), ("FINISHED", "42.00"), ("FINISHED", "47.00")]
    assert states[6:] == [("FINISHED", "41.00"), ("FAILED", "failed"), ("RUNNING", "running")]
    told = [text for _, text in found.all("li")]
    assert "prototype_top_k=32 s=1: RuntimeError in train_cam: no <b>memory</b> left" in told
    facts = dict(zip([t for _, t in found.all("dt")], [t for _, t in found.all("dd")], strict=True))
    assert facts["split"] == "train: 240 images" and facts["cost"].startswith("0.00 GPU hours")
    paragraphs = " ".join(text for _, text in found.all("p"))
    assert "Generated data." in paragraphs and "Holm's correction over 1 test(s)" in paragraphs
    assert "The best mean is that of prototype_top_k=4: 53.67 ± 4.04, +10.67 ± 0.58 over the baseline" in paragraphs


def test_points_are_where_the_data_put_them(fake: FakeStudy) -> None:
    report = build_report(fake.storage, "demo")
    chart = axis_chart(report)
    assert chart is not None
    means = [attrs for attrs, _ in parsed(fake).all("circle", class_="mean") if "data-variant" in attrs]
    assert [float(str(point["data-value"])) for point in means] == [line.mean for line in report.lines]
    low, high = chart.y_range
    at = {round(value, 6): place(point) for point in means for value in [float(str(point["data-value"]))]}
    # the place is linear in the value: two points give the line, the third lies on it, higher is further up
    (a, (_, ya)), (b, (_, yb)), (c, (_, yc)) = sorted(at.items())
    assert yb == pytest.approx(ya + (yc - ya) * (b - a) / (c - a), abs=0.02) and yc < yb < ya
    assert {x for x, _ in at.values()} == {chart.px(0), chart.px(1), chart.px(2)}, "equally far apart, in K's order"
    assert 0 < chart.py(high) < chart.py(low) < HEIGHT_PX
    bars = [attrs for attrs, _ in parsed(fake).all("path", class_="bar")]
    ends = [(float(str(bar["data-low"])), float(str(bar["data-high"]))) for bar in bars]
    assert ends == [(line.mean - line.std, line.mean + line.std) for line in report.lines if line.std and line.mean]
    seeds = [float(str(attrs["data-value"])) for attrs, _ in parsed(fake).all("circle", class_="seed")]
    assert seeds == [miou for mious in MIOUS.values() for miou in mious if miou is not None]


def place(point: dict[str, str | None]) -> tuple[float, float]:
    return float(str(point["cx"])), float(str(point["cy"]))


def test_curves_are_means_over_seeds(fake: FakeStudy) -> None:
    report = build_report(fake.storage, "demo")
    (chart,) = score_charts(report, fake.rows)
    four = next(curve for curve in chart.curves if curve.variant == "prototype_top_k=4")
    assert [p.x for p in four.points] == [0.0, 0.25, 0.5]
    assert [p.y for p in four.points] == pytest.approx([0.1, (0.50 + 0.53 + 0.58) / 3, 0.2])
    drawn = [attrs["points"] for attrs, _ in parsed(fake).all("polyline", data_variant="prototype_top_k=4")]
    assert drawn[0] == " ".join(f"{chart.px(p.x)},{chart.py(p.y)}" for p in four.points)
    assert len(drawn) == 3, "the score, train/loss and train/cls"
    assert _means([{0: 1.0, 10: 3.0, 20: 9.0}, {0: 3.0, 10: 5.0}])[1].y == 4.0 and len(_means([{0: 1.0}, {}])) == 0
    many = _binned([Point(float(step), float(step)) for step in range(1000)])
    assert len(many) <= MOST_POINTS and Point(8.0, 4.0) in many


def test_a_seed_that_has_only_begun_costs_no_chart(fake: FakeStudy) -> None:
    report = build_report(fake.storage, "demo")
    before = loss_charts(report, fake.storage, fake.rows)
    fake.journal(3, range(40, 2000))  # K = 4, the first of three seeds: thinned alone it would share no step with them
    after = loss_charts(build_report(fake.storage, "demo"), fake.storage, fake.rows)
    assert [chart.curves for chart in after] == [chart.curves for chart in before] and len(after) == 2


def test_an_axis_without_numbers_is_not_joined(fake: FakeStudy) -> None:
    for entry in fake.study["trials"]:
        entry["factors"] = {"method.name": entry["variant"][-1]}
    write_json(fake.storage.study("demo").path / "study.json", fake.study)
    chart = axis_chart(build_report(fake.storage, "demo"))
    assert isinstance(chart, Chart) and not chart.joined and [name for _, name in chart.x_ticks] == ["1", "2", "3"]
    assert not parsed(fake).all("polyline", class_="joint")


def test_the_slider_goes_over_variants_and_images_are_small_pngs(fake: FakeStudy) -> None:
    found = parsed(fake)
    (slider,) = [attrs for attrs, _ in found.all("input")]
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "2", "1")
    assert found.all("output")[0][1] == "prototype_top_k=4", "it begins with the best"
    shown = [attrs["data-index"] for attrs, _ in found.all("figure") if "data-index" in attrs]
    assert shown == ["0", "1", "2"] * 2
    for attrs, _ in found.all("img"):
        data = base64.b64decode(str(attrs["src"]).removeprefix("data:image/png;base64,"))
        assert np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).shape == (48, 64, 3)


def test_data_that_are_not_here_are_not_made(fake: FakeStudy, tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    for entry in fake.study["trials"]:
        entry["config"]["data"]["root"] = str(root)
    write_json(fake.storage.study("demo").path / "study.json", fake.study)
    told = [text for _, text in parsed(fake).all("li")]
    assert f"no images and truth: {root} is not on this machine" in told and not root.exists()


def test_a_torn_picture_is_named_and_no_more(fake: FakeStudy) -> None:
    folder = fake.storage.stage("make_seeds", fake.entry(3)["stages"][1]["key"]).path
    (folder / "overlays" / "2007_0.png").write_bytes(b"PNG?")
    assert any("2007_0.png of prototype_top_k=4 s=0" in text for _, text in parsed(fake).all("li"))


def test_many_variants_keep_the_baseline_and_the_best(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path, ks=tuple(range(MOST_VARIANTS + 4)), seeds=(0,))
    for index in range(MOST_VARIANTS + 4):
        study.finish(index, 0.4 + 0.01 * index, overlays=1)
    found = parsed(study)
    assert len([1 for attrs, _ in found.all("figure") if "data-index" in attrs]) == MOST_VARIANTS
    assert found.all("output")[0][1] == f"prototype_top_k={MOST_VARIANTS + 3}"
    assert any(f"CAMs of {MOST_VARIANTS} variants are shown" in text for _, text in found.all("li"))


def test_classes_and_confusions(fake: FakeStudy) -> None:
    report = build_report(fake.storage, "demo")
    base, best = confusions(report, fake.rows)
    assert base.title.startswith("Confusions of prototype_top_k=0") and best.title.startswith(
        "Confusions of prototype_top_k=4"
    )
    assert best.columns == CLASSES
    assert best.rows[:2] == [("background", [0.9, 0.05, 0.05]), ("disc", [0.2, 0.8, 0.0])]
    assert best.rows[2] == ("ring", [None, None, None]), "no pixel is of this class"
    cells = [(attrs["style"], text) for attrs, text in parsed(fake).all("td") if "style" in attrs]
    assert cells[:3] == [("--heat:0.480", "80.0")] * 3, "the IoU of background, of the masks, of each variant"
    assert cells[3] == ("--heat:0.240", "40.0")


def test_a_study_without_results_has_a_page(tmp_path: Path) -> None:
    study = FakeStudy(tmp_path)
    found = parsed(study)
    assert not found.all("svg") and not found.all("input") and not found.all("script")
    assert [text for attrs, text in found.all("td") if attrs.get("data-state")] == ["pending"] * 4


def test_what_keeps_the_page_from_being_made_is_on_it(fake: FakeStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("<no> page")

    monkeypatch.setattr("ppc.html_report.cam_pictures", broken)
    assert "RuntimeError: &lt;no&gt; page" in page(build_report(fake.storage, "demo"), fake.storage)
