"""Curves of a study as what an SVG needs: the metric over the axis, background-score curves, losses of trainings.

Values keep the unit of the files (IoU in [0, 1]); the page prints IoU in per cent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ppc.artifacts import Storage, read_journal
from ppc.ledger import TrialRow, stage_dirs
from ppc.published import is_iou
from ppc.report_table import Report
from ppc.run_record import NO_LOSS

WIDTH_PX, HEIGHT_PX = 480, 280  # of the viewBox; the page scales it
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 52, 12, 12, 46
MOST_POINTS = 120  # of a curve
MOST_TICKS = 8  # that are named


@dataclass(frozen=True)
class Point:
    """A point of a curve; `std` is its error bar, None where there is none."""

    x: float
    y: float
    std: float | None = None
    seeds: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """The points of one variant; `index` is its place in the table, which gives its colour and dashes."""

    variant: str
    index: int
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """A chart and its scales: `px` and `py` give a value's place in the viewBox."""

    name: str  # part of ids
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    joined: bool  # by lines
    per_cent: bool

    @property
    def x_range(self) -> tuple[float, float]:
        """Ends of the axis, a little beyond the points."""
        xs = [point.x for curve in self.curves for point in curve.points] + [x for x, _ in self.x_ticks]
        low, high = min(xs), max(xs)
        margin = 0.06 * (high - low) or 0.5
        return low - margin, high + margin

    @property
    def y_range(self) -> tuple[float, float]:
        """Ends of the axis: all points, bars and seeds, and a little more."""
        ends = [y for curve in self.curves for point in curve.points for y in _extent(point)]
        low, high = min(ends), max(ends)
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 0.5
        return low - margin, high + margin

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        """Round values between the ends, with their names."""
        scale = 100 if self.per_cent else 1
        return [(value / scale, f"{value:.{digits}f}") for value, digits in _round_values(self.y_range, scale)]

    def px(self, x: float) -> float:
        """Place of a value on the axis, from the left."""
        low, high = self.x_range
        return round(LEFT_PX + (x - low) / (high - low) * (WIDTH_PX - LEFT_PX - RIGHT_PX), 2)

    def py(self, y: float) -> float:
        """Place of a value, from the top."""
        low, high = self.y_range
        return round(HEIGHT_PX - BOTTOM_PX - (y - low) / (high - low) * (HEIGHT_PX - TOP_PX - BOTTOM_PX), 2)

    def path(self, curve: Curve) -> str:
        """The points of a curve for `<polyline points=...>`."""
        return " ".join(f"{self.px(point.x)},{self.py(point.y)}" for point in curve.points)

    def said(self) -> str:
        """The chart in words, for who does not see it."""
        told = []
        for curve in self.curves:
            word, found = ("highest", max) if self.per_cent else ("lowest", min)
            point = found(curve.points, key=lambda point: point.y)
            told.append(f"{curve.variant}: {word} {self.value(point.y)} at {_tick(point.x, self.x_ticks)}")
        return f"{self.title}. {self.y_label} over {self.x_label}. {'; '.join(told)}."

    def value(self, y: float) -> str:
        """A value in words."""
        return f"{100 * y:.2f}" if self.per_cent else f"{y:.4g}"


def _extent(point: Point) -> list[float]:
    bar = point.std or 0.0
    return [point.y - bar, point.y + bar, *point.seeds.values()]


def _tick(x: float, ticks: Sequence[tuple[float, str]]) -> str:
    return next((name for at, name in ticks if at == x), f"{x:.4g}")


def _round_values(ends: tuple[float, float], scale: float) -> Iterable[tuple[float, int]]:
    """About five multiples of 1, 2 or 5 times a power of ten between two ends times `scale`, and their digits."""
    low, high = ends[0] * scale, ends[1] * scale
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    digits = max(0, -math.floor(math.log10(step)))
    return [(n * step, digits) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _thinned(ticks: list[tuple[float, str]]) -> list[tuple[float, str]]:
    return ticks[:: max(1, math.ceil(len(ticks) / MOST_TICKS))]


# -- what is drawn


def axis_chart(report: Report) -> Chart | None:
    """The metric over the study's only axis of numbers, its values equally far apart, else over the variants."""
    lines = [(index, line) for index, line in enumerate(report.lines) if line.mean is not None]
    if not lines:
        return None
    factors = list(dict.fromkeys(name for line in report.lines for name in line.factors))
    values = [line.factors.get(factors[0]) if len(factors) == 1 else None for _, line in lines]
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    by_number = len(set(numbers)) == len(lines)
    places = [sorted(numbers).index(number) for number in numbers] if by_number else list(range(len(lines)))
    names = [str(value) for value in values] if by_number else [str(index + 1) for index, _ in lines]
    curves = [
        Curve(line.variant, index, [Point(x, line.mean, line.std, line.values.get(report.metric, {}))])
        for (index, line), x in zip(lines, places, strict=True)
        if line.mean is not None
    ]
    label = f"{factors[0]} (values equally spaced)" if by_number else "variant, by its line in the table"
    ticks = sorted((float(x), name) for x, name in zip(places, names, strict=True))
    title = f"{report.metric} over {factors[0] if by_number else 'the variants'}"
    return Chart("axis", title, label, report.metric, curves, ticks, by_number, is_iou(report.metric))


def score_charts(report: Report, rows: Sequence[TrialRow]) -> list[Chart]:
    """Seed mIoU over the background score, the mean over seeds, one chart a split."""
    order = [line.variant for line in report.lines]
    found = dict[str, dict[str, list[dict[float, float]]]]()
    for row in rows:
        for split, curve in (row.result or {}).get("curves", {}).items():
            points = {x: y for x, y in zip(curve["thresholds"], curve["miou"], strict=True) if math.isfinite(y)}
            found.setdefault(split, {}).setdefault(row.variant, []).append(points)
    charts = []
    for number, (split, by_variant) in enumerate(found.items()):
        curves = [Curve(v, order.index(v), means) for v, seeds in by_variant.items() if (means := _means(seeds))]
        if curves:
            title = f"Seed mIoU over the background score, {split}"
            charts.append(_chart(f"score{number}", title, "background score", f"seed_miou_{split}", curves, True))
    return charts


def loss_charts(report: Report, storage: Storage, rows: Sequence[TrialRow]) -> list[Chart]:
    """Losses of the trainings over their steps, the mean over seeds of each variant, one chart a loss."""
    order = [line.variant for line in report.lines]
    found = dict[str, dict[str, list[dict[float, float]]]]()
    read = dict[str, dict[str, dict[float, float]]]()  # by stage: variants can share a training
    for row in rows:
        for folder in stage_dirs(storage, row):
            if folder.key not in read:
                read[folder.key] = _losses(read_journal(folder / "journal.jsonl")[0])
            for name, points in read[folder.key].items():
                found.setdefault(name, {}).setdefault(row.variant, []).append(points)
    charts = []
    for number, name in enumerate(sorted(found, key=lambda name: (name.split("/")[0], not name.endswith("/loss")))):
        curves = [Curve(v, order.index(v), _binned(m)) for v, seeds in found[name].items() if (m := _means(seeds))]
        if curves:
            charts.append(_chart(f"loss{number}", f"Training: {name}", "step", name, curves, False))
    return charts


def _losses(points: Sequence[dict[str, object]]) -> dict[str, dict[float, float]]:
    """Losses of a journal by name and step."""
    found = dict[str, dict[float, float]]()
    for point in points:
        metrics, step = point["m"], point["step"]
        assert isinstance(metrics, dict) and isinstance(step, int | float)
        for name, value in metrics.items():
            if name.rpartition("/")[2] not in NO_LOSS and math.isfinite(value):
                found.setdefault(name, {})[step] = value
    return found


def _binned(points: Sequence[Point]) -> list[Point]:
    """Thinned to `MOST_POINTS` by means over steps that follow each other."""
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [Point(part[-1].x, fmean(point.y for point in part)) for part in parts]


def _means(seeds: Sequence[Mapping[float, float]]) -> list[Point]:
    """The mean over seeds at each place that all of them have, so that no curve jumps where a seed ends."""
    shared = set.intersection(*(set(points) for points in seeds)) if seeds else set[float]()
    return [Point(x, fmean(points[x] for points in seeds)) for x in sorted(shared)]


def _chart(name: str, title: str, x_label: str, y_label: str, curves: list[Curve], per_cent: bool) -> Chart:
    xs = [point.x for curve in curves for point in curve.points]
    low, high = min(xs), max(xs)
    if high == low:
        ticks = [(low, f"{low:g}")]
    else:
        ticks = [(value, f"{value:.{digits}f}") for value, digits in _round_values((low, high), 1)]
    return Chart(name, title, x_label, y_label, curves, _thinned(ticks), True, per_cent)
