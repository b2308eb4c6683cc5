"""A study's table, from its files alone: mean and deviation over seeds, difference to the baseline, what is missing.

IoU is in [0, 1] in every file of this project; here alone it is printed in per cent.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppc.artifacts import Storage, atomic_write, now_ms, write_json
from ppc.ledger import FAILED, FINISHED, INTERRUPTED, KILLED, RUNNING, TrialRow, counts, read_rows
from ppc.study import Row, summarise

NONE = "-"
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


@dataclass(frozen=True)
class Report:
    """A study's table and all that a reader must know to judge it."""

    study: str
    note: str
    metric: str
    header: list[tuple[str, str]]
    lines: list[Line]
    errors: list[tuple[str, str]]  # trial, its error
    made_ms: int


def is_iou(metric: str) -> bool:
    """Whether a metric is an IoU, hence printed in per cent."""
    return "iou" in metric.lower()


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
    statistics = {
        name: summarise({variant: found.get(name, {}) for variant, found in values.items()}, study["baseline"])
        for name in [metric, *(name for name in names if is_iou(name) and name != metric)]
    }
    decides = statistics.pop(metric)
    best = max((s.mean for s in decides if s.mean is not None), default=None)
    lines = []
    for index, row_statistics in enumerate(decides):
        mine = [row for row in rows if row.variant == row_statistics.variant]
        others = {name: (found[index].mean, found[index].std) for name, found in statistics.items()}
        lines.append(_line(row_statistics, mine, values[row_statistics.variant], others, study["baseline"], best))
    errors = [(row.label, one_line(row.error)) for row in rows if row.error is not None]
    return Report(study_name, study.get("note", ""), metric, _header(study, rows), lines, errors, now_ms())


def _line(
    s: Row,
    rows: Sequence[TrialRow],
    values: dict[str, dict[int, float]],
    others: dict[str, tuple[float | None, float | None]],
    baseline: str,
    best: float | None,
) -> Line:
    scores = list(values.get("bg_score", {}).values())
    times = [row.result["wall_s"] for row in rows if row.result is not None]
    return Line(
        variant=s.variant, factors=rows[0].factors, seeds=sorted(row.seed for row in rows if row.result is not None),
        values=values, n=s.n, mean=s.mean, std=s.std, pairs=s.pairs, diff_mean=s.diff_mean, diff_std=s.diff_std,
        bg_score=fmean(scores) if scores else None, trial_s=fmean(times) if times else None, others=others,
        states=counts(list(rows)), baseline=s.variant == baseline, best=best is not None and s.mean == best,
        reused=sum(row.reused for row in rows),
    )  # fmt: skip


def _header(study: dict[str, Any], rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    results = [row.result for row in rows if row.result is not None]
    metric = study["metric"]
    split = metric.rpartition("_")[2]
    unit = "in per cent, " if is_iou(metric) else ""
    header = [("metric", f"{metric}, {unit}mean ± sample deviation over seeds")]
    splits = _distinct(f"{name}: {n} images" for result in results for name, n in result.get("counts", {}).items())
    header.append(("split", splits or f"{split}: no trial has counted its images yet"))
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
    header.append(("seeds", ", ".join(str(seed) for seed in study["trial_seeds"])))
    header.append(("trials", _states(counts(list(rows)))))
    return header


def _distinct(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts))


def _protocol(row: TrialRow, split: str) -> str:
    """How the background score of a trial was chosen, in words that cannot be taken for a fair choice if it is none."""
    seeds = row.config.get("seeds", {})
    protocol = (row.result or seeds).get("protocol", "?")
    splits = seeds.get("splits") or ["train"]
    if protocol == "fixed":
        return f"fixed at {seeds.get('bg_score')}"
    if protocol == "best_on_train":
        same = ", the very masks that the metric is measured on" if splits[0] == split else ""
        return f"best_on_train: the best one for the masks of {splits[0]}{same}"
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


def _number(value: float | None, metric: str, *, sign: bool = False) -> str:
    if value is None:
        return NONE
    scaled, digits = (value * 100, 2) if is_iou(metric) else (value, 4)
    return f"{scaled:+.{digits}f}" if sign else f"{scaled:.{digits}f}"


def _spread(mean: float | None, std: float | None, metric: str, *, sign: bool = False) -> str:
    if mean is None:
        return NONE
    text = _number(mean, metric, sign=sign)
    return text if std is None else f"{text} ± {_number(std, metric)}"


def duration(seconds: float | None) -> str:
    """Seconds as `42 s`, `3.5 min` or `2.1 h`."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def columns(report: Report) -> list[str]:
    """Headings of the table."""
    others = list(report.lines[0].others) if report.lines else []
    return ["variant", report.metric, "n", "vs baseline", *others, "bg score", "time/trial", "trials"]


def cells(line: Line, metric: str) -> list[str]:
    """A line as text, one cell for each of `columns`."""
    if line.baseline:
        difference = "baseline"
    elif line.diff_mean is None:
        difference = NONE
    else:
        difference = f"{_spread(line.diff_mean, line.diff_std, metric, sign=True)} ({line.pairs} paired)"
    trials = _states(line.states) + (f"; {line.reused} reused" if line.reused else "")
    score = NONE if line.bg_score is None else f"{line.bg_score:.2f}"
    others = [_spread(mean, std, name) for name, (mean, std) in line.others.items()]
    figures = [_spread(line.mean, line.std, metric), str(line.n), difference, *others, score]
    return [line.variant, *figures, duration(line.trial_s), trials]


def markdown(report: Report) -> str:
    """The report as Markdown; the best mean is bold."""
    parts = [f"# Study {report.study}", ""]
    parts += [report.note, ""] if report.note else []
    parts += [f"- {name}: {text}" for name, text in report.header]
    heads = columns(report)
    parts += ["", f"| {' | '.join(heads)} |", f"|{'|'.join(['---'] * len(heads))}|"]
    for line in report.lines:
        row = [cell.replace("|", "\\|") for cell in cells(line, report.metric)]
        row[1] = f"**{row[1]}**" if line.best else row[1]
        parts.append(f"| {' | '.join(row)} |")
    parts += ["", *_remarks(report)]
    parts += [f"- {label}: {text}" for label, text in report.errors]
    return "\n".join(parts).rstrip() + "\n"


def _remarks(report: Report) -> list[str]:
    remarks = []
    if any(line.n == 1 for line in report.lines):
        remarks.append("A figure without ± comes from one seed and says nothing of the noise.")
    total = Counter[str]()
    for line in report.lines:
        total.update(line.states)
    at_work = total.pop(RUNNING, 0)
    missing = total.total() - total[FINISHED]
    if at_work:
        remarks.append(f"{at_work} trial(s) are at work and in no figure yet.")
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
    writer.writerow(["variant", *factors, "metric", *names, *(state.lower() for state in states)])
    for line in report.lines:
        known = [line.factors.get(name) for name in factors]
        numbers = [getattr(line, name) for name in names]
        trials = [line.states.get(state, 0) for state in states]
        writer.writerow([line.variant, *known, report.metric, *numbers, *trials])
    return text.getvalue()


def write_report(report: Report, folder: Path) -> list[Path]:
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
    table_cells = [cells(line, report.metric) for line in report.lines]
    if console.is_terminal:
        table = Table(title=f"study {report.study}", title_justify="left")
        for column in columns(report):
            table.add_column(column, justify="left" if column in ("variant", "trials") else "right", overflow="fold")
        for line, row in zip(report.lines, table_cells, strict=True):
            table.add_row(*map(Text, row), style="bold" if line.best else None)
        console.print(table)
    else:
        for line, row in zip(report.lines, table_cells, strict=True):
            row[1] += " *" if line.best else ""
        for text in align([columns(report), *table_cells]):
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        console.print("* the best mean", highlight=False)
    for remark in filter(None, _remarks(report)):
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    for label, text in report.errors:
        console.print(f"{label}: {text}", highlight=False, markup=False, soft_wrap=True)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines with straight columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# -- the state of each trial

STATUS_COLUMNS = ("trial", "state", "try", "stage", "progress", "left", "result", "error")
STYLES = {FINISHED: "green", FAILED: "red", KILLED: "red", INTERRUPTED: "yellow"}


def _status_cells(row: TrialRow) -> list[str]:
    progress, left = "", ""
    if row.progress:
        done, total = row.progress.get("done", 0), row.progress.get("total", 0)
        progress = f"{done}/{total} {row.progress.get('unit', '')}".rstrip()
        if row.progress.get("epochs"):
            progress += f", epoch {row.progress.get('epoch', 0)}/{row.progress['epochs']}"
        left = "" if row.progress.get("left_s") is None else duration(row.progress["left_s"])
    metrics = (row.result or {"metrics": {}})["metrics"]
    result = ", ".join(f"{name} {_number(value, name)}" for name, value in metrics.items() if is_iou(name))
    state = f"{row.state.lower()} (reused)" if row.reused else row.state.lower()
    stage = "" if row.state == FINISHED else row.stage or ""
    error = one_line(row.error) if row.error else ""
    return [row.label, state, str(row.attempt or ""), stage, progress, left, result, error]


def _used(rows: Sequence[TrialRow]) -> tuple[list[str], list[list[str]]]:
    """Columns in which some trial has something to say."""
    lines = [_status_cells(row) for row in rows]
    keep = [i for i in range(len(STATUS_COLUMNS)) if i < 2 or any(line[i] for line in lines)]
    return [STATUS_COLUMNS[i] for i in keep], [[line[i] for i in keep] for line in lines]


def status_table(rows: Sequence[TrialRow], title: str = "") -> Table:
    """Trials x what they do now, for a terminal."""
    heads, lines = _used(rows)
    table = Table(title=title or None, title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row, line in zip(rows, lines, strict=True):
        table.add_row(*map(Text, line), style=STYLES.get(row.state))  # Text: brackets in an error are no markup
    return table


def status_lines(rows: Sequence[TrialRow]) -> list[str]:
    """The same as plain lines for a log, headings first."""
    heads, lines = _used(rows)
    return align([heads, *lines])
