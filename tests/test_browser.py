"""What people look at, in a real browser: the views of a study in MLflow's UI, and the report as one HTML file.

`make screenshots` keeps the pictures of this test under docs/img; they show generated numbers.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import Page, chromium, missing
from fake_study import CLASSES, FakeStudy

from ppc.mlflow_embedded import start_ui
from ppc.mlflow_server import default_uri, experiment_id, server_version
from ppc.mlflow_views import links, study_link
from ppc.report import build_report, latex, live_note, report_of, write_report
from ppc.run_record import COLOURS
from ppc.tracking import make_tracker

pytest.importorskip("mlflow")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
KS, SEEDS = (0, 4, 16, 32), (0, 1, 2)
STEPS = 20
PLOTS = "return [...document.querySelectorAll('.js-plotly-plot')].map(plot => [plot.data, plot.layout.title])"


class Served(NamedTuple):
    """A finished study in MLflow, and its UI."""

    fake: FakeStudy
    url: str
    mious: list[float]
    report: Path

    def view(self, name: str) -> str:
        number = experiment_id(self.fake.storage, "demo", default_uri(self.fake.storage))
        return study_link(self.url, number, server_version(self.url), name)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    fake = FakeStudy(tmp_path_factory.mktemp("served") / "storage", ks=KS, seeds=SEEDS)
    fake.storage.study("demo").new_launch()
    draw, mious = random.Random(0), []
    for index in range(len(KS) * len(SEEDS)):
        mious.append(round(0.5 + 0.02 * (index // len(SEEDS)) + 0.01 * draw.random(), 4))
        fake.start(index)
        fake.journal(index, range(STEPS))
        fake.finish(index, mious[-1])
    rows = fake.rows
    files = write_report(report_of(fake.storage, fake.study, rows), fake.storage.study("demo").path / "report",
                         fake.storage)  # fmt: skip
    tracker = make_tracker(None, fake.storage, fake.study, "001")
    tracker.sync(rows, final=True, note=live_note(fake.storage, fake.study)(rows))
    tracker.attach(files)
    tracker.close()
    with start_ui(fake.storage) as server:
        yield Served(fake, server.url, mious, next(Path(path) for path in files if path.suffix == ".html"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def labels(served: Served) -> list[str]:
    return [row.label for row in served.fake.rows]


def shows_all_trials(page: Page, served: Served) -> None:
    page.until("12 matching runs", lambda: "12 matching runs" in page.text())
    page.until("the name of every trial", lambda: all(label in page.text() for label in labels(served)))
    assert "launch 001" not in page.text()


def traces(page: Page, kind: str) -> list[dict[str, Any]]:
    """The data of all charts of a kind, as the page's charts hold them."""
    return [trace for data, _ in page.run(PLOTS) for trace in data if trace.get("type", "scatter") == kind]


# -- MLflow's UI


def test_the_link_opens_on_the_answer_and_on_every_trial(page: Page, served: Served) -> None:
    page.open(links(served.url, served.fake.storage, "demo", default_uri(served.fake.storage))["MLflow"])
    shows_all_trials(page, served)
    assert "The best mean is that of prototype_top_k=32" in page.text() and "more than the noise" in page.text()

    def points() -> list[tuple[float, float, str]]:
        """(K, mIoU, colour) of every point."""
        return sorted(
            (float(x), round(float(y), 4), str(colour))
            for trace in traces(page, "scatter")
            if trace.get("mode") == "markers"
            for x, y, colour in zip(trace["x"], trace["y"], trace["marker"]["color"], strict=True)
        )

    expected = sorted(
        (float(KS[i // len(SEEDS)]), miou, COLOURS[i // len(SEEDS)]) for i, miou in enumerate(served.mious)
    )
    page.until("a point a trial, in its variant's colour", lambda: points() == expected)
    page.picture("mlflow_results")


def test_components_and_scores_have_their_values(page: Page, served: Served) -> None:
    page.open(served.view("results"))
    shows_all_trials(page, served)
    page.until("parallel coordinates", lambda: "Parallel Coordinates" in page.text())
    page.run(  # a chart is drawn when it comes into sight
        "[...document.querySelectorAll('*')].filter(e => e.textContent == 'Parallel Coordinates')"
        ".forEach(e => e.scrollIntoView())"
    )
    ink = (
        "const c = document.querySelector('.parcoords canvas.foreground'); if (!c) return 0;"
        "const rgba = [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data];"
        "return rgba.filter((v, i) => i % 4 == 3 && v).length"
    )
    page.until("a line a trial", lambda: page.run(ink) > 1000)
    axes = page.run("return document.querySelector('.parcoords svg').textContent")
    assert "prototype_top_k" in axes and "seed" in axes
    page.picture("mlflow_components")


def test_scores_classes_and_curves_have_their_values(page: Page, served: Served) -> None:
    page.open(served.view("results"))
    shows_all_trials(page, served)

    def of(title: str, kind: str) -> list[dict[str, Any]]:
        """Data of the charts in sight when a section is; charts are drawn when they come into sight."""
        page.run(
            "[...document.querySelectorAll('*')].filter(e => e.children.length == 0 && e.textContent == arguments[0])"
            ".forEach(e => e.scrollIntoView())",
            title,
        )
        return traces(page, kind)

    def bars() -> bool:
        found = [sorted(round(x, 4) for x in trace["x"]) for trace in of("scores", "bar")]
        return sorted(served.mious) in found and sorted(round(m - 0.05, 4) for m in served.mious) in found

    page.until("a bar a trial, of mask and seed mIoU", bars)
    per_class = [0.8, 0.4, 0.0]
    lines = "IoU of each class, by its number"
    page.until("a line a trial over its classes", lambda: sum(
        trace["y"] == pytest.approx(per_class) for trace in of(lines, "scatter") if len(trace.get("y") or []) == 3
    ) >= 12)  # fmt: skip
    title = "mIoU over the background score"

    def peaks() -> list[float]:
        curves = [list(trace.get("y") or []) for trace in of(title, "scatter")]
        return sorted({round(curve[1], 4) for curve in curves if len(curve) == 3 and curve[0] == 0.1})

    page.until("a curve a trial over the background score", lambda: peaks() == sorted(served.mious))


def test_the_trials_table(page: Page, served: Served) -> None:
    page.size(2600, 1000)
    page.open(served.view("trials"))
    shows_all_trials(page, served)
    text = page.text()
    assert text.index("prototype_top_k=32 s=") < text.index("prototype_top_k=0 s="), "the best comes first"
    page.until("final mIoU of the best", lambda: f"{max(served.mious):.4f}"[:5] in page.text())
    cells = "return [...document.querySelectorAll(`.ag-cell[col-id*='${arguments[0]}']`)].map(e => e.innerText.trim())"
    page.until("states", lambda: page.run(cells, "ppc.state").count("FINISHED") == 12)
    assert sorted(page.run(cells, "contrast.prototype_top_k")) == sorted(str(k) for k in KS for _ in SEEDS)
    assert page.run(cells, "cost/wall_s").count("30") == 12
    page.size(1600, 1000)
    page.picture("mlflow_trials")


def test_the_matrix_of_classes_and_trials(page: Page, served: Served) -> None:
    page.open(served.view("classes"))
    shows_all_trials(page, served)
    page.until("per_class_iou.json", lambda: "per_class_iou.json" in page.text())
    page.until("the classes", lambda: all(name in page.text() for name in CLASSES))
    assert "0.7" in page.text() and "0.3" in page.text()
    page.picture("mlflow_classes")


def test_the_grid_of_cams(page: Page, served: Served) -> None:
    page.open(served.view("cams"))
    shows_all_trials(page, served)
    drawn = (
        "return [...document.querySelectorAll('img')].filter(i => i.naturalWidth > 0 && /artifact/.test(i.src)).length"
    )
    page.until("image names", lambda: "cam/2007_0" in page.text())
    page.until("pictures", lambda: page.run(drawn) >= 2)
    page.picture("mlflow_cams")


def test_training_curves_are_grouped_by_variant(page: Page, served: Served) -> None:
    page.open(served.view("training"))
    page.until(
        "4 groups",
        lambda: page.text().count("Group: prototype_top_k") >= len(KS) or "Group by: ppc.variant" in page.text(),
    )

    def losses() -> list[list[float]]:
        return [trace["y"] for trace in traces(page, "scatter") if len(trace.get("y") or []) == STEPS]

    page.until("curves of the loss", lambda: len(losses()) >= len(KS))
    expected = [1 / (1 + step) for step in range(STEPS)]
    page.until(
        "the mean of each variant", lambda: sum(curve == pytest.approx(expected) for curve in losses()) >= len(KS)
    )
    page.picture("mlflow_training")


def test_the_link_of_the_report_shows_its_table(page: Page, served: Served) -> None:
    page.open(links(served.url, served.fake.storage, "demo", default_uri(served.fake.storage))["its report"])
    page.until("the report", lambda: page.run("return document.querySelectorAll('iframe').length"))

    def inside() -> str:
        frame = page.driver.find_element("tag name", "iframe")
        page.driver.switch_to.frame(frame)
        try:
            return page.text()
        finally:
            page.driver.switch_to.default_content()

    page.until("its verdict", lambda: "The best mean is that of prototype_top_k=32" in inside())
    page.picture("mlflow_report")


# -- the report as one file


@pytest.fixture
def report(page: Page, served: Served) -> Iterator[Page]:
    page.tell("Network.enable")
    page.tell("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)
    page.open(served.report.as_uri())
    yield page
    page.tell("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.tell("Emulation.setEmulatedMedia", features=[], media="")
    page.size(1600, 1000)


def test_the_report_needs_no_network_and_says_nothing_to_the_console(report: Page, served: Served) -> None:
    assert "The best mean is that of prototype_top_k=32" in report.text()
    assert report.run("return document.querySelectorAll('#results tbody tr').length") == len(KS)
    values = report.run("return [...document.querySelectorAll('circle.seed')].map(c => Number(c.dataset.value))")
    assert sorted(values) == pytest.approx(sorted(served.mious))
    assert (
        report.run("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length")
        == 0
    )
    assert report.errors() == []
    report.picture("report")


def test_the_slider_changes_the_cam_by_mouse_and_by_keyboard(report: Page) -> None:
    shown = (
        "return [...document.querySelectorAll('.row figure[data-index]:not([hidden]) img')]"
        ".map(i => [i.src, i.alt, i.naturalWidth])"
    )
    before = report.run(shown)
    assert len(before) == 2 and all(width > 0 for _, _, width in before)
    slider = report.driver.find_element("id", "variant")
    slider.send_keys("\ue011")  # Home
    report.run("arguments[0].scrollIntoView()", slider)
    first = report.run(shown)
    slider.send_keys("\ue014")  # right
    second = report.run(shown)
    assert [alt for _, alt, _ in first] != [alt for _, alt, _ in second]
    assert all(one[0] != other[0] for one, other in zip(first, second, strict=True)), "another picture"
    assert report.run("return document.getElementById('chosen').textContent") == "prototype_top_k=4"
    assert slider.get_attribute("aria-valuetext") == "prototype_top_k=4"
    report.picture("report_slider")


def test_a_click_selects_the_latex_table(report: Page, served: Served) -> None:
    report.driver.find_element("css selector", "details summary").click()
    report.driver.find_element("id", "latex").click()
    selected = report.run("return getSelection().toString()").strip()
    assert selected == latex(build_report(served.fake.storage, "demo")).strip()


def test_every_region_that_scrolls_can_be_reached_by_keyboard(report: Page) -> None:
    stops = report.run(
        "return document.querySelectorAll(':not(details) > .scroll[tabindex=\"0\"], input, summary').length"
    )
    reached = set()
    for _ in range(stops + 2):
        report.driver.switch_to.active_element.send_keys("\ue004")  # Tab
        reached.add(
            report.run(
                "const e = document.activeElement; return e.id || e.getAttribute('aria-labelledby') || e.tagName"
            )
        )
    assert reached >= {"variant", "table", "trials", "SUMMARY"} and len(reached - {"BODY"}) == stops


def test_it_reads_on_a_phone_in_the_dark_and_printed(report: Page, tmp_path: Path) -> None:
    contrast = """
      const lum = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
        .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
      const paper = lum(getComputedStyle(document.body).backgroundColor);
      return [...document.querySelectorAll('p, th, td, dt, dd, h1, h2, figcaption, li')].map(e => {
        const ink = lum(getComputedStyle(e).color);
        return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05); });
    """
    light = report.run("return getComputedStyle(document.body).backgroundColor")
    assert min(report.run(contrast)) >= 4.5  # WCAG AA
    report.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert report.run("return getComputedStyle(document.body).backgroundColor") != light
    assert min(report.run(contrast)) >= 4.5
    report.picture("report_dark")
    report.tell("Emulation.setEmulatedMedia", features=[])
    report.size(390, 844)
    assert report.run("return document.documentElement.scrollWidth") <= 390, "a phone must not scroll sideways"
    report.picture("report_phone")
    printed = base64.b64decode(report.tell("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 10_000
    report.tell("Emulation.setEmulatedMedia", media="print")
    assert report.run("return getComputedStyle(document.getElementById('slider')).display") == "none"
    hidden = (
        "return [...document.querySelectorAll('.row figure')].filter(f => getComputedStyle(f).display == 'none').length"
    )
    assert report.run(hidden) == 0, "on paper all variants are shown"
