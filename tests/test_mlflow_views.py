"""The views that a study's link opens: what their state holds, that it fits into a tag, and when a link names one."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest

from ppc.mlflow_views import FIRST, TAG_LIMIT, TRIALS_ONLY, saved_views, study_link, views_of

METRICS = [
    "cost/gpu_hours", "cost/train_cam_s", "curve/miou_train", "final/mask_miou_train", "final/seed_miou_train",
    "profile/class_iou_by_id", "train/loss", "val/loss",
]  # fmt: skip


def views(factors: list[str] | None = None, images: tuple[str, ...] = ("cam/a", "cam/b")) -> dict[str, dict[str, Any]]:
    """States of the views by their keys, as the UI reads them out of the tags."""
    names = ["contrast.prototype_top_k"] if factors is None else factors
    found = {}
    for tag, value in saved_views(names, "mask_miou_train", METRICS, images, 12, 1000).items():
        told = json.loads(value)
        method, _, packed = told["state"].partition(";")
        assert method == "deflate"
        found[tag.removeprefix("mlflow.sharedViewState.ppc-")] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return found


def charts(state: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Charts by the name of their section."""
    names = {section["uuid"]: section["name"] for section in state["compareRunSections"]}
    found: dict[str, list[dict[str, Any]]] = {}
    for chart in state["compareRunCharts"]:
        found.setdefault(names[chart["metricSectionId"]], []).append(chart)
    return found


def test_every_view_shows_all_trials_and_no_launch() -> None:
    found = views()
    assert list(found) == ["results", "trials", "classes", "cams", "training"]
    for state in found.values():
        assert (state["searchFilter"], state["runsHiddenMode"]) == (TRIALS_ONLY, "SHOW_ALL")
        assert state["orderByKey"] == "metrics.`final/mask_miou_train`" and not state["orderByAsc"]
        assert state["selectedColumns"][:2] == ["params.`contrast.prototype_top_k`", "params.`seed`"]
    numbers = [json.loads(value)["createdAt"] for value in saved_views(["k"], "m", METRICS, ["cam/a"], 12, 5).values()]
    assert numbers == sorted(numbers, reverse=True)  # the menu lists the newest first


def test_the_results_show_axes_components_scores_and_classes() -> None:
    found = charts(views(["contrast.prototype_top_k", "method"])["results"])
    axes = found["against its axes"]
    assert [chart["xaxis"]["key"] for chart in axes] == ["contrast.prototype_top_k", "method"]
    assert {chart["yaxis"]["key"] for chart in axes} == {"final/mask_miou_train"}
    (components,) = found["components"]
    assert components["selectedParams"] == ["contrast.prototype_top_k", "method", "seed"]
    scores = [chart["metricKey"] for chart in found["scores"]]
    assert scores == ["final/mask_miou_train", "final/seed_miou_train"]
    assert [chart["type"] for chart in found["IoU of each class, by its number"]] == ["LINE"]
    assert len({chart["uuid"] for each in found.values() for chart in each}) == sum(map(len, found.values()))


def test_training_is_grouped_by_variant_and_other_metrics_wait_in_closed_sections() -> None:
    state = views()["training"]
    assert state["groupBy"]["groupByKeys"] == [{"mode": "tag", "groupByData": "ppc.variant"}]
    assert [chart["metricKey"] for chart in next(iter(charts(state).values()))] == ["train/loss", "val/loss"]
    shown = {section["name"]: section["display"] for section in state["compareRunSections"]}
    closed = {name for name, display in shown.items() if not display}
    assert closed == {"cost", "curve", "final", "profile", "train", "val", "cam"}


def test_what_there_is_nothing_of_has_no_view() -> None:
    assert [view.key for view in views_of([], "mask_miou_train", [], [], 0)] == ["results", "trials"]
    assert "components" not in charts(views([])["results"])
    assert "cams" not in views(images=())


def test_a_view_of_a_large_study_fits_into_a_tag_or_is_left_out() -> None:
    factors = [f"contrast.factor_{i}" for i in range(12)]
    metrics = [f"{part}/metric_{i}" for part in ("final", "train", "cost", "curve") for i in range(60)]
    images = [f"cam/2007_{i:06d}" for i in range(400)]
    tags = saved_views(factors, "metric_0", [*metrics, "profile/class_iou_by_id"], images, 12, 0)
    assert len(tags) == 5 and all(len(value) <= TAG_LIMIT for value in tags.values())
    names = [f"{i}{'x' * 300}{i * 7919}" for i in range(400)]
    tags = saved_views([zlib.crc32(n.encode()).to_bytes(4, "big").hex() * 30 for n in names], "m", names, [], 12, 0)
    assert all(len(value) <= TAG_LIMIT for value in tags.values())
    assert len(tags) < 2


def test_more_trials_than_the_page_loads_are_not_the_best_alone() -> None:
    few, many = (views_of(["k"], "mask_miou_train+val", METRICS, [], n)[0].state for n in (100, 101))
    assert few["orderByKey"] == "metrics.`final/mask_miou_train_val`", "the name under which MLflow has the values"
    assert "orderByKey" not in many


@pytest.mark.parametrize("version", [None, "2.9.1", "4.0.0", "3.170.1"])
def test_a_link_names_a_view_only_where_mlflow_is_known_to_open_it(version: str | None) -> None:
    plain = "http://h:5000/#/experiments/7/runs?workflowType=machine_learning"
    assert study_link("http://h:5000/", "7", version) == plain
    assert study_link("http://h:5000", "7", "3.17.2") == f"{plain}&viewStateShareKey=ppc-{FIRST}&compareRunsMode=CHART"
    assert study_link("http://h:5000", "7", "3.17.0", "trials") == f"{plain}&viewStateShareKey=ppc-trials"
    assert study_link("http://h:5000", None, version) == "http://h:5000"
