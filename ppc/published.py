"""Published figures beside a study's own: checked against its file, and joined to its table.

They are of VOC 2012 at full size. A difference is told only where ours are of the same images: not on generated data,
and not on a split with another number of them. In [0, 1] here, in per cent in files of studies and in reports.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppc.checks import metrics_of
from ppc.config import TrialConfig
from ppc.ledger import TrialRow
from ppc.loading import Override
from ppc.names import nearest
from ppc.schema import ConfigError, Problem, origin_of
from ppc.stages.products import products_of
from ppc.study import TrialSpec, expand
from ppc.study_config import Published, StudyConfig

VOC_IMAGES = {"train": 1464, "val": 1449, "test": 1456, "train_aug": 10582}  # METHOD 1
NONE = "-"


@dataclass(frozen=True)
class Claim:
    """A published figure of a variant, in [0, 1], and ours minus it where the two can be compared."""

    value: float
    source: str
    difference: float | None


@dataclass(frozen=True)
class OtherMethod:
    """A published row of a method that the study does not run; metric -> value in [0, 1]."""

    name: str
    values: dict[str, float]
    source: str


def is_iou(metric: str) -> bool:
    """Whether a metric is an IoU, hence printed in per cent."""
    return "iou" in metric.lower()


def metric_split(metric: str) -> str | None:
    """The split that a metric is measured on; None for a metric of none, such as bg_score."""
    found = re.fullmatch(r"[a-z_]+?_miou_(.+)", metric)
    return found[1] if found else None


# -- what a file says, checked


def check_published(study: StudyConfig, *, overrides: Sequence[Override] = ()) -> None:
    """ConfigError for published rows and columns that the study, at full size, has nothing to put beside."""
    if not study.published and not study.columns:
        return
    problems = list(_problems(study, expand(study, overrides=overrides)))
    if problems:
        raise ConfigError(problems)


def _problems(study: StudyConfig, specs: Sequence[TrialSpec]) -> Iterator[Problem]:
    configs: dict[str, TrialConfig] = {spec.variant: spec.config for spec in specs}
    everywhere = _metrics(list(configs.values()))
    for metric in study.columns:
        if not _given(metric, list(configs.values())):
            yield Problem("", "columns", f"these stages and splits give no {metric!r}{nearest(metric, everywhere)}")
    seen = set[tuple[str, str]]()
    for i, row in enumerate(study.published):
        where, path = origin_of(row.values, list(row.values)[:1]), f"published.{i}"
        if row.variant is not None and row.variant not in configs:
            yield Problem(where, f"{path}.variant", f"no variant {row.variant!r}{nearest(row.variant, list(configs))}")
            continue
        mine = list(configs.values()) if row.variant is None else [configs[row.variant]]
        for metric in row.values:
            text = _metric_problem(metric, mine)
            if text is None and row.variant is not None and (row.variant, metric) in seen:
                text = f"there is a published {metric} of {row.variant!r} before it"
            if text is not None:
                yield Problem(origin_of(row.values, [metric]), f"{path}.values.{metric}", text)
            seen.add((row.variant or "", metric))


def _metric_problem(metric: str, configs: Sequence[TrialConfig]) -> str | None:
    if not is_iou(metric):
        return "is no IoU; published figures are mIoU in per cent"
    if not _given(metric, configs):
        return f"these stages and splits give no {metric!r}{nearest(metric, _metrics(configs))}"
    return None


def _metrics(configs: Sequence[TrialConfig]) -> list[str]:
    return list(dict.fromkeys(metric for config in configs for metric in metrics_of(config)))


def _given(metric: str, configs: Sequence[TrialConfig]) -> bool:
    """Whether a trial has the metric, or has it on other splits of VOC: masks of test are with VOC's server alone."""
    product, _, split = metric.partition("_miou_")
    made = {name for config in configs for name in products_of(config.stages)}
    return metric in _metrics(configs) or (product in made and split in VOC_IMAGES)


# -- as a report has it


def saved(rows: Sequence[Published]) -> list[dict[str, Any]]:
    """What `study.json` holds of them."""
    return [row.model_dump(mode="json", exclude_none=True) for row in rows]


def published_metrics(study: Mapping[str, Any]) -> list[str]:
    """Metrics that any published row has, in order of appearance."""
    return list(dict.fromkeys(metric for row in study.get("published", []) for metric in row["values"]))


def claims(
    study: Mapping[str, Any], variant: str, means: Mapping[str, float | None], counts: Mapping[str, int]
) -> dict[str, Claim]:
    """The published figures of a variant by metric; `counts` are the images of each split here."""
    found = dict[str, Claim]()
    for row in study.get("published", []):
        if row.get("variant") == variant:
            for metric, per_cent in row["values"].items():
                value, ours = per_cent / 100, means.get(metric)
                told = ours is not None and comparable(study, metric, counts)
                found[metric] = Claim(value, row["source"], ours - value if told and ours is not None else None)
    return found


def comparable(study: Mapping[str, Any], metric: str, counts: Mapping[str, int]) -> bool:
    """Whether our figure of a metric is of the images of VOC 2012."""
    split = metric_split(metric)
    return _caveat_of_data(study) is None and split is not None and counts.get(split) == VOC_IMAGES.get(split, -1)


def other_methods(study: Mapping[str, Any]) -> list[OtherMethod]:
    """The published rows that are no variant of the study."""
    return [
        OtherMethod(row["method"], {metric: value / 100 for metric, value in row["values"].items()}, row["source"])
        for row in study.get("published", [])
        if "method" in row
    ]


def caveat(study: Mapping[str, Any], counts: Mapping[str, int]) -> str | None:
    """What the published figures are, for the report's header; None when there are none."""
    if not study.get("published"):
        return None
    if (text := _caveat_of_data(study)) is not None:
        return f"of VOC 2012 at full size; {text}, so no difference is given"
    splits = dict.fromkeys(filter(None, map(metric_split, published_metrics(study))))
    other = [
        f"{split} has {counts[split]:,} images here and {VOC_IMAGES.get(split, 0):,} there"
        for split in splits
        if split in counts and counts[split] != VOC_IMAGES.get(split)
    ]
    if other:
        return f"of VOC 2012 at full size; {', '.join(other)}: no difference is given for what is measured on it"
    return "of VOC 2012, sources below; a difference is ours minus the published figure"


def _caveat_of_data(study: Mapping[str, Any]) -> str | None:
    twin = study.get("twin", "full")
    if twin != "full":
        return f"this is the twin --{twin} of the study, on generated data"
    generated = any(data.get("generated") for data in study["data"])
    return "this study is on generated data" if generated else None


def images_of(rows: Sequence[TrialRow]) -> dict[str, int]:
    """Images of each split that trials have counted; a split that they count otherwise has none."""
    found = dict[str, set[int]]()
    for row in rows:
        for split, count in (row.result or {}).get("counts", {}).items():
            found.setdefault(split, set()).add(count)
    return {split: min(counts) if len(counts) == 1 else 0 for split, counts in found.items()}


# -- in words


def per_cent(value: float | None, *, sign: bool = False) -> str:
    """A fraction in per cent."""
    return NONE if value is None else f"{value * 100:{'+' if sign else ''}.2f}"


def claim_cell(claim: Claim | None) -> str:
    """A cell of the table: `61.50 (ours -0.32)`."""
    if claim is None:
        return NONE
    return per_cent(claim.value) + (
        "" if claim.difference is None else f" (ours {per_cent(claim.difference, sign=True)})"
    )


def others_table(others: Sequence[OtherMethod], metrics: Sequence[str]) -> list[list[str]]:
    """Rows of other methods as text, headings first; empty without such rows."""
    if not others:
        return []
    shown = [metric for metric in metrics if any(metric in other.values for other in others)]
    heads = ["published", *shown, "source"]
    return [heads, *([other.name, *(per_cent(other.values.get(m)) for m in shown), other.source] for other in others)]


def sources(lines: Sequence[tuple[str, Mapping[str, Claim]]]) -> list[str]:
    """Where the figures beside our variants are from, one line a source of a variant."""
    found = dict[tuple[str, str], list[str]]()
    for variant, mine in lines:
        for metric, claim in mine.items():
            found.setdefault((variant, claim.source), []).append(f"{metric} {per_cent(claim.value)}")
    return [f"published, {variant}: {', '.join(figures)} ({source})" for (variant, source), figures in found.items()]


def csv_columns(metrics: Sequence[str]) -> list[str]:
    """Headings of what a CSV line has of each published metric, beside its own; and whose the line is."""
    names = [name for metric in metrics for name in (f"ours_{metric}", f"published_{metric}", f"difference_{metric}")]
    return [*names, "source", "is_published_row"] if names else []


def csv_cells(metrics: Sequence[str], means: Mapping[str, float | None], mine: Mapping[str, Claim]) -> list[Any]:
    """The cells of a variant of ours under `csv_columns`."""
    if not metrics:
        return []
    cells: list[Any] = []
    for metric in metrics:
        claim = mine.get(metric)
        cells += [means.get(metric), claim and claim.value, claim and claim.difference]
    return [*cells, "; ".join(dict.fromkeys(claim.source for claim in mine.values())), False]


def csv_rows(metrics: Sequence[str], others: Sequence[OtherMethod], before: int) -> list[list[Any]]:
    """Lines of other methods: the name, `before` empty cells, and the cells under `csv_columns`."""
    rows = []
    for other in others:
        cells = [cell for metric in metrics for cell in (None, other.values.get(metric), None)]
        rows.append([other.name, *[None] * before, *cells, other.source, True])
    return rows
