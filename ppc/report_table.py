"""The table of a study as data, and as the words and cells that every format of the report shares.

IoU is in [0, 1] in every file of this project; here alone it becomes per cent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ppc.ledger import FINISHED, RUNNING, STOPPED
from ppc.metrics import SILENT
from ppc.published import NONE, Claim, OtherMethod, claim_cell, is_iou, sources
from ppc.significance import PairedTest, rule

SILENT_SHARE = 0.05  # of a variant's maps, above which the report speaks of it


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
    images: str  # `count` of each of its trials, each number once
    published: dict[str, Claim] = field(default_factory=dict)  # metric -> figure of a paper
    test: PairedTest | None = None  # against the baseline, on the deciding metric; None for the baseline itself

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


def one_line(error: dict[str, Any]) -> str:
    """The first line of a trial's error, with its type and stage."""
    first = (str(error.get("message", "")).splitlines() or [""])[0][:200]
    stage = f" in {error['stage']}" if error.get("stage") else ""
    return f"{error.get('type', 'Error')}{stage}: {first}"


def number(value: float | None, metric: str, *, sign: bool = False) -> str:
    """A metric's value to read: IoU in per cent."""
    if value is None:
        return NONE
    scaled, digits = (value * 100, 2) if is_iou(metric) else (value, 4)
    return f"{scaled:+.{digits}f}" if sign else f"{scaled:.{digits}f}"


def spread(mean: float | None, std: float | None, metric: str, *, sign: bool = False) -> str:
    """Mean and deviation to read: `50.50 ± 0.71`."""
    if mean is None:
        return NONE
    text = number(mean, metric, sign=sign)
    return text if std is None else f"{text} ± {number(std, metric)}"


def figure(line: Line, report: Report, metric: str) -> tuple[float | None, float | None]:
    """Mean and deviation of any metric of a line."""
    return (line.mean, line.std) if metric == report.metric else line.others.get(metric, (None, None))


def tested(report: Report) -> bool:
    """Whether any variant has a p-value."""
    return any(line.test is not None and line.test.p_holm is not None for line in report.lines)


def p_text(line: Line) -> str:
    """The corrected p-value and its stars: `0.012 *`."""
    if line.test is None or line.test.p_holm is None:
        return NONE
    value = "< 0.0001" if line.test.p_holm < 1e-4 else f"{line.test.p_holm:.2g}"
    return f"{value} {line.test.stars}".rstrip()


def trials_text(line: Line) -> str:
    """What became of a variant's trials: finished, failed, reused, stopped early, shared with another variant."""
    text = states_text(line.states) + (f"; {line.reused} reused" if line.reused else "")
    text += "".join(f"; seed {seed} stopped at {told}" for seed, told in line.stopped.items())
    return text + (f"; same trial as {', '.join(line.same_as)}" if line.same_as else "")


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
        if metric == report.metric:
            heads += ["n", "vs baseline", *(["p (Holm)"] if tested(report) else [])]
    return [*heads, "bg score", "time/trial", "trials"]


def cells(line: Line, report: Report) -> list[str]:
    """A line as text, one cell for each of `columns`."""
    metric = report.metric
    if line.baseline:
        difference = "baseline"
    elif line.diff_mean is None:
        difference = NONE
    else:
        difference = f"{spread(line.diff_mean, line.diff_std, metric, sign=True)} ({line.pairs} paired)"
    score = NONE if line.bg_score is None else f"{line.bg_score:.2f}"
    n = f"{line.n} of {sum(line.states.values())}" if line.stopped else str(line.n)
    figures = []
    for name in report.shown:
        figures.append(spread(*figure(line, report, name), name))
        figures += [claim_cell(line.published.get(name))] if name in report.published else []
        if name == metric:
            figures += [n, difference, *([p_text(line)] if tested(report) else [])]
    return [line.variant, *figures, score, duration(line.trial_s), trials_text(line)]


def states_text(states: dict[str, int]) -> str:
    """`2 finished, 1 failed`."""
    return ", ".join(f"{n} {state.lower()}" for state, n in states.items()) or "none"


def source_lines(report: Report) -> list[str]:
    """Where the published figures beside the variants are from."""
    return sources([(line.variant, line.published) for line in report.lines])


def verdict(report: Report) -> list[str]:
    """Which variant is best, and whether the table can tell that from noise; nothing without results."""
    best = next((line for line in report.lines if line.best), None)
    if best is None:
        return []
    figures = spread(best.mean, best.std, report.metric)
    if best.baseline:
        return [f"The best mean is the baseline's, {best.variant}: {figures}.{_beaten(report)}"]
    said = f"The best mean is that of {best.variant}: {figures}"
    if best.diff_mean is not None:
        difference = spread(best.diff_mean, best.diff_std, report.metric, sign=True)
        if best.diff_mean < 0:  # its seeds are others than those of the baseline
            return [f"{said}, but of other seeds than the baseline's: over those that both have it is {difference}."]
        said += f", {difference} over the baseline"
    if best.test is None or best.test.p_holm is None:
        return [f"{said}. There is no test of it, so it cannot be told from noise."]
    told = "more than the noise of the seeds" if best.test.stars else "not told from the noise of the seeds"
    return [f"{said}: {told} (p {p_text(best)})."]


def _beaten(report: Report) -> str:
    """Of which variants the tests tell that they are worse than the baseline, which has the best mean."""
    tests = {line.variant: line.test for line in report.lines if not line.baseline and line.mean is not None}
    if not tests:
        return ""
    if all(test is None or test.p_holm is None for test in tests.values()):
        return " There is no test of the others, so they cannot be told from noise."
    starred = [line for line in report.lines if (test := tests.get(line.variant)) is not None and test.stars]
    if not starred:
        return " No variant can be told from it by more than the noise of the seeds."
    said, above = "", [line.variant for line in starred if (line.diff_mean or 0) > 0]
    if worse := [line.variant for line in starred if line.variant not in above]:
        said = f" More than the noise of the seeds below it: {', '.join(worse)}"
        said += "; no other." if len(starred) < len(tests) else "."
    if above:  # it has seeds that they have not
        said += f" Over the seeds that both have, more than the noise above it: {', '.join(above)}."
    return said


def _unlike(report: Report) -> list[str]:
    """What keeps rows from being ranked: figures of other images, or of another protocol."""
    found = []
    with_figure = [line for line in report.lines if line.mean is not None]
    for what, texts in (
        ("number of images", {line.variant: line.images for line in with_figure}),
        ("protocol", {line.variant: line.protocol for line in with_figure}),
    ):
        if len(set(texts.values())) > 1:
            each = "; ".join(f"{variant} {text}" for variant, text in texts.items())
            found.append(f"These figures are not of the same {what}, so do not rank them: {each}.")
    return found


def silent_lines(report: Report) -> list[str]:
    """A line for each split that names the variants whose nets leave many present classes without any seed."""
    shares: dict[str, list[str]] = {}
    for line in report.lines:
        for metric, by_seed in line.values.items():
            if metric.startswith(SILENT) and by_seed and (share := fmean(by_seed.values())) > SILENT_SHARE:
                shares.setdefault(metric.removeprefix(SILENT), []).append(f"{line.variant} {share:.0%}")
    return [
        f"Maps of present classes ({split}) that are nowhere above 0 and give no seed: {', '.join(named)}. These nets "
        "have not learned all of their tags: train them longer or with another learning rate before their rows are "
        "compared."
        for split, named in shares.items()
    ]


def remarks(report: Report) -> list[str]:
    """What a reader must know to judge the table: the best, its noise, its tests, and what is missing."""
    remarks = [*verdict(report), *_unlike(report), *silent_lines(report)]
    if any(line.n == 1 for line in report.lines):
        remarks.append("A figure without ± comes from one seed and says nothing of the noise.")
    remarks += rule({line.variant: line.test for line in report.lines if line.test is not None})
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
    return remarks


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines with straight columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
