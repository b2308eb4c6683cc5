"""The report as one HTML file that needs no other and no network: table, curves, CAMs, classes, confusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ppc.artifacts import Storage
from ppc.html_charts import (
    BOTTOM_PX,
    HEIGHT_PX,
    LEFT_PX,
    RIGHT_PX,
    TOP_PX,
    WIDTH_PX,
    axis_chart,
    loss_charts,
    score_charts,
)
from ppc.html_pictures import cam_pictures
from ppc.latex import latex
from ppc.ledger import TrialRow, read_rows, stopped_at
from ppc.published import others_table
from ppc.redact import without_secrets
from ppc.report_table import Report, cells, columns, number, remarks, source_lines

MOST_CLASSES = 40  # of a confusion matrix


@dataclass(frozen=True)
class Matrix:
    """A table of shares in [0, 1], None where there is none; the page colours its cells."""

    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    note: str = ""


def page(report: Report, storage: Storage) -> str:
    """The report of a study as HTML; a page that cannot be made says why: it keeps no launch from its end."""
    try:
        return build_page(report, storage)
    except Exception as error:
        text = without_secrets(f"{type(error).__name__}: {error}")
        return f"<!doctype html><meta charset=utf-8><title>Study {escape(report.study)}</title><p>{escape(text)}</p>\n"


def build_page(report: Report, storage: Storage) -> str:
    """The report of a study as HTML."""
    rows = read_rows(storage, storage.study(report.study).definition())
    pictures, problems = cam_pictures(report, storage, rows)
    charts = [chart for chart in [axis_chart(report)] if chart is not None] + score_charts(report, rows)
    heads, best = columns(report), next((line for line in report.lines if line.best), None)
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [cam.title for cam in pictures[0].cams] if pictures else []
    text = environment.get_template("report.html.jinja").render(
        report=report,
        heads=heads,
        place=heads.index(report.metric),
        table=[(line, cells(line, report)) for line in report.lines],
        others=others_table(report.other_methods, report.published),
        remarks=remarks(report),
        sources=source_lines(report),
        latex=latex(report),
        trials=trial_matrix(report, rows),
        charts=charts,
        losses=loss_charts(report, storage, rows),
        box={
            "width": WIDTH_PX, "height": HEIGHT_PX, "left": LEFT_PX, "right": WIDTH_PX - RIGHT_PX, "top": TOP_PX,
            "bottom": HEIGHT_PX - BOTTOM_PX,
        },
        pictures=pictures,
        shown=shown,
        first=next((i for i, title in enumerate(shown) if best and title.split(" s=")[0] == best.variant), 0),
        matrices=[matrix for matrix in [class_matrix(report, rows), *confusions(report, rows)] if matrix is not None],
        problems=problems,
    )  # fmt: skip
    return text.lstrip() + "\n"


def trial_matrix(report: Report, rows: Sequence[TrialRow]) -> tuple[list[int], list[tuple[str, list[tuple[str, str]]]]]:
    """Seeds, and for each variant the (state, text) of its trial of each seed: its figure, or why there is none."""
    seeds = sorted({row.seed for row in rows})
    found = {(row.variant, row.seed): row for row in rows}

    def cell(row: TrialRow | None) -> tuple[str, str]:
        if row is None:
            return "NONE", ""
        text = number(row.metric(report.metric), report.metric) if row.result is not None else row.state.lower()
        text += f": {stopped_at(row)}" if row.stopped is not None else ""
        return row.state, text + (" (reused)" if row.reused else "")

    return seeds, [(line.variant, [cell(found.get((line.variant, seed))) for seed in seeds]) for line in report.lines]


# -- classes


def _label_map(report: Report, result: dict[str, Any], what: str) -> str | None:
    """Which label map of a result is shown: the one that decides, else the last."""
    found = list(result.get(what) or {})
    decides = report.metric.replace("_miou_", "_")
    return decides if decides in found else (found[-1] if found else None)


def class_matrix(report: Report, rows: Sequence[TrialRow]) -> Matrix | None:
    """IoU of each class (rows) and variant (columns), means over seeds."""
    results = [(row.variant, row.result) for row in rows if row.result is not None and row.result.get("per_class_iou")]
    if not results:
        return None
    name = _label_map(report, results[0][1], "per_class_iou")
    names = results[0][1].get("class_names") or []
    variants = [line.variant for line in report.lines if any(variant == line.variant for variant, _ in results)]
    table = []
    for index in range(len(results[0][1]["per_class_iou"][name])):
        line = list[float | None]()
        for variant in variants:
            mine = [result["per_class_iou"].get(name, []) for v, result in results if v == variant]
            found = [ious[index] for ious in mine if index < len(ious) and ious[index] is not None]
            line.append(fmean(found) if found else None)
        table.append((names[index] if index < len(names) else str(index), line))
    return Matrix(f"IoU of each class: {name}", "class", variants, table, "In per cent, means over seeds.")


def confusions(report: Report, rows: Sequence[TrialRow]) -> list[Matrix]:
    """Where the pixels of each class go, of the baseline and of the best variant, all seeds together."""
    found = []
    for line in sorted((line for line in report.lines if line.baseline or line.best), key=lambda line: line.best):
        results = [row.result for row in rows if row.variant == line.variant and row.result is not None]
        results = [result for result in results if result.get("confusion")]
        name = _label_map(report, results[0], "confusion") if results else None
        if name is None:
            continue
        counted = [np.asarray(result["confusion"][name], np.int64) for result in results if name in result["confusion"]]
        conf = np.sum(counted, axis=0)
        found.append(_confusion(f"Confusions of {line.variant}: {name}", conf, results[0].get("class_names") or []))
    return found


def _confusion(title: str, conf_CC: npt.NDArray[np.int64], names: Sequence[str]) -> Matrix:
    pixels = conf_CC.sum(1)
    kept = sorted(np.argsort(-pixels, kind="stable")[:MOST_CLASSES].tolist())
    words = [names[i] if i < len(names) else str(i) for i in kept]
    rows = [
        (word, [float(conf_CC[i, j] / pixels[i]) if pixels[i] else None for j in kept])
        for i, word in zip(kept, words, strict=True)
    ]
    note = "A row is a true class: where its pixels went, in per cent."
    if len(kept) < len(conf_CC):
        note += f" The {len(kept)} classes with the most pixels of {len(conf_CC)}."
    return Matrix(title, "truth \\ label", words, rows, note)
