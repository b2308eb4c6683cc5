"""Resuming with other resources: `runtime` of trials that have no result, changed in their study. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ppc.artifacts import now_ms
from ppc.loading import override_all, split_override, validate_trial


def change_runtime(study: dict[str, Any], keys: Collection[str], sets: Sequence[str]) -> dict[str, Any]:
    """The study (its `study.json`) with `runtime.X=value` overrides in the trials of these keys, and a record of them.

    `runtime` is not part of a key, so the trials stay what they are. ValueError for any other field: that would be
    another trial.
    """
    changes = {path: value for path, value, _ in map(split_override, sets)}
    if other := [path for path in changes if not path.startswith("runtime.")]:
        raise ValueError(
            f"--set {other[0]}: a resume changes fields of `runtime` alone; {other[0]} makes another trial: set it in "
            "the study's file and launch that (ppc study launch FILE)"
        )
    override_all({}, sets)  # ConfigError for a name that is no field, also where no trial is left
    trials = []
    for entry in study["trials"]:
        if entry["key"] in keys:
            config = validate_trial(override_all(entry["config"], sets), "--set")
            entry = {**entry, "config": config.model_dump(mode="json")}
        trials.append(entry)
    record = {"time_ms": now_ms(), "set": changes, "trials": list(keys)}
    return {**study, "trials": trials, "runtime_changes": [*study.get("runtime_changes", []), record]}
