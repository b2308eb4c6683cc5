"""Early stopping without a scheduler: what is compared, and which trials are never stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ppc.artifacts import StageDir, read_journal, read_json
from ppc.config import TrialConfig
from ppc.ledger import FAILED, STOPPED, TrialRow
from ppc.methods import journal_metrics
from ppc.study_config import EarlyStopping

STAGE = "train_cam"  # whose journal has the metric that trials are compared by


def epoch_values(points: Iterable[Mapping[str, Any]], metric: str, steps_per_epoch: int) -> Iterator[tuple[int, float]]:
    """(epoch from 1, mean of the metric over its steps) of every epoch that a journal has whole, in order.

    A point stands for the steps since the one before it, so the mean does not depend on how often points are written.
    """
    epoch = before = 0
    total = steps = 0.0
    for point in points:
        step = int(point["step"])
        if (at := (step - 1) // steps_per_epoch + 1) != epoch:
            epoch, before, total, steps = at, (at - 1) * steps_per_epoch, 0.0, 0.0
        total += (step - before) * point["m"][metric]
        steps += step - before
        before = step
        if step == epoch * steps_per_epoch:
            yield epoch, total / steps


class EpochReader:
    """Reads the epochs of a training stage while it goes on, but for its last: at that nothing is left to stop."""

    def __init__(self, folder: StageDir, metric: str) -> None:
        self._folder, self._metric = folder, metric
        self._points: list[dict[str, Any]] = []
        self._offset = self._told = 0

    def new(self) -> list[tuple[int, float]]:
        """The epochs that are whole and were not told before."""
        progress = read_json(self._folder / "progress.json")
        if not isinstance(progress, dict) or not progress.get("epochs"):
            return []
        points, self._offset = read_journal(self._folder / "journal.jsonl", self._offset)
        self._points += points
        epochs = int(progress["epochs"])
        values = epoch_values(self._points, self._metric, int(progress["total"]) // epochs)
        found = [(epoch, value) for epoch, value in values if self._told < epoch < epochs]
        self._told = max([self._told, *(epoch for epoch, _ in found)])
        return found


def metric_problem(rule: EarlyStopping | None, cfg: TrialConfig) -> str | None:
    """What keeps a trial from being compared with the others while it trains."""
    if rule is None or rule.metric in (names := journal_metrics(cfg)):
        return None
    return f"early_stopping.metric: the training of these trials has no {rule.metric!r}; there are: {', '.join(names)}"


def no_effect(study: Mapping[str, Any], *, local: bool) -> str:
    """Why the early stopping of a study (its `study.json`) stops nothing in a launch; empty where it can."""
    rule, epochs = study.get("early_stopping"), [trial["config"]["train"]["epochs"] for trial in study["trials"]]
    if not rule:
        return ""
    if local:
        return "early_stopping needs Ray: with --local every trial runs to its last epoch"
    if len(study["trial_seeds"]) < 2:
        return "early_stopping stops nothing: it keeps a seed of every variant, and there is one"
    if rule["min_epochs"] >= max(epochs):
        return f"early_stopping stops nothing: min_epochs is {rule['min_epochs']}, train.epochs at most {max(epochs)}"
    return ""


def must_run(rows: Sequence[TrialRow], baseline: str) -> frozenset[str]:
    """Keys of trials that were stopped, though not by the rule of this study: those of the baseline, and the first of a
    variant that has no other."""
    keys = {row.key for row in rows if row.state == STOPPED and row.variant == baseline}
    for variant in dict.fromkeys(row.variant for row in rows):
        mine = [row for row in rows if row.variant == variant]
        if all(row.state == STOPPED for row in mine):
            keys.add(mine[0].key)
    return frozenset(keys)


class Keepers:
    """Which trials may be stopped: none of the baseline, none of `never`, and of no variant the last that is left.

    Left are the trials that have, or can still get, a result in this launch. `todo` are the keys that it runs.
    """

    def __init__(self, rows: Sequence[TrialRow], baseline: str, todo: Iterable[str], never: Iterable[str] = ()) -> None:
        run = set(todo)
        self._never = {*never, *(row.key for row in rows if row.variant == baseline)}
        self._variants: dict[str, set[str]] = {}  # of each key: two variants can be one trial
        self._left: dict[str, set[str]] = {}
        for row in rows:
            self._variants.setdefault(row.key, set()).add(row.variant)
            left = self._left.setdefault(row.variant, set())
            if row.key in run or row.state not in (STOPPED, FAILED):
                left.add(row.key)

    def may_stop(self, key: str) -> bool:
        """Whether every variant of this trial keeps another one."""
        return key not in self._never and all(self._left[v] - {key} for v in self._variants[key])

    def lose(self, key: str) -> None:
        """The trial was stopped or has failed."""
        for variant in self._variants[key]:
            self._left[variant].discard(key)
