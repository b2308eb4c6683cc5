"""What a tracker is told of a study: names, tags and points, made from rows and journals. Knows no tracker."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from io import StringIO
from statistics import fmean
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from ppc.artifacts import read_journal
from ppc.changes import code_of
from ppc.config import DataConfig
from ppc.ledger import TrialRow, stopped_at
from ppc.places import StoragePath, size_of
from ppc.planning import data_name

# Told apart by most eyes, and in this order far from their neighbours.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3db8", "#8c6d31", "#c1121f", "#4d4d4d",
    "#2a9d8f", "#b5179e",
)  # fmt: skip
# what a journal has beside losses
NO_LOSS = ("lr", "epoch", "silent_share", "bg_share", "prototype_similarity", "steps_per_s")
DIGEST = 36  # characters of a dataset's digest: MLflow's own limit


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: float
    time_ms: int
    step: int


def is_number(value: Any) -> bool:
    """Whether a value can be a metric: MLflow would store infinity as 1.8e308 and NaN as 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric_name(name: str) -> str:
    """A name that MLflow takes: other characters than letters, digits and `_-.: ` become `_`, no empty parts."""
    parts = [re.sub(r"[^\w\-.: ]", "_", part) for part in name.split("/")]
    return "/".join(part for part in parts if part.strip(". ")) or "unnamed"


def image_name(name: str) -> str:
    """A name that MLflow takes for an image; of two that differ in letters it does not take, each has its own."""
    plain = re.sub(r"[^a-zA-Z0-9_\-.]", "_", name)
    return plain if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:6]}"


def code_tags(study: dict[str, Any], key: str | None = None) -> dict[str, str]:
    """Tags of every run of a study: the code that it, or its trial of this key, was planned with, and by whom."""
    code = (study.get("code") or {}) if key is None else code_of(study, key)
    tags = {"mlflow.source.name": "ppc", "mlflow.source.type": "LOCAL", "ppc.study": study["name"]}
    tags["ppc.version"] = str(code.get("version"))
    if code.get("commit"):
        tags |= {"mlflow.source.git.commit": code["commit"], "ppc.dirty": str(bool(code.get("dirty"))).lower()}
    if os.environ.get("USER"):
        tags["mlflow.user"] = os.environ["USER"]
    return tags


def data_of(row: TrialRow, study: dict[str, Any]) -> list[dict[str, Any]]:
    """The datasets of the study that a trial uses, as they were when it was planned."""
    found = list(study["data"])
    if len(found) > 1:
        place = data_name(DataConfig.model_validate(row.config["data"]))
        found = [data for data in found if data["root"] == place]
    if study.get("changes"):  # then trials of a study can have seen other contents
        mine = next(entry for entry in study["trials"] if entry["key"] == row.key)
        found = [{**data, "fingerprint": mine.get("fingerprint", data["fingerprint"])} for data in found]
    return found


def datasets(row: TrialRow, study: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, digest, source) of the datasets of a trial, as MLflow takes them."""
    return [
        (
            f"{data['name']} (generated)" if data.get("generated") else data["name"],
            data["fingerprint"][:DIGEST],
            json.dumps({"uri": data["root"]}),
        )
        for data in data_of(row, study)
    ]


def trial_tags(row: TrialRow, study: dict[str, Any], host: str | None) -> dict[str, str]:
    """Tags of a trial's run, as its files say now."""
    variants = list(dict.fromkeys(entry["variant"] for entry in study["trials"]))
    tags = {
        "ppc.kind": "trial", "ppc.trial_key": row.key, "ppc.variant": row.variant, "ppc.variant_key": row.variant_key,
        "ppc.attempt": str(row.attempt), "ppc.state": row.state,
        "mlflow.runColor": COLOURS[variants.index(row.variant) % len(COLOURS)], **code_tags(study, row.key),
    }  # fmt: skip
    if host:
        tags["ppc.host"] = host
    if row.stopped is not None:
        tags["ppc.stopped"] = stopped_at(row)
    if row.reused:
        tags["ppc.reused"] = "true"
    for data in data_of(row, study):
        tags[f"ppc.data.{data['name']}"] = data["fingerprint"]
    if row.error is not None:
        tags["ppc.error"] = f"{row.error['type']}: {row.error['message']}"[:1000]
        tags["ppc.error_stage"] = str(row.error.get("stage"))
    if row.result is not None:
        tags |= {f"ppc.{name}": str(row.result[name]) for name in ("protocol", "absent_classes") if name in row.result}
        for split, one in row.result.get("skipped", {}).items():
            tags[f"ppc.skipped.{metric_name(split)}"] = f"{len(one['ids'])} of {one['listed']} images"
        bad = sorted(name for name, value in row.result["metrics"].items() if not is_number(value))
        if bad:
            tags["ppc.not_finite"] = ", ".join(bad)
    return tags


def trial_params(row: TrialRow) -> dict[str, str]:
    """The study's factors and the seed: the image grid of the UI prints all of them in each header."""
    factors = {name: v if isinstance(v, str) else json.dumps(v) for name, v in row.factors.items()}
    return {**{metric_name(name): value for name, value in factors.items()}, "seed": str(row.seed)}


def config_yaml(config: dict[str, Any]) -> str:
    """A config as YAML that `ppc run` takes."""
    text = StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump(config, text)
    return text.getvalue()


def new_points(path: StoragePath, mark: Sequence[int]) -> tuple[list[Point], list[int]]:
    """Points of a journal after a mark (byte offset, last step), and the mark after them.

    A journal that is shorter than the mark was written anew: its steps up to the last one were sent before, with
    numbers that the stage's key decides, so they are passed over.
    """
    offset, last_step = mark
    try:
        size = size_of(path)
        fresh = size is not None and size < offset
        points, end = read_journal(path, 0 if fresh else offset)
    except ValueError:  # in the middle of a line: written anew, and longer by now
        points, end = read_journal(path, 0)
    found = [
        Point(name, float(value), int(point["t"]), int(point["step"]))
        for point in points
        if point["step"] > last_step
        for name, value in point["m"].items()
    ]
    return found, [end, max([last_step, *(point["step"] for point in points)])]


def _score_points(result: dict[str, Any], t: int) -> list[Point]:
    points = [Point(f"final/{name}", value, t, 0) for name, value in result.get("metrics", {}).items()]
    for split, one in result.get("skipped", {}).items():
        points.append(Point(f"data/skipped_{split}", float(len(one["ids"])), t, 0))
    for split, curve in result.get("curves", {}).items():
        pairs = zip(curve["thresholds"], curve["miou"], strict=True)
        points += [Point(f"curve/miou_{split}", miou, t, round(threshold * 100)) for threshold, miou in pairs]
    return points


def stage_points(manifest: dict[str, Any]) -> list[Point]:
    """Points of a finished stage, under the names that they have in a trial's result."""
    t = int(manifest["finished_ms"])
    points = [*_score_points(manifest["result"], t), Point(f"cost/{manifest['stage']}_s", manifest["wall_s"], t, 0)]
    return [point for point in points if is_number(point.value)]


def result_points(result: dict[str, Any], metric: str, marks: Mapping[str, Any]) -> list[Point]:
    """Points of a trial's result but for those of its stages that were sent: a mark `metrics/...` has their names.

    Their time is that of the result, so sending them twice changes nothing.
    """
    t = int(result["finished_ms"])
    sent = {name for what, names in marks.items() if what.startswith("metrics/") for name in names}
    points = [*_score_points(result, t), Point("cost/wall_s", result["wall_s"], t, 0)]
    points += [Point(f"cost/{stage['name']}_s", stage["wall_s"], t, 0) for stage in result.get("stages", [])]
    if "cost" in result:  # a result of an older version has none
        points.append(Point("cost/gpu_hours", result["cost"]["gpu_h"], t, 0))
        points.append(Point("cost/cpu_hours", result["cost"]["cpu_h"], t, 0))
    by_class = result.get("per_class_iou", {})
    if by_class:  # of the label map that decides, else of the last one
        name = metric.replace("_miou_", "_")
        chosen = by_class.get(name, list(by_class.values())[-1])
        points += [Point("profile/class_iou_by_id", iou, t, number) for number, iou in enumerate(chosen)]
    return [point for point in points if is_number(point.value) and point.name not in sent]


def class_table(result: dict[str, Any]) -> dict[str, Any] | None:
    """IoU per class and label map, in the form that MLflow shows as a table."""
    by_class = result.get("per_class_iou")
    if not by_class:
        return None
    names = result.get("class_names") or [str(i) for i in range(len(next(iter(by_class.values()))))]
    rows = [[name, *(values[i] for values in by_class.values())] for i, name in enumerate(names)]
    return {"columns": ["class", *by_class], "data": rows}


def axis_curves(study: dict[str, Any], rows: Sequence[TrialRow], final: bool) -> Iterator[tuple[str, list[Point]]]:
    """(variant, its points): the mean over seeds of each metric, step = the variant's value on the study's only axis.

    Nothing where the study has not exactly one numeric factor. A variant comes when its last trial has a result, since
    a mean that is sent cannot be taken back; at the end, all come that have any. Values that are not whole numbers
    give their place on the axis, which a search knows at its end alone.
    """
    if "search" in study and not final:
        return
    factors = study["factors"]
    values = {row.variant: row.factors.get(factors[0]) for row in rows} if len(factors) == 1 else {}
    if not values or not all(is_number(value) for value in values.values()):
        return
    order = sorted({float(str(value)) for value in values.values()})
    whole = all(value.is_integer() for value in order)
    for variant, value in values.items():
        mine = [row for row in rows if row.variant == variant]
        results = [row.result for row in mine if row.result is not None]
        if not results or not (final or len(results) == len(mine)):
            continue
        place = float(str(value))
        step = int(place) if whole else order.index(place)
        t = max(int(result["finished_ms"]) for result in results)
        found: dict[str, list[float]] = {}
        for result in results:
            for name, number in result["metrics"].items():
                if is_number(number):
                    found.setdefault(name, []).append(number)
        yield variant, [Point(f"curve/{name}", fmean(numbers), t, step) for name, numbers in found.items()]
