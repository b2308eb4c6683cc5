"""Early stopping on Ray Tune: its ASHA decides, the trial ends itself.

Tune's own way to stop a trial ends the process of its driver while the training that it waits for goes on, and hangs
where actors are used again. So the scheduler here always tells Tune to continue. It writes what it decided into the
folder of the training stage; the training ends at its next point, its driver then ends as after any other trial, and
all that they held is free. What was decided stays in the trial's state.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from ppc.artifacts import StageDir, Storage
from ppc.ledger import TrialRow, stage_dirs
from ppc.stopping import STAGE, EpochReader, Keepers
from ppc.study_config import EarlyStopping


@dataclass(frozen=True)
class Early:
    """What a launch says of early stopping: the rule, all trials of the study, and keys that are to run to the end."""

    rule: EarlyStopping
    rows: Sequence[TrialRow]
    baseline: str
    never: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()  # trained before a change of code, data or config: not compared with


class KeepingAsha(FIFOScheduler):  # type: ignore[misc]
    """ASHA over epochs that stops no trial which the table needs (`Keepers`), and asks the training, not Tune."""

    def __init__(self, early: Early, todo: Sequence[TrialRow], storage: Storage) -> None:
        super().__init__()
        self._storage, self._metric_name, self._seen = storage, early.rule.metric, set[str]()
        self._keepers = Keepers(early.rows, early.baseline, [row.key for row in todo], early.never)
        epochs = max(int(row.config["train"]["epochs"]) for row in early.rows)
        self._asha = ASHAScheduler(
            time_attr="epoch",
            metric="value",
            mode=early.rule.mode,
            grace_period=early.rule.min_epochs,
            max_t=max(epochs, early.rule.min_epochs),
            reduction_factor=early.rule.reduction_factor,
        )
        for row in early.rows:  # what earlier launches trained is compared with, and not decided again
            if row.key in early.apart:
                continue
            for folder in (folder for folder in stage_dirs(storage, row) if folder.stage == STAGE):
                for epoch, value in EpochReader(folder, self._metric_name).new():
                    self._worse(row.key, epoch, value)

    def _worse(self, key: str, epoch: int, value: float) -> bool:
        """ASHA's word on a trial; an epoch at which it was heard before changes nothing."""
        trial = SimpleNamespace(trial_id=key)
        if key not in self._seen:
            self._asha.on_trial_add(None, trial)
            self._seen.add(key)
        action = self._asha.on_trial_result(None, trial, {"epoch": epoch, "value": value})
        return bool(action == TrialScheduler.STOP)

    def judge(self, key: str, epoch: int, value: float) -> dict[str, Any] | None:
        """What to tell a trial that is to stop; None when it goes on."""
        if not self._worse(key, epoch, value) or not self._keepers.may_stop(key):
            return None
        self._keepers.lose(key)
        return {"epoch": epoch, "metric": self._metric_name, "value": value}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Tune before `tune.report` returns in the trial."""
        if "epoch" in result:
            why = self.judge(trial.config["key"], int(result["epoch"]), float(result["value"]))
            if why is not None:
                self._storage.stage(result["stage"], result["stage_key"]).ask_stop(why)
        return str(TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """A trial that failed leaves its variant without this seed."""
        if not result.get("finished"):
            self._keepers.lose(trial.config["key"])

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Its driver died for good."""
        self._keepers.lose(trial.config["key"])


@contextmanager
def reporting(folder: StageDir, metric: str) -> Iterator[None]:
    """Report the epochs of a training to Tune, from its journal, while it runs. At its end it is too late to stop.

    Nets that come after the CAM net are trained to their end: they are of a trial that was not stopped.
    """
    if folder.stage != STAGE:
        yield
        return
    ended, reader = threading.Event(), EpochReader(folder, metric)
    poll_s = float(os.environ.get("PPC_STOP_POLL_S", "1"))

    def report() -> None:
        for epoch, value in reader.new():
            tune.report({"epoch": epoch, "value": value, "stage": folder.stage, "stage_key": folder.key})

    def follow() -> None:
        while not ended.wait(poll_s):
            try:
                report()
            except (OSError, ValueError) as error:  # what cannot be read now must not end the training
                print(f"early stopping: {folder / 'journal.jsonl'}: {error}", flush=True)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        raise
    ended.set()
    thread.join()
    report()  # a training shorter than our rest is compared with all the same
    folder.forget_stop()
