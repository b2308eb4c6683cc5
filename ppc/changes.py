"""What changed since a study was saved: told as a diff, and refused or taken with a record.

A saved trial is known by its key, and its entry in `study.json` holds what the key was made of (`TrialPlan.saved`). The
functions here compare that with today's plan. They read data and weights through a `Planner`, and write nothing.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ppc.artifacts import now_ms
from ppc.config import DataConfig, TrialConfig
from ppc.loading import validate_trial
from ppc.planning import Planner, data_name
from ppc.schema import fields, model_in, show
from ppc.stages import WEIGHTS

SHOWN = 6  # names of trials in a list
SHOWN_LINES = 12
DIGITS = 12  # of a sha256 or a commit
RELAUNCH = "launch its file again (ppc study launch FILE): what has not changed is not run again"
TRAINING = "train_cam"

Entry = dict[str, Any]  # a trial of `study.json`


# -- two entries of a trial


def label(entry: Mapping[str, Any]) -> str:
    """Name of a trial, as the ledger's rows have it."""
    return f"{entry['variant']} s={entry['seed']}"


def known_fields(
    raw: Mapping[str, Any], model: type[BaseModel] = TrialConfig, prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """A config, in part or whole, without the fields that are none any more; and their dotted names."""
    kept, gone = dict[str, Any](), list[str]()
    for name, value in raw.items():
        field = model.model_fields.get(name)
        inner = None if field is None else model_in(field.annotation)
        if field is None:
            gone.append(prefix + name)
        elif inner is not None and isinstance(value, Mapping):
            kept[name], inside = known_fields(value, inner, f"{prefix}{name}.")
            gone += inside
        else:
            kept[name] = value
    return kept, gone


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """How two resolved configs differ, field by field. A new field of `runtime` is no change: it decides nothing."""
    old, new = dict(_flat(before)), dict(_flat(after))
    for path in [path for path in old if path not in new]:
        yield f"{path}: no such field any more"
    for path, value in new.items():
        if path not in old and not path.startswith("runtime."):
            yield f"config {path}: added with default {show(value)}"
        elif path in old and old[path] != value:
            yield f"config {path}: {show(old[path])} -> {show(value)}"


def _fact_changes(before: Entry, after: Entry) -> Iterator[str]:
    """How stages, data and weights of two entries differ; nothing where the earlier one does not tell."""
    old, new = before.get("facts"), after["facts"]
    if old is None:
        return
    for stage, version in new["stages"].items():
        if old["stages"].get(stage, version) != version:
            yield f"stage {stage}: version {old['stages'][stage]} -> {version}"
    place = data_name(DataConfig.model_validate(after["config"]["data"]))
    for split, now in new["data"].items():
        was = old["data"].get(split, now)
        if was["fingerprint"] != now["fingerprint"]:
            images = f"{was['images']} -> {now['images']}" if was["images"] != now["images"] else now["images"]
            yield f"data {split} of {place}: {images} images, contents changed"
    for name in (name for name in new if name.endswith(WEIGHTS)):  # `weights` of the CAM net, `psa.weights`
        if old.get(name) and new[name] and old[name] != new[name]:
            net = name.removesuffix(WEIGHTS).rstrip(".")
            section = after["config"][net] if net else after["config"]
            yield (f"weights {section['backbone']['weights']}: sha256 {old[name][:DIGITS]}… -> {new[name][:DIGITS]}…")


def entry_changes(before: Entry, after: Entry) -> list[str]:
    """What makes a trial another than it was saved as, one thing a line."""
    found = [*config_changes(before["config"], after["config"]), *_fact_changes(before, after)]
    if before["key"] == after["key"] or found:
        return found
    if before.get("facts") is None:
        return ["the code of a stage, the data or the weights (its older study.json does not tell which)"]
    return ["code: what enters a content key (config, data, weights and the stages' versions are the same)"]


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _by_line(pairs: Iterable[tuple[Entry, Entry]]) -> list[str]:
    """The changes of many trials, each once, with the trials it is in where it is not in all."""
    found, labels = dict[str, list[str]](), list[str]()
    for before, after in pairs:
        labels.append(label(before))
        for line in entry_changes(before, after):
            found.setdefault(line, []).append(label(before))
    return [line if len(mine) == len(labels) else f"{line} (in {_some(mine)})" for line, mine in found.items()]


def _commits(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str:
    """`commit 1234 -> 5678`, or versions where a commit is not known; empty when nothing differs."""
    old = before or {}
    commits = [str(code["commit"])[:DIGITS] if code.get("commit") else None for code in (old, after)]
    if None in commits:
        versions = [code.get("version", "?") for code in (old, after)]
        return f"version {versions[0]} -> {versions[1]}" if versions[0] != versions[1] else ""
    marks = ["+" if code.get("dirty") else "" for code in (old, after)]  # + as in `git describe`: changes on top
    words = [f"{commit}{mark}" for commit, mark in zip(commits, marks, strict=True)]
    return f"commit {words[0]} -> {words[1]}" if words[0] != words[1] else ""


# -- a resume


@dataclass(frozen=True)
class Drift:
    """Trials of a study that would be others today. `run` are those still to run, `ended` those of a search whose next
    rounds would be made with today's code: pairs of the saved entry and today's."""

    run: list[tuple[Entry, Entry]]
    ended: list[tuple[Entry, Entry]]
    base_gone: list[str]  # fields of a search's base that are none any more

    @property
    def lines(self) -> list[str]:
        """What has changed, one thing a line."""
        told = _by_line([*self.run, *self.ended])
        said = " ".join(told)
        return told + [f"{path}: no such field any more" for path in self.base_gone if path not in said]


def look(planner: Planner, study: Mapping[str, Any], todo: Collection[str]) -> Drift | None:
    """What has changed for the trials of these keys, and for a search that is to go on; None when nothing has.

    ValueError for a trial that cannot be planned any more.
    """
    run, ended = [], []
    goes_on, known = _search_goes_on(study), _acknowledged(study)
    for entry in study["trials"]:
        if entry["key"] in todo:
            now = today(planner, entry, study["name"])
            if now["key"] != entry["key"] or known_fields(entry["config"])[1]:
                run.append((entry, now))
        elif goes_on:
            now = today(planner, entry, study["name"])
            if now["key"] != known.get(entry["key"], entry["key"]):
                ended.append((entry, now))
    base_gone = _base_gone(study) if goes_on else []
    return Drift(run, ended, base_gone) if run or ended or base_gone else None


def today(planner: Planner, entry: Entry, study: str) -> Entry:
    """A saved trial as it would be saved today, fields that are none any more left out."""
    raw, _ = known_fields(entry["config"])
    try:
        return {**entry, **planner.plan(validate_trial(raw, f"study {study}, {label(entry)}")).saved()}
    except ValueError as error:
        raise ValueError(
            f"{label(entry)} cannot run as it was saved: {error}\n  correct that, or {RELAUNCH}"
        ) from error


def _search_goes_on(study: Mapping[str, Any]) -> bool:
    if "search" not in study:
        return False
    made = sum(len(one) for one in study["search"]["rounds"]) - 1  # the base is no proposal
    return bool(made < study["search"]["study"]["design"]["search"]["num_variants"])


def _base_gone(study: Mapping[str, Any]) -> list[str]:
    axes = study["search"]["study"]["design"]["axes"]
    if absent := [path for path in axes if path not in fields()]:
        raise ValueError(
            f"study {study['name']} searches over {', '.join(absent)}: no such field any more; correct its file and "
            "launch that (ppc study launch FILE)"
        )
    return known_fields(study["search"]["base"])[1]


def _acknowledged(study: Mapping[str, Any]) -> dict[str, str | None]:
    """The keys that ended trials would have had when changes were last taken."""
    found: dict[str, str | None] = {}
    for record in study.get("changes", []):
        found |= record["kept"]
    return found


def refusal(drift: Drift, study: Mapping[str, Any], code: Mapping[str, Any]) -> str:
    """Why a resume is refused, what to do, and the diff."""
    labels, name = [label(entry) for entry, _ in drift.run], study["name"]
    if labels and all(entry.get("facts") is None and not any(_of_config(entry, now)) for entry, now in drift.run):
        what = "the code of a stage, the data or the weights have changed since the study was launched"
        return f"{labels[0]}: {what}; {_ways(name)}"
    affected = f"{len(labels)} trial(s) still to run: {_some(labels)}" if labels else "the next rounds of its search"
    lines = [f"study {name} is not what was launched; changed since then, for {affected}", *drift.lines]
    if commits := _commits(study.get("code"), code):
        lines.append(f"code: {commits}")
    return "\n  ".join(lines) + f"\n{_ways(name)}"


def _of_config(entry: Entry, now: Entry) -> Iterator[str]:
    return config_changes(entry["config"], now["config"])


def _ways(name: str) -> str:
    return (
        f"take it: ppc study resume {name} --accept-changes (what is still to run gets new keys, what is finished "
        f"stays as it is, and the table says so); or {RELAUNCH}"
    )


def accept(
    planner: Planner, study: dict[str, Any], todo: Collection[str], drift: Drift, *, code: Mapping[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """The study with today's entries for those of the trials still to run that have changed, and a record of it; and
    the keys that are to run then.

    All others keep their keys: what they have was made as their keys say.
    """
    new = {id(entry): now for entry, now in drift.run}
    trials = [dict(new.get(id(entry), entry)) for entry in study["trials"]]
    rerun = [entry for entry in study["trials"] if id(entry) in new]
    kept, trained_otherwise = dict[str, str | None](), list[str]()
    for entry in study["trials"]:
        if entry["key"] in todo or entry["key"] in kept:
            continue
        try:
            now = today(planner, entry, study["name"])
        except ValueError:  # it has ended, and cannot be made again
            kept[entry["key"]] = None
            trained_otherwise.append(entry["key"])
            continue
        kept[entry["key"]] = now["key"]
        if _training(now) != _training(entry):
            trained_otherwise.append(entry["key"])
    _mark_doubles(trials)
    record = {
        "time_ms": now_ms(), "host": socket.gethostname(), "user": _user(), "from": study.get("code"), "to": dict(code),
        "what": drift.lines, "trials": {entry["key"]: new[id(entry)]["key"] for entry in rerun}, "kept": kept,
        "trained_otherwise": trained_otherwise,
    }  # fmt: skip
    changed = {
        **study, "trials": trials, "code": dict(code), "data": _data_today(study["data"], drift.run),
        "changes": [*study.get("changes", []), record],
    }  # fmt: skip
    if drift.base_gone:
        search = study["search"]
        base, own = known_fields(search["base"])[0], known_fields(search["study"]["base"])[0]
        changed["search"] = {**search, "base": base, "study": {**search["study"], "base": own}}
    pairs = zip(study["trials"], trials, strict=True)
    return changed, {now["key"] for before, now in pairs if before["key"] in todo}


def _user() -> str | None:
    """Who runs this; None where the system has no name for it, as in some containers."""
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return None


def _training(entry: Entry) -> str | None:
    return next((stage["key"] for stage in entry["stages"] if stage["name"] == TRAINING), None)


def _mark_doubles(trials: list[Entry]) -> None:
    """`same_as` of trials whose keys have become equal, or are no longer."""
    firsts = dict[str, str]()
    for entry in trials:
        first = firsts.setdefault(entry["key"], entry["variant"])
        entry.pop("same_as", None)
        if first != entry["variant"]:
            entry["same_as"] = first


def _data_today(data: list[dict[str, Any]], run: list[tuple[Entry, Entry]]) -> list[dict[str, Any]]:
    """The study's datasets with the fingerprints that the trials still to run have."""
    prints = {data_name(DataConfig.model_validate(now["config"]["data"])): now["fingerprint"] for _, now in run}
    return [{**one, "fingerprint": prints.get(one["root"], one["fingerprint"])} for one in data]


# -- what was taken, for readers of a study


def told(study: Mapping[str, Any]) -> list[str]:
    """A line for each time that changes were taken: when, by whom, commits, what, and for how many trials."""
    lines = []
    for record in study.get("changes", []):
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(record["time_ms"] / 1000))
        who = f"{record['user']}@{record['host']}" if record.get("user") else record["host"]
        commits = _commits(record.get("from"), record["to"])
        before = sum(now != key for key, now in record["kept"].items())
        trials = f"{len(record['trials'])} trial(s) run as changed, {before} as before"
        words = [f"{when} UTC by {who}", *([commits] if commits else [])]
        lines.append(f"{', '.join(words)}: {'; '.join(record['what'])}; {trials}")
    return lines


def code_of(study: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The code that a trial was planned with: that of before the first change that left it as it was."""
    for record in study.get("changes", []):
        if key in record["kept"]:
            return record.get("from") or {}
    return study.get("code") or {}


def trained_otherwise(study: Mapping[str, Any]) -> frozenset[str]:
    """Keys of trials whose training is not to be compared with what is trained today: from before a change of it."""
    return frozenset(key for record in study.get("changes", []) for key in record["trained_otherwise"])


# -- a launch


def against_saved(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """How a study differs from the one of its name that was saved, in a few lines; none when it does not."""
    old, new = ({(t["variant"], t["seed"]): t for t in study["trials"]} for study in (before, after))
    old_keys, new_keys = ({t["key"] for t in trials.values()} for trials in (old, new))
    added = [label(t) for place, t in new.items() if place not in old and t["key"] not in old_keys]
    gone = [label(t) for place, t in old.items() if place not in new and t["key"] not in new_keys]
    both = [(old[place], t) for place, t in new.items() if place in old]
    changed = [pair for pair in both if entry_changes(*pair)]
    again = [label(entry) for entry, now in changed if entry["key"] != now["key"]]
    lines = [f"{len(added)} trial(s) added: {_some(added)}"] if added else []
    if gone:
        text = f"{len(gone)} trial(s) of an earlier study of this name are not in its file any more; their files stay"
        lines.append(f"{text}: {_some(gone)}")
    found = _by_line(changed)
    lines += found[:SHOWN_LINES] + ([f"and {len(found) - SHOWN_LINES} more"] if len(found) > SHOWN_LINES else [])
    for name in ("metric", "baseline", "max_concurrent", "early_stopping"):
        if before.get(name) != after.get(name):
            lines.append(f"{name}: {show(before.get(name))} -> {show(after.get(name))}")
    if again:
        if commits := _commits(before.get("code"), after.get("code") or {}):
            lines.append(f"code: {commits}")
        lines.append(f"{len(again)} trial(s) get new keys by that, their earlier files stay: {_some(again)}")
    return lines
