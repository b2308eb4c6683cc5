"""CPU and GPU hours of a study: what its own trials have used, and about what is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from ppc.artifacts import Storage, used_s
from ppc.ledger import FINISHED, STOPPED, TrialRow, stage_dirs


def trial_cost(storage: Storage, row: TrialRow) -> tuple[float, float]:
    """CPU and GPU hours of a trial's own stages so far; one that another trial made costs nothing here."""
    if row.result is not None and "cost" in row.result:
        return float(row.result["cost"]["cpu_h"]), float(row.result["cost"]["gpu_h"])
    cpu_s = gpu_s = 0.0
    for folder in stage_dirs(storage, row):
        manifest = folder.manifest()
        if manifest is not None and manifest.get("trial") == row.key:
            cpu_s, gpu_s = cpu_s + manifest["cost"]["cpu_s"], gpu_s + manifest["cost"]["gpu_s"]
        elif manifest is None and folder.stage == row.stage:
            used = used_s(folder / "progress.json")
            cpu_s, gpu_s = cpu_s + used[0], gpu_s + used[1]
    return cpu_s / 3600, gpu_s / 3600


def gpu_hours(storage: Storage, rows: Sequence[TrialRow]) -> tuple[float, float | None]:
    """GPU hours that a study's trials have used so far, and about how many are left; None when nothing tells.

    What is left: each trial without a result takes what the finished ones of this study took, on the mean. Trials
    that were reused, or that shared a stage, make that mean smaller than a trial alone would cost.
    """
    unique = {row.key: row for row in rows}.values()
    used = {row.key: trial_cost(storage, row)[1] for row in unique if row.result is not None or row.attempt}
    mine = [used[row.key] for row in unique if row.state == FINISHED and not row.reused]
    todo = [row for row in unique if row.state not in (FINISHED, STOPPED)]
    left = None
    if not todo:
        left = 0.0
    elif mine:
        left = sum(max(0.0, fmean(mine) - used.get(row.key, 0.0)) for row in todo)
    return sum(used.values()), left
