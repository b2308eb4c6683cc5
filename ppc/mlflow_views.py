"""Saved views of a study in MLflow's UI: its trials, its axes against mIoU, its CAMs, its curves, opened by a link.

Without them the UI of a grid shows the launch alone, ten runs, a chart for each of a hundred metrics. A view is a tag
of the experiment that holds a state of the page; it is no interface that MLflow promises, so a link names a view only
where the server is of a version that was seen to open it (`KNOWN`), and else the plain page. Imports no mlflow.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

from ppc.artifacts import Storage
from ppc.mlflow_server import sent_to, server_version
from ppc.redact import safe_uri
from ppc.run_record import NO_LOSS, metric_name

KNOWN = ("3.17",)  # versions of MLflow in whose UI the views were looked at (tests/test_browser.py)
TAG = "mlflow.sharedViewState."
TAG_LIMIT = 20_000  # characters of an experiment's tag that MLflow keeps
IMAGES = 30  # pictures of one view: the page loads them all
HEIGHT_PX, TALL_PX = 360, 640  # of a chart, of a grid of pictures
PAGE_RUNS = 100  # that the page loads at once
TRIALS_ONLY = "tags.`ppc.kind` = 'trial'"  # brings the children of a launch to the top level
FIRST = "results"  # the view that a study's link opens
MODES = {FIRST: "CHART", "classes": "ARTIFACT", "cams": "CHART", "training": "CHART"}  # beside the runs; else a table
WORKFLOW = "workflowType=machine_learning"  # else the UI may open on its pages for language models


@dataclass(frozen=True)
class SavedView:
    """One view: `key` names it in links, `title` in the UI's menu; `state` is the page's, as the UI keeps it."""

    key: str
    title: str
    state: dict[str, Any]

    @property
    def tag(self) -> str:
        """The experiment's tag that holds it."""
        return f"{TAG}ppc-{self.key}"

    def value(self, created_ms: int) -> str:
        """What the tag holds. The menu lists the newest first."""
        packed = base64.b64encode(zlib.compress(json.dumps(self.state, sort_keys=True).encode(), 9)).decode()
        told = {"name": self.title, "createdAt": created_ms, "updatedAt": created_ms, "state": f"deflate;{packed}"}
        return json.dumps(told)


def saved_views(
    factors: Sequence[str], metric: str, metrics: Sequence[str], images: Sequence[str], num_trials: int, base_ms: int
) -> dict[str, str]:
    """(tag, value) of all views of a study, in the order of the menu.

    `factors` are its axes and `metric` its deciding one, as the study names them; `metrics` and `images` are the names
    under which MLflow has values and pictures of its trials now. A view that does not fit into a tag is left out.
    """
    views = views_of(factors, metric, metrics, images, num_trials)
    tags = {view.tag: view.value(base_ms + len(views) - place) for place, view in enumerate(views)}
    return {tag: value for tag, value in tags.items() if len(value) <= TAG_LIMIT}


def views_of(
    factors: Sequence[str], metric: str, metrics: Sequence[str], images: Sequence[str], num_trials: int
) -> list[SavedView]:
    """The views; those without anything to show are left out. See `saved_views`."""
    params = [metric_name(name) for name in factors]
    decides = metric_name(f"final/{metric}")
    finals = [decides, *sorted(name for name in metrics if name.startswith("final/") and name != decides)]
    costs = sorted(name for name in metrics if name.startswith("cost/") and not name.endswith("_s"))
    curves = sorted(
        (name for name in metrics if name.startswith(("train/", "val/")) and name.partition("/")[2] not in NO_LOSS),
        key=lambda name: (not name.endswith("/loss"), name),
    )
    scores = sorted(name for name in metrics if name.startswith("curve/"))
    columns = [
        *(_column("params", name) for name in [*params, "seed"]),
        *(_column("metrics", name) for name in [*finals, "cost/wall_s", *costs]),
        *(_column("tags", name) for name in ("ppc.state", "ppc.attempt", "ppc.error")),
    ]
    best_first = {"orderByKey": _column("metrics", decides), "orderByAsc": False}
    order = best_first if num_trials <= PAGE_RUNS else {}  # else a chart would have the best alone
    table = {**order, "selectedColumns": columns}
    results = [
        *(("against its axes", _scatter(name, decides)) for name in params),
        *([("components", _parallel([*params, "seed"], decides))] if params else []),
        *(("scores", _bar(name)) for name in finals),
        *(("IoU of each class, by its number", _line(name)) for name in metrics if name == "profile/class_iou_by_id"),
        *(("mIoU over the background score", _line(name)) for name in scores),
    ]  # fmt: skip
    views = [
        SavedView(FIRST, "Results: axes, components, scores", {**table, **_charts(results, metrics)}),
        SavedView("trials", "Trials", table),
    ]
    if any(name == "profile/class_iou_by_id" for name in metrics):
        views.append(SavedView("classes", "IoU of classes x trials", table))
    if images:
        pictures = [("CAM", _pictures(images[:IMAGES]))]
        views.append(SavedView("cams", "CAMs: images x trials", {**table, **_charts(pictures, metrics)}))
    if curves:
        grouped = {
            "groupBy": {
                "aggregateFunction": "average", "groupByKeys": [{"mode": "tag", "groupByData": "ppc.variant"}],
            },
            **_charts([("training, mean of the seeds", _line(name)) for name in curves], metrics),
        }  # fmt: skip
        views.append(SavedView("training", "Training, grouped by variant", {**table, **grouped}))
    always = {"searchFilter": TRIALS_ONLY, "runsHiddenMode": "SHOW_ALL", "hideEmptyCharts": True}
    return [SavedView(view.key, view.title, {**always, **view.state}) for view in views]


def _column(kind: str, name: str) -> str:
    return f"{kind}.`{name}`"


def _charts(cards: Sequence[tuple[str, dict[str, Any]]], metrics: Sequence[str]) -> dict[str, Any]:
    """Charts in named sections, and all other metrics in closed sections below: the UI would open one for each."""
    titles = [title for title, _ in cards]
    sections = dict.fromkeys(titles)
    grids = {title for title, card in cards if card["type"] == "IMAGE"}
    rest = dict.fromkeys(name.rpartition("/")[0] for name in sorted(metrics))
    names = [*sections, *(name for name in [*rest, "cam"] if name not in sections)]
    numbers = {name: _number("section", name) for name in names}
    return {
        "compareRunSections": [
            {
                "uuid": numbers[name], "name": name, "display": name in sections, "isReordered": True,
                "columns": min(3, max(1, titles.count(name))),
                "cardHeight": TALL_PX if name in grids else HEIGHT_PX,
            }
            for name in names
        ],
        "compareRunCharts": [
            {
                "uuid": _number(title, json.dumps(card, sort_keys=True)), "metricSectionId": numbers[title],
                "deleted": False, "isGenerated": False, **card,
            }
            for title, card in cards
        ],
        "isAccordionReordered": True,
    }  # fmt: skip


def _number(*words: str) -> str:
    return str(uuid5(NAMESPACE_URL, "ppc/" + "/".join(words)))


def _scatter(param: str, metric: str) -> dict[str, Any]:
    """A point a trial: the value of an axis against a metric."""
    return {
        "type": "SCATTER", "runsCountToCompare": 100, "xaxis": {"key": param, "type": "PARAM"},
        "yaxis": {"key": metric, "type": "METRIC"},
    }  # fmt: skip


def _parallel(params: Sequence[str], metric: str) -> dict[str, Any]:
    return {
        "type": "PARALLEL", "runsCountToCompare": 100, "selectedParams": list(params), "selectedMetrics": [metric],
        "showAllRuns": True,
    }  # fmt: skip


def _bar(metric: str) -> dict[str, Any]:
    return {"type": "BAR", "runsCountToCompare": 100, "metricKey": metric, "displayName": metric.partition("/")[2]}


def _line(metric: str) -> dict[str, Any]:
    return {
        "type": "LINE", "runsCountToCompare": 100, "metricKey": metric, "lineSmoothness": 0, "scaleType": "linear",
        "xAxisKey": "step", "xAxisScaleType": "linear", "selectedXAxisMetricKey": "", "yAxisKey": "metric",
        "yAxisExpressions": [], "ignoreOutliers": False, "range": {}, "useGlobalXaxisKey": False,
        "displayName": metric.partition("/")[2],
    }  # fmt: skip


def _pictures(images: Sequence[str]) -> dict[str, Any]:
    return {"type": "IMAGE", "runsCountToCompare": 10, "imageKeys": list(images), "step": 0, "showRunParams": True}


def study_link(base_url: str, experiment: str | None, version: str | None, view: str = FIRST) -> str:
    """Address of a study in the UI: a view of it where MLflow's version is known to show it, else its runs.

    Without an experiment (nothing was sent there) that of the UI itself.
    """
    if experiment is None:
        return base_url
    page = f"{base_url.rstrip('/')}/#/experiments/{quote(experiment)}/runs?{WORKFLOW}"
    if version is None or version.rpartition(".")[0] not in KNOWN:
        return page
    mode = f"&compareRunsMode={MODES[view]}" if view in MODES else ""
    return f"{page}&viewStateShareKey=ppc-{view}{mode}"


def links(url: str, storage: Storage, study_name: str | None, uri: str) -> dict[str, str]:
    """Where to look, by name: the study on the server at `url`, and the report of its newest launch.

    `uri` is the tracking URI to which the study was sent; the server at `url` shows what is there.
    """
    base = safe_uri(url).rstrip("/")
    memory = {} if study_name is None else sent_to(storage, study_name, uri)
    experiment = memory.get("experiment")
    found = {"MLflow": study_link(base, experiment, server_version(url))}
    launches = memory.get("launches", {})
    told = [one for _, one in sorted(launches.items()) if "file/report.html" in one["sent"] and not one["deleted"]]
    if told:
        newest = told[-1]
        run = f"{base}/#/experiments/{quote(str(experiment))}/runs/{newest['id']}"
        found["its report"] = f"{run}/artifacts/report/report.html?{WORKFLOW}"
    return found
