"""A study's table, from its files alone: mean and deviation over seeds, difference to the baseline, what is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

from ppc.artifacts import Storage, now_ms, write_json
from ppc.html_report import page
from ppc.latex import latex
from ppc.ledger import FINISHED, TrialRow, counts, read_rows, stopped_at
from ppc.places import StoragePath, atomic_write
from ppc.published import claims, images_of, is_iou, metric_split, other_methods, published_metrics
from ppc.report_header import distinct, generated, header, segmentation_lines, skipped_lines
from ppc.report_table import Line, Report, align, cells, columns, duration, number, one_line, verdict
from ppc.report_text import as_csv, markdown, print_report
from ppc.significance import against_baseline
from ppc.study import Row, summarise

__all__ = [
    "Line", "Report", "align", "as_csv", "build_report", "cells", "columns", "duration", "generated", "latex",
    "live_note", "markdown", "number", "one_line", "page_note", "print_report", "report_of", "segmentation_lines",
    "skipped_lines", "write_report",
]  # fmt: skip


def build_report(storage: Storage, study_name: str) -> Report:
    """The report of a study as its files say now; ValueError when there is no such study."""
    study = storage.study(study_name).definition()
    return report_of(storage, study, read_rows(storage, study))


def page_note(report: Report) -> str:
    """The report as the note of the study's page, which shows the first line alone until it is opened: the answer."""
    states = Counter[str]()
    for line in report.lines:
        states.update(line.states)
    done, total = states[FINISHED], states.total()
    answer = " ".join(verdict(report)) or "No trial has a result yet."
    return (answer if done == total else f"{done} of {total} trials finished. {answer}") + "\n\n" + markdown(report)


def live_note(storage: Storage, study: dict[str, Any]) -> Callable[[Sequence[TrialRow]], str]:
    """What makes of the rows the note of the study's page; it is made anew when a trial's state has changed."""
    last: list[Any] = [None, ""]

    def note(rows: Sequence[TrialRow]) -> str:
        now = [(row.key, row.state, row.attempt) for row in rows]
        if now != last[0]:
            last[:] = [now, page_note(report_of(storage, study, rows))]
        return str(last[1])

    return note


def report_of(storage: Storage, study: dict[str, Any], rows: Sequence[TrialRow]) -> Report:
    """The report of a study as these rows say."""
    metric = study["metric"]
    values: dict[str, dict[str, dict[int, float]]] = {row.variant: {} for row in rows}
    for row in rows:
        for name, value in (row.result or {"metrics": {}})["metrics"].items():
            if math.isfinite(value):
                values[row.variant].setdefault(name, {})[row.seed] = value
    names = dict.fromkeys(name for found in values.values() for name in found)
    chosen = study.get("columns") or []
    shown = [*([] if metric in chosen else [metric]), *(chosen or (name for name in names if is_iou(name)))]
    shown = list(dict.fromkeys(shown))
    statistics = {
        name: summarise({variant: found.get(name, {}) for variant, found in values.items()}, study["baseline"])
        for name in dict.fromkeys([metric, *shown, *filter(is_iou, names)])
    }
    decides = statistics.pop(metric)
    means = [s.mean for s in decides if s.mean is not None]
    best = max(means, default=None) if is_iou(metric) else None  # `ppc run` takes any metric where there are no masks
    tests = against_baseline(
        {variant: found.get(metric, {}) for variant, found in values.items()}, study["baseline"], _twins(rows)
    )
    lines = []
    for index, row_statistics in enumerate(decides):
        mine = [row for row in rows if row.variant == row_statistics.variant]
        others = {name: (found[index].mean, found[index].std) for name, found in statistics.items()}
        found_values = values[row_statistics.variant]
        line = _line(row_statistics, mine, found_values, others, study["baseline"], best, metric_split(metric))
        told = claims(study, line.variant, line.means(metric), images_of(mine))
        lines.append(replace(line, published=told, test=tests.get(line.variant)))
    errors = [(row.label, one_line(row.error)) for row in rows if row.error is not None]
    facts = header(storage, study, rows)
    return Report(
        study["name"], study.get("note", ""), metric, generated(study), facts, lines, errors, now_ms(), shown,
        published_metrics(study), other_methods(study),
    )  # fmt: skip


def _twins(rows: Sequence[TrialRow]) -> dict[str, str]:
    """Variants all of whose trials are those of others, with the first of these."""
    found = dict[str, list[str | None]]()
    for row in rows:
        found.setdefault(row.variant, []).append(row.same_as)
    return {variant: others[0] for variant, others in found.items() if others[0] is not None and None not in others}


def _line(
    s: Row,
    rows: Sequence[TrialRow],
    values: dict[str, dict[int, float]],
    others: dict[str, tuple[float | None, float | None]],
    baseline: str,
    best: float | None,
    split: str | None,
) -> Line:
    images = [row.result.get("counts", {}).get(split) for row in rows if row.result is not None]
    scores = list(values.get("bg_score", {}).values())
    times = [row.result["wall_s"] for row in rows if row.result is not None]
    return Line(
        variant=s.variant, factors=rows[0].factors, seeds=sorted(row.seed for row in rows if row.result is not None),
        values=values, n=s.n, mean=s.mean, std=s.std, pairs=s.pairs, diff_mean=s.diff_mean, diff_std=s.diff_std,
        bg_score=fmean(scores) if scores else None, trial_s=fmean(times) if times else None, others=others,
        states=counts(list(rows)), baseline=s.variant == baseline, best=best is not None and s.mean == best,
        reused=sum(row.reused for row in rows),
        stopped={row.seed: stopped_at(row) for row in rows if row.stopped is not None},
        same_as=list(dict.fromkeys(row.same_as for row in rows if row.same_as is not None)),
        count=next((n for n in images if n is not None), None),
        protocol=distinct(row.config.get("seeds", {}).get("protocol", "?") for row in rows),
        images=distinct(str(n) for n in images if n is not None),
    )  # fmt: skip


def write_report(report: Report, folder: StoragePath, storage: Storage) -> list[StoragePath]:
    """Write report.md, report.csv, report.json, report.tex and report.html; their paths in this order.

    The page shows files of the storage beside the report.
    """
    paths = [folder / f"report.{ending}" for ending in ("md", "csv", "json", "tex", "html")]
    texts = (markdown(report), as_csv(report), None, latex(report), page(report, storage))
    for path, text in zip(paths, texts, strict=True):
        if text is None:
            write_json(path, asdict(report))
            continue
        with atomic_write(path, "w") as handle:
            handle.write(text)
    return paths
