"""What a study is on storage: its list of trials with their keys, made, saved, extended and compared with today."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ppc import __version__, changes
from ppc.artifacts import Storage, now_ms, read_json, write_json
from ppc.checks import metrics_of
from ppc.config import TrialConfig
from ppc.ledger import TrialRow, missing, read_rows
from ppc.names import nearest
from ppc.planning import Planner, data_name
from ppc.published import is_iou, metric_split
from ppc.published import saved as saved_rows
from ppc.redact import AS_IT_IS
from ppc.resources import change_runtime
from ppc.search import Search, next_round, start
from ppc.stopping import metric_problem
from ppc.study import BASE, TrialSpec
from ppc.study_config import StudyConfig, Twin

FORMAT = 1


def code_version() -> dict[str, Any]:
    """Version and commit of this code; the commit is None outside a checkout, unless who packed the code told it."""
    if told := os.environ.get("PPC_CODE"):
        return dict(json.loads(told))
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    return {"version": __version__, "commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def undecided(metric: str, cfg: TrialConfig, there: Sequence[str]) -> str | None:
    """Why a metric cannot decide a study, of whose trials `cfg` is one and gives the metrics `there`."""
    ious = [name for name in there if is_iou(name)]
    if not ious and (unmasked := [name for name in metrics_of(cfg) if is_iou(name)]):
        splits = ", ".join(dict.fromkeys(filter(None, map(metric_split, unmasked))))
        return (
            f"metric: no mIoU can be measured: the data has no masks of {splits}; add masks of a few images, as a "
            "split of their own, or run its trials one by one (ppc run FILE), which asks for none"
        )
    if metric not in there:
        return f"metric: these stages and splits give no {metric!r}{nearest(metric, ious)}"
    if not is_iou(metric):
        listed = f" ({', '.join(ious)})" if ious else ""
        return (
            f"metric: the largest mean of it is called the best, so {metric!r} cannot decide; take a mIoU{listed}, and "
            "name it among the columns"
        )
    return None


def define(
    study: StudyConfig,
    specs: Sequence[TrialSpec],
    baseline: str,
    storage: Storage,
    *,
    any_metric: bool = False,
    twin: Twin = "full",
) -> dict[str, Any]:
    """The study's list of trials with their keys: what `study.json` holds. Reads data and weights, and writes nothing
    but generated scenes; ValueError for a storage that cannot be written.

    All that keeps a trial from being planned is in one ValueError. A trial of the same key
    as one before it cannot be told from it: its entry names that one's variant under `same_as`. With `any_metric`, a
    metric that the trials do not have is replaced by one that the last of them has.
    """
    storage.check_writable()
    planner, trials, data, metric = Planner(storage), list[dict[str, Any]](), {}, study.metric
    problems, firsts = dict[str, list[str]](), dict[str, str]()
    for spec in specs:
        try:
            plan = planner.plan(spec.config)
        except ValueError as error:
            for line in str(error).split("\n"):
                problems.setdefault(line, []).append(spec.variant)
            continue
        if metric not in plan.metrics and any_metric:
            metric = (plan.metrics or [metric])[-1]
        elif not any_metric and (problem := undecided(metric, plan.config, plan.metrics)) is not None:
            problems.setdefault(problem, []).append(spec.variant)
        if (problem := metric_problem(study.early_stopping, plan.config)) is not None:
            problems.setdefault(problem, []).append(spec.variant)
        section = plan.config.data
        place = data_name(section)
        data[place] = {"name": section.name, "root": place, "generated": section.name == "scenes"}
        trials.append(
            {
                "key": plan.key, "variant": spec.variant, "variant_key": plan.variant_key, "seed": spec.seed,
                "factors": spec.factors, **plan.saved(),
            }
        )  # fmt: skip
        first = firsts.setdefault(plan.key, spec.variant)
        if first != spec.variant:
            trials[-1]["same_as"] = first
        data[place]["fingerprint"] = plan.fingerprint
    if problems:
        everywhere = {spec.variant for spec in specs}
        raise ValueError(
            "\n".join(
                text if everywhere <= set(found) else f"{', '.join(dict.fromkeys(found))}: {text}"
                for text, found in problems.items()
            )
        )
    return {
        "format": FORMAT, "name": study.name, "note": study.note, "metric": metric, "baseline": baseline,
        "factors": list(dict.fromkeys(name for spec in specs for name in spec.factors)), "trials": trials,
        "trial_seeds": study.trial_seeds, "data": list(data.values()), "created_ms": now_ms(),
        "code": code_version(), "max_concurrent": study.max_concurrent,
        "early_stopping": study.early_stopping and study.early_stopping.model_dump(mode="json"), "twin": twin,
        "columns": study.columns, "published": saved_rows(study.published),
    }  # fmt: skip


def define_search(
    study: StudyConfig, base: Mapping[str, Any], storage: Storage, *, twin: Twin = "full"
) -> dict[str, Any]:
    """`define` for a design of kind search: its first round, and the rounds that an earlier launch of it has made."""
    before = read_json(storage.study(study.name).path / "study.json")
    search = start(study, base, before.get("search") if isinstance(before, dict) else None)
    made = [changes for one in search.rounds for changes in one]
    return {**define(study, search.specs(made), BASE, storage, twin=twin), "search": search.dump()}


def next_round_of(storage: Storage, study: dict[str, Any], console: Console) -> list[TrialRow]:
    """The trials of a search's next round, added to `study.json` and to `study`; none when there is no other round."""
    if "search" not in study:
        return []
    search = Search.load(study["search"])
    while changes := next_round(search, read_rows(storage, study)):
        search.rounds.append(changes)
        more = define(search.study, search.specs(changes), BASE, storage)["trials"]
        fresh = {**study, "trials": study["trials"] + more, "search": search.dump()}
        write_json(storage.study(study["name"]).path / "study.json", fresh)
        study.update(fresh)  # the tracker and the live table look at this very object
        names = "; ".join(dict.fromkeys(trial["variant"] for trial in more))
        console.print(f"round {len(search.rounds) - 1}: {names}", **AS_IT_IS)
        keys = {trial["key"] for trial in more}
        if todo := [row for row in missing(read_rows(storage, study)) if row.key in keys]:
            return todo  # else all were finished before, in another study
    return []


def save(definition: dict[str, Any], storage: Storage) -> list[str]:
    """Write `study.json`; how it differs from an earlier study of that name, as lines.

    A study that is there keeps its date of creation, and results of trials stay on storage in any case.
    """
    folder = storage.study(definition["name"])
    before = read_json(folder.path / "study.json")
    differences = list[str]()
    if isinstance(before, dict) and "created_ms" in before:
        definition = {**definition, "created_ms": before["created_ms"]}
        differences = changes.against_saved(before, definition)
    write_json(folder.path / "study.json", definition)
    return differences


def as_today(
    storage: Storage, study: dict[str, Any], keys: set[str], runtime: Sequence[str], *, accept: bool
) -> tuple[dict[str, Any], set[str]]:
    """The study as its trials of these keys will run, and their keys then. Writes nothing.

    ValueError when code, config, data or weights have changed since the study was saved, for then the keys would be
    false; with `accept` these trials get new ones, and the study a record of it.
    """
    planner = Planner(storage)
    if (drift := changes.look(planner, study, keys)) is not None:
        code = code_version()
        if not accept:
            raise ValueError(changes.refusal(drift, study, code))
        study, keys = changes.accept(planner, study, keys, drift, code=code)
    if runtime and (changed := change_runtime(study, sorted(keys), runtime)) and keys:  # it checks their names first
        study = changed
        changes.look(planner, study, keys)  # ValueError for a batch that these workers cannot share
    return study, keys
