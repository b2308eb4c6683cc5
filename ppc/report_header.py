"""What stands above a study's table: what its figures are measured on, by which rules, which code, at what cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ppc.artifacts import Storage
from ppc.changes import told
from ppc.costs import trial_cost
from ppc.ledger import TrialRow, counts
from ppc.published import NONE, caveat, images_of, is_iou, metric_split
from ppc.report_table import states_text

ABSENT = {"zero": "a class in neither masks nor seeds counts as IoU 0", "skip": "such a class is left out of the mean"}


def generated(study: dict[str, Any]) -> bool:
    """Whether a study (its `study.json`) is, in part or whole, on generated data."""
    return any(data.get("generated") for data in study["data"])


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


def header(storage: Storage, study: dict[str, Any], rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    """(name, text) of the facts of a study, in order."""
    results = [row.result for row in rows if row.result is not None]
    metric, split = study["metric"], metric_split(study["metric"])
    unit = "in per cent, " if is_iou(metric) else ""
    header = [("metric", f"{metric}, {unit}mean ± sample deviation over seeds")]
    if split is not None:
        counted = [result["counts"][split] for result in results if split in result.get("counts", {})]
        images = distinct(f"{n} images" for n in counted)
        header.append(("split", f"{split}: {images or 'no trial has counted its images yet'}"))
    header += [("skipped", line) for line in skipped_lines(rows)]
    header += [("segmentation", line) for line in segmentation_lines(rows)]
    header.append(("background score", distinct(_protocol(row, split) for row in rows)))
    rules = distinct(result["absent_classes"] for result in results if "absent_classes" in result)
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
    if study.get("command"):
        header.append(("made by", f"`{study['command']}`"))
    header += [("changed", line) for line in told(study)]
    if (text := caveat(study, images_of(rows))) is not None:
        header.append(("published", text))
    header.append(("seeds", ", ".join(str(seed) for seed in study["trial_seeds"])))
    header.append(("trials", states_text(counts(list(rows)))))
    costs = [trial_cost(storage, row) for row in {row.key: row for row in rows}.values()]
    cpu_h, gpu_h = (sum(hours) for hours in zip(*costs, strict=True)) if costs else (0.0, 0.0)
    header.append(("cost", f"{gpu_h:.2f} GPU hours, {cpu_h:.2f} CPU hours of its own trials, all attempts"))
    return header


def distinct(texts: Iterable[str]) -> str:
    """Each text once."""
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
        there = (row.result or {}).get("counts", {}).get(drawn)
        if there is not None and images is not None and there <= images:  # all of them are drawn
            same = ", the very masks that the metric is measured on" if drawn == split else ""
            return f"val_subset: the best one for all {there} masks of {drawn}{same}"
        return f"val_subset: the best one for the masks of {images} images drawn from {drawn}"
    return str(protocol)
