"""A study's table, from its files alone: mean and deviation over seeds, difference to the baseline, what is missing.

IoU is in [0, 1] in every file of this project; here alone it is printed in per cent.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppc.artifacts import Storage, now_ms, write_json
from ppc.changes import told
from ppc.ledger import FINISHED, RUNNING, STOPPED, TrialRow, counts, read_rows, stopped_at
from ppc.places import StoragePath, atomic_write
from ppc.published import (
    NONE,
    Claim,
    OtherMethod,
    caveat,
    claim_cell,
    claims,
    csv_cells,
    csv_columns,
    csv_rows,
    images_of,
    is_iou,
    metric_split,
    other_methods,
    others_table,
    published_metrics,
    sources,
)
from ppc.study import Row, summarise

ABSENT = {"zero": "a class in neither masks nor seeds counts as IoU 0", "skip": "such a class is left out of the mean"}


@dataclass(frozen=True)
class Line:
    """A variant's line of the table. Statistics of the deciding metric in its own unit; times in seconds."""

    variant: str
    factors: dict[str, Any]
    seeds: list[int]  # with a result
    values: dict[str, dict[int, float]]  # metric -> seed -> value
    n: int
    mean: float | None
    std: float | None  # sample deviation
    pairs: int  # seeds that the baseline has too
    diff_mean: float | None
    diff_std: float | None
    bg_score: float | None
    trial_s: float | None
    others: dict[str, tuple[float | None, float | None]]  # mean and deviation of the other IoU metrics
    states: dict[str, int]
    baseline: bool
    best: bool
    reused: int  # trials that another study had finished
    stopped: dict[int, str]  # seed -> epoch and value at which it was stopped early
    same_as: list[str]  # variants whose very trials these are: no evidence of their own
    count: int | None  # images of the metric's split
    protocol: str  # that chose the background score
    published: dict[str, Claim] = field(default_factory=dict)  # metric -> figure of a paper

    def means(self, metric: str) -> dict[str, float | None]:
        """Means of all its metrics; `metric` is the one that decides."""
        return {metric: self.mean, **{name: mean for name, (mean, _) in self.others.items()}}


@dataclass(frozen=True)
class Report:
    """A study's table and all that a reader must know to judge it."""

    study: str
    note: str
    metric: str
    generated: bool  # the data, in part or whole
    header: list[tuple[str, str]]
    lines: list[Line]
    errors: list[tuple[str, str]]  # trial, its error
    made_ms: int
    shown: list[str]  # metrics of the table, in order; the one that decides is among them
    published: list[str]  # metrics that have published figures
    other_methods: list[OtherMethod]


def generated(study: dict[str, Any]) -> bool:
    """Whether a study (its `study.json`) is, in part or whole, on generated data."""
    return any(data.get("generated") for data in study["data"])


def build_report(storage: Storage, study_name: str) -> Report:
    """The report of a study as its files say now; ValueError when there is no such study."""
    study = storage.study(study_name).definition()
    rows = read_rows(storage, study)
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
    best = max((s.mean for s in decides if s.mean is not None), default=None)
    lines = []
    for index, row_statistics in enumerate(decides):
        mine = [row for row in rows if row.variant == row_statistics.variant]
        others = {name: (found[index].mean, found[index].std) for name, found in statistics.items()}
        found_values = values[row_statistics.variant]
        line = _line(row_statistics, mine, found_values, others, study["baseline"], best, metric_split(metric))
        told = claims(study, line.variant, line.means(metric), images_of(mine))
        lines.append(replace(line, published=told))
    errors = [(row.label, one_line(row.error)) for row in rows if row.error is not None]
    header = _header(study, rows)
    return Report(
        study_name, study.get("note", ""), metric, generated(study), header, lines, errors, now_ms(), shown,
        published_metrics(study), other_methods(study),
    )  # fmt: skip


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
        protocol=_distinct(row.config.get("seeds", {}).get("protocol", "?") for row in rows),
    )  # fmt: skip


def skipped_lines(rows: Sequence[TrialRow]) -> list[str]:
    """What data.on_broken skip left out, a line for each split and number: `train: 20 of 5,000 images skipped`."""
    found = [(row.result or {}).get("skipped", {}) for row in rows]
    lines = [
        f"{split}: {len(one['ids']):,} of {one['listed']:,} images skipped (broken: data.on_broken)"
        for skipped in found
        for split, one in skipped.items()
    ]
    return list(dict.fromkeys(lines))


def segmentation_lines(rows: Sequence[TrialRow]) -> list[str]:
    """What trained the segmentation nets, where they began, and the CRF behind them; a line for each of a kind."""
    found = [seg for row in rows if (seg := (row.result or {}).get("segmentation")) is not None]
    lines = [
        f"trained on {'masks of the dataset (upper bound)' if seg['masks'] == 'truth' else seg['masks']}, initialised "
        f"from {seg['initialisation']}" + (f", CRF {seg['crf'] or 'none'} at test" if "crf" in seg else "")
        for seg in found
    ]
    return list(dict.fromkeys(lines))


def _header(study: dict[str, Any], rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    results = [row.result for row in rows if row.result is not None]
    metric, split = study["metric"], metric_split(study["metric"])
    unit = "in per cent, " if is_iou(metric) else ""
    header = [("metric", f"{metric}, {unit}mean ± sample deviation over seeds")]
    if split is not None:
        counted = [result["counts"][split] for result in results if split in result.get("counts", {})]
        images = _distinct(f"{n} images" for n in counted)
        header.append(("split", f"{split}: {images or 'no trial has counted its images yet'}"))
    header += [("skipped", line) for line in skipped_lines(rows)]
    header += [("segmentation", line) for line in segmentation_lines(rows)]
    header.append(("background score", _distinct(_protocol(row, split) for row in rows)))
    rules = _distinct(result["absent_classes"] for result in results if "absent_classes" in result)
    header.append(
        ("absent classes", "; ".join(f"{r}: {ABSENT.get(r, r)}" for r in rules.split("; ")) if rules else NONE)
    )
    for data in study["data"]:
        word = " (generated data)" if data.get("generated") else ""
        header.append(("data", f"{data['name']}{word}, fingerprint {data['fingerprint']}"))
    code = study.get("code") or {}
    commit = f"commit {code['commit']}" if code.get("commit") else "no commit known"
    changed = " with uncommitted changes" if code.get("dirty") else ""
    header.append(("code", f"version {code.get('version', '?')}, {commit}{changed}"))
    header += [("changed", line) for line in told(study)]
    if (text := caveat(study, images_of(rows))) is not None:
        header.append(("published", text))
    header.append(("seeds", ", ".join(str(seed) for seed in study["trial_seeds"])))
    header.append(("trials", _states(counts(list(rows)))))
    return header


def _distinct(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts))


def _protocol(row: TrialRow, split: str | None) -> str:
    """How the background score of a trial was chosen, in words that cannot be taken for a fair choice if it is none."""
    seeds = row.config.get("seeds", {})
    protocol = (row.result or seeds).get("protocol", "?")
    if protocol == "fixed":
        return f"fixed at {seeds.get('bg_score')}"
    if protocol == "best_on_train":
        judge = row.config.get("data", {}).get("train_split", "train")
        same = ", the very masks that the metric is measured on" if judge == split else ""
        return f"best_on_train: the best one for the masks of {judge}{same}"
    if protocol == "val_subset":
        images, drawn = seeds.get("val_subset_images"), seeds.get("val_subset_split")
        return f"val_subset: the best one for the masks of {images} images drawn from {drawn}"
    return str(protocol)


def _states(states: dict[str, int]) -> str:
    return ", ".join(f"{n} {state.lower()}" for state, n in states.items()) or "none"


def one_line(error: dict[str, Any]) -> str:
    """The first line of a trial's error, with its type and stage."""
    first = (str(error.get("message", "")).splitlines() or [""])[0][:200]
    stage = f" in {error['stage']}" if error.get("stage") else ""
    return f"{error.get('type', 'Error')}{stage}: {first}"


# -- in words


def number(value: float | None, metric: str, *, sign: bool = False) -> str:
    """A metric's value to read: IoU in per cent."""
    if value is None:
        return NONE
    scaled, digits = (value * 100, 2) if is_iou(metric) else (value, 4)
    return f"{scaled:+.{digits}f}" if sign else f"{scaled:.{digits}f}"


def _spread(mean: float | None, std: float | None, metric: str, *, sign: bool = False) -> str:
    if mean is None:
        return NONE
    text = number(mean, metric, sign=sign)
    return text if std is None else f"{text} ± {number(std, metric)}"


def duration(seconds: float | None) -> str:
    """Seconds as `42 s`, `3.5 min` or `2.1 h`."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def columns(report: Report) -> list[str]:
    """Headings of the table."""
    heads = ["variant"]
    for metric in report.shown:
        heads += [metric, *([f"published {metric}"] if metric in report.published else [])]
        heads += ["n", "vs baseline"] if metric == report.metric else []
    return [*heads, "bg score", "time/trial", "trials"]


def cells(line: Line, report: Report) -> list[str]:
    """A line as text, one cell for each of `columns`."""
    metric = report.metric
    if line.baseline:
        difference = "baseline"
    elif line.diff_mean is None:
        difference = NONE
    else:
        difference = f"{_spread(line.diff_mean, line.diff_std, metric, sign=True)} ({line.pairs} paired)"
    trials = _states(line.states) + (f"; {line.reused} reused" if line.reused else "")
    trials += "".join(f"; seed {seed} stopped at {text}" for seed, text in line.stopped.items())
    trials += f"; same trial as {', '.join(line.same_as)}" if line.same_as else ""
    score = NONE if line.bg_score is None else f"{line.bg_score:.2f}"
    n = f"{line.n} of {sum(line.states.values())}" if line.stopped else str(line.n)
    figures = []
    for name in report.shown:
        mean, std = (line.mean, line.std) if name == metric else line.others.get(name, (None, None))
        figures.append(_spread(mean, std, name))
        figures += [claim_cell(line.published.get(name))] if name in report.published else []
        figures += [n, difference] if name == metric else []
    return [line.variant, *figures, score, duration(line.trial_s), trials]


def markdown(report: Report) -> str:
    """The report as Markdown; the best mean is bold."""
    parts = [f"# Study {report.study}", ""]
    parts += [report.note, ""] if report.note else []
    parts += [f"- {name}: {text}" for name, text in report.header]
    heads = columns(report)
    parts += ["", *_markdown_row(heads), f"|{'|'.join(['---'] * len(heads))}|"]
    for line in report.lines:
        row = cells(line, report)
        place = heads.index(report.metric)
        row[place] = f"**{row[place]}**" if line.best else row[place]
        parts += _markdown_row(row)
    if others := others_table(report.other_methods, report.published):
        parts += ["", *_markdown_row(others[0]), f"|{'|'.join(['---'] * len(others[0]))}|"]
        parts += [text for row in others[1:] for text in _markdown_row(row)]
    parts += ["", *_remarks(report)]
    parts += [f"- {text}" for text in _sources(report)]
    parts += [f"- {label}: {text}" for label, text in report.errors]
    return "\n".join(parts).rstrip() + "\n"


def _markdown_row(row: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"]


def _sources(report: Report) -> list[str]:
    return sources([(line.variant, line.published) for line in report.lines])


def _remarks(report: Report) -> list[str]:
    remarks = []
    if any(line.n == 1 for line in report.lines):
        remarks.append("A figure without ± comes from one seed and says nothing of the noise.")
    total = Counter[str]()
    for line in report.lines:
        total.update(line.states)
    at_work = total.pop(RUNNING, 0)
    missing = total.total() - total[FINISHED] - total[STOPPED]
    if at_work:
        remarks.append(f"{at_work} trial(s) are at work and in no figure yet.")
    if total[STOPPED]:
        remarks.append(
            f"{total[STOPPED]} trial(s) were stopped early and are in no figure, so the means of their variants are of "
            f"the seeds that trained better; run them to the end: ppc study resume {report.study} --stopped"
        )
    if missing:
        remarks.append(f"{missing} trial(s) have no result and are in no figure: ppc study resume {report.study}")
    return [text for remark in remarks for text in (remark, "")]


def as_csv(report: Report) -> str:
    """One line a variant, numbers as they are in the data (IoU in [0, 1]); an empty cell is a missing value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    factors = list(dict.fromkeys(name for line in report.lines for name in line.factors))
    states = list(dict.fromkeys(state for line in report.lines for state in line.states))
    names = ("mean", "std", "n", "diff_mean", "diff_std", "pairs", "bg_score", "trial_s", "baseline", "best")
    data = ("split", "count", "protocol", "generated", "same_as")
    heads = ["variant", *factors, "metric", *data, *names, *(state.lower() for state in states)]
    writer.writerow([*heads, *csv_columns(report.published)])
    for line in report.lines:
        known = [line.factors.get(name) for name in factors]
        numbers = [getattr(line, name) for name in names]
        trials = [line.states.get(state, 0) for state in states]
        split, same = metric_split(report.metric), "; ".join(line.same_as)
        told = [split, line.count, line.protocol, report.generated, same]
        more = csv_cells(report.published, line.means(report.metric), line.published)
        writer.writerow([line.variant, *known, report.metric, *told, *numbers, *trials, *more])
    writer.writerows(csv_rows(report.published, report.other_methods, len(heads) - 1))
    return text.getvalue()


def write_report(report: Report, folder: StoragePath) -> list[StoragePath]:
    """Write report.md, report.csv and report.json; their paths in this order."""
    paths = [folder / f"report.{ending}" for ending in ("md", "csv", "json")]
    for path, text in zip(paths, (markdown(report), as_csv(report)), strict=False):
        with atomic_write(path, "w") as handle:
            handle.write(text)
    write_json(paths[2], asdict(report))
    return paths


def print_report(report: Report, console: Console) -> None:
    """Print the report: a table on a terminal, plain lines elsewhere (nothing is cut to a width)."""
    for name, text in report.header:
        console.print(f"{name}: {text}", highlight=False, markup=False, soft_wrap=True)
    table_cells = [cells(line, report) for line in report.lines]
    if console.is_terminal:
        table = Table(title=Text(f"study {report.study}"), title_justify="left")
        for column in columns(report):
            table.add_column(
                Text(column), justify="left" if column in ("variant", "trials") else "right", overflow="fold"
            )
        for line, row in zip(report.lines, table_cells, strict=True):
            table.add_row(*map(Text, row), style="bold" if line.best else None)
        console.print(table)
    else:
        for line, row in zip(report.lines, table_cells, strict=True):
            row[columns(report).index(report.metric)] += " *" if line.best else ""
        for text in align([columns(report), *table_cells]):
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        console.print("* the best mean", highlight=False, markup=False)
    others = others_table(report.other_methods, report.published)
    for text in [*(align(others) if others else []), *_sources(report), *filter(None, _remarks(report))]:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for label, text in report.errors:
        console.print(f"{label}: {text}", highlight=False, markup=False, soft_wrap=True)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines with straight columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
