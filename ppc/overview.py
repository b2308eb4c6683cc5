"""All studies of a storage: how each stands, and what it has cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ppc.artifacts import Storage
from ppc.costs import trial_cost
from ppc.ledger import counts, read_rows
from ppc.published import is_iou
from ppc.report import align, number

COLUMNS = ("study", "trials", "GPU h", "CPU h", "launched", "last activity", "best so far")


@dataclass(frozen=True)
class Overview:
    """One study. Hours are those of all attempts of its own trials; what it reuses was paid for by another."""

    study: str
    states: dict[str, int]
    gpu_h: float
    cpu_h: float
    launched_ms: int
    active_ms: int | None
    metric: str
    best: tuple[str, float] | None  # variant and the mean of its metric over the seeds that have it


def overviews(storage: Storage) -> tuple[list[Overview], list[str]]:
    """Every study of the storage, the one launched last first; and what is wrong with those that cannot be read."""
    found, problems = list[Overview](), list[str]()
    for name in storage.study_names():
        try:
            found.append(_overview(storage, storage.study(name).definition()))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return sorted(found, key=lambda one: -one.launched_ms), problems


def _overview(storage: Storage, study: dict[str, Any]) -> Overview:
    rows = read_rows(storage, study)
    unique = {row.key: row for row in rows}.values()
    costs = [trial_cost(storage, row) for row in unique if not row.reused]
    means: dict[str, float] = {}
    for variant in dict.fromkeys(row.variant for row in rows):
        values = [
            value for row in rows if row.variant == variant and (value := row.metric(study["metric"])) is not None
        ]
        if values:
            means[variant] = fmean(values)
    active = [t for row in rows for t in (row.started_ms, row.ended_ms) if t is not None]
    best = max(means, key=lambda variant: means[variant], default=None) if is_iou(study["metric"]) else None
    return Overview(
        study["name"], counts(rows), sum(gpu for _, gpu in costs), sum(cpu for cpu, _ in costs), study["created_ms"],
        max(active, default=None), study["metric"], None if best is None else (best, means[best]),
    )  # fmt: skip


def as_data(found: Sequence[Overview]) -> list[dict[str, Any]]:
    """The overviews as plain data, for --json."""
    return [
        {
            "study": one.study, "trials": one.states, "gpu_hours": one.gpu_h, "cpu_hours": one.cpu_h,
            "launched_ms": one.launched_ms, "active_ms": one.active_ms, "metric": one.metric,
            "best_variant": one.best and one.best[0], "best_mean": one.best and one.best[1],
        }
        for one in found
    ]  # fmt: skip


def overview_lines(found: Sequence[Overview]) -> list[str]:
    """The overviews as lines with straight columns, headings first."""
    return align([list(COLUMNS), *map(_cells, found)])


def _cells(one: Overview) -> list[str]:
    states = ", ".join(f"{n} {state.lower()}" for state, n in one.states.items())
    best = "" if one.best is None else f"{one.best[0]}: {one.metric} {number(one.best[1], one.metric)}"
    return [
        one.study,
        states,
        f"{one.gpu_h:.2f}",
        f"{one.cpu_h:.2f}",
        _when(one.launched_ms),
        _when(one.active_ms),
        best,
    ]


def _when(time_ms: int | None) -> str:
    return "" if time_ms is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(time_ms / 1000))
