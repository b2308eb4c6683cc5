"""Across studies: one table of the configs of several, told apart by the fields that differ; the best of every study.

A config is told from another by its variant's key, which has the contents of data and weights and the versions of the
stages in it: what has the same key in two studies is one row, and a trial that both have is counted once.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppc.artifacts import Storage
from ppc.ledger import FINISHED, TrialRow, counts, read_rows
from ppc.published import NONE, metric_split
from ppc.report import build_report
from ppc.report_header import distinct, generated
from ppc.report_table import align, p_text, spread, states_text
from ppc.study import summarise

KEY, DATA = (
    "key",
    "data",
)  # columns that are no field: of configs that no field tells apart, and of a data set's contents


@dataclass(frozen=True)
class Compared:
    """A config of one or more studies, with the statistics of the metric over the seeds of all of them."""

    fields: dict[str, Any]  # those that differ between the rows, by dotted name
    studies: dict[str, str]  # study -> its name for the variant
    reused: dict[str, int]  # study -> trials of it that another had finished
    values: dict[int, float]  # by seed
    mean: float | None
    std: float | None  # sample deviation
    states: dict[str, int]
    protocol: str
    count: int | None  # images of the metric's split
    generated: bool


@dataclass(frozen=True)
class Comparison:
    """The rows of several studies, and what a reader must know of them."""

    metric: str
    fields: list[str]
    rows: list[Compared]
    remarks: list[str]


def compare(storage: Storage, names: Sequence[str], metric: str | None = None) -> Comparison:
    """The configs of several studies; the metric is that of the first unless one is named.

    ValueError for a study that is not there or is named twice, and for a metric that no trial has.
    """
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise ValueError(f"compare: study {', '.join(twice)} is named twice; name each once")
    studies = {name: storage.study(name).definition() for name in names}
    own = {name: str(study["metric"]) for name, study in studies.items()}
    metric = metric or own[names[0]]
    groups = dict[str, list[tuple[str, TrialRow]]]()
    configs = dict[str, dict[str, Any]]()
    for name, study in studies.items():
        prints = {entry["key"]: entry.get("fingerprint") for entry in study["trials"]}
        for row in read_rows(storage, study):
            groups.setdefault(row.variant_key, []).append((name, row))
            seen = prints[row.key] or distinct(data["fingerprint"] for data in study["data"])
            configs.setdefault(row.variant_key, {**_flat(row.config), DATA: seen[:12], KEY: row.variant_key[:12]})
    there = sorted({m for group in groups.values() for _, row in group for m in (row.result or {}).get("metrics", {})})
    if there and metric not in there:
        raise ValueError(f"metric {metric}: no trial of {', '.join(names)} has it; they have {', '.join(there)}")
    fields = differing(configs)
    made = {name: generated(study) for name, study in studies.items()}
    rows = [_compared(groups[key], {f: configs[key].get(f) for f in fields}, metric, made) for key in groups]
    return Comparison(metric, fields, rows, _remarks(rows, own, metric))


def _flat(config: Mapping[str, Any], head: str = "") -> dict[str, Any]:
    """A config by dotted fields, but for what decides no number or is the seed, and the place of the data."""
    found = dict[str, Any]()
    for name, value in config.items():
        path = head + name
        if path in ("seed", "runtime", "data.root"):
            continue
        found |= _flat(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return found


def differing(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The fields that differ; `data` where the contents do, and the key where no field tells two rows apart."""
    rows = list(configs.values())
    paths = [path for path in dict.fromkeys(path for row in rows for path in row) if path != KEY]
    found = [path for path in paths if len({_text(row.get(path)) for row in rows}) > 1]
    told = {tuple(_text(row.get(path)) for path in found) for row in rows}
    return found if len(told) == len(rows) else [*found, KEY]


def _compared(
    group: Sequence[tuple[str, TrialRow]], own: dict[str, Any], metric: str, made: dict[str, bool]
) -> Compared:
    unique = {row.key: row for _, row in group}.values()
    values = {row.seed: value for row in unique if (value := row.metric(metric)) is not None}
    (row,) = summarise({"": values}, "")
    images = [(r.result or {}).get("counts", {}).get(metric_split(metric)) for r in unique]
    studies = {study: distinct(row.variant for s, row in group if s == study) for study, _ in group}
    reused = {study: len({row.key for s, row in group if s == study and row.reused}) for study in studies}
    return Compared(
        fields=own, studies=studies, values=values, mean=row.mean, std=row.std, states=counts(list(unique)),
        reused={study: n for study, n in reused.items() if n},
        protocol=distinct(r.config.get("seeds", {}).get("protocol", "?") for r in unique),
        count=next((n for n in images if n is not None), None), generated=any(made[study] for study in studies),
    )  # fmt: skip


def _remarks(rows: Sequence[Compared], own: Mapping[str, str], metric: str) -> list[str]:
    found = []
    for what, values in (
        ("images", {str(row.count) for row in rows if row.count is not None}),
        ("protocols", {row.protocol for row in rows if row.mean is not None}),
    ):
        if len(values) > 1:
            found.append(f"These figures are not of the same {what} ({', '.join(sorted(values))}): do not rank them.")
    if others := [f"{name} by {wanted}" for name, wanted in own.items() if wanted != metric]:
        found.append(f"Compared by {metric}; decided by another metric: {', '.join(others)}.")
    if any(row.generated for row in rows):
        found.append("Rows that say so are of generated data.")
    if without := sum(n for row in rows for state, n in row.states.items() if state != FINISHED):
        found.append(f"{without} trial(s) have no result and are in no figure.")
    return found


def _text(value: Any) -> str:
    return NONE if value is None else value if isinstance(value, str) else json.dumps(value, default=str)


# -- in words


def table(found: Comparison) -> list[list[str]]:
    """The comparison as text, headings first; IoU in per cent."""
    split = metric_split(found.metric)
    heads = [
        *found.fields,
        found.metric,
        "n",
        f"images of {split}" if split else "images",
        "protocol",
        "studies",
        "trials",
    ]
    rows = []
    for row in found.rows:
        studies = [
            f"{s}: {v}" + (f" ({row.reused[s]} reused)" if s in row.reused else "") for s, v in row.studies.items()
        ]
        rows.append(
            [
                *(_text(row.fields[name]) for name in found.fields),
                spread(row.mean, row.std, found.metric),
                str(len(row.values)),
                NONE if row.count is None else str(row.count) + (" (generated)" if row.generated else ""),
                row.protocol,
                ", ".join(studies),
                states_text(row.states),
            ]
        )
    return [heads, *rows]


def best_table(storage: Storage) -> list[list[str]]:
    """The best variant of every study of a storage as text, headings first; of one that cannot be read, why."""
    heads = [
        "study",
        "best variant",
        "metric",
        "mean",
        "n",
        "vs baseline",
        "p (Holm)",
        "images",
        "protocol",
        "no result",
    ]
    rows = []
    for name in storage.study_names():
        try:
            report = build_report(storage, name)
        except ValueError as error:
            rows.append([name, f"cannot be read: {error}", *[NONE] * (len(heads) - 2)])
            continue
        missing = sum(n for line in report.lines for state, n in line.states.items() if state != FINISHED)
        best = next((line for line in report.lines if line.best), None)
        if best is None:
            rows.append([name, NONE, report.metric, NONE, "0", NONE, NONE, NONE, NONE, str(missing)])
            continue
        difference = spread(best.diff_mean, best.diff_std, report.metric, sign=True)
        images = NONE if best.count is None else f"{best.count} of {metric_split(report.metric)}"
        images += " (generated)" if report.generated else ""
        figures = [spread(best.mean, best.std, report.metric), str(best.n), "baseline" if best.baseline else difference]
        rows.append([name, best.variant, report.metric, *figures, p_text(best), images, best.protocol, str(missing)])
    return [heads, *rows]


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    cells = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'|'.join(['---'] * len(cells[0]))}|", *lines[1:]]) + "\n"


def as_csv(found: Comparison) -> str:
    """A comparison with its numbers as they are in the data (IoU in [0, 1]), each seed's value in a column."""
    seeds = sorted({seed for row in found.rows for seed in row.values})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    told = ["metric", "mean", "std", "n", "split", "count", "protocol", "generated", "studies", "reused"]
    writer.writerow([*found.fields, *told, *(f"seed_{seed}" for seed in seeds)])
    for row in found.rows:
        figures = [found.metric, row.mean, row.std, len(row.values), metric_split(found.metric), row.count]
        names = "; ".join(f"{study}: {variant}" for study, variant in row.studies.items())
        writer.writerow(
            [
                *(row.fields[name] for name in found.fields), *figures, row.protocol, row.generated, names,
                sum(row.reused.values()), *(row.values.get(seed) for seed in seeds),
            ]
        )  # fmt: skip
    return text.getvalue()


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """A table as lines with straight columns."""
    return "\n".join(align(rows)) + "\n"
