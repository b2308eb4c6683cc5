"""One trial: stages in order, finished ones skipped. Knows no Ray and no MLflow."""

from __future__ import annotations

import socket
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from ppc.artifacts import Storage, TrialDir, now_ms, write_json
from ppc.broken import leave_out_broken, skipped
from ppc.config import TrialConfig
from ppc.faults import storage_error
from ppc.ledger import FAILED, FINISHED, HEARTBEAT_S, KILLED, RUNNING, STOPPED, note_end
from ppc.places import remove
from ppc.planning import data_splits, open_data, tagged_splits
from ppc.processes import this_process
from ppc.redact import without_secrets
from ppc.runtime import Runtime, remedy
from ppc.stages import (
    STAGES,
    inputs_of,
    run_stage,
)
from ppc.train import TrainingStopped


class _State:
    """`state.json` of a running trial, with a heartbeat from a thread of its own."""

    def __init__(self, trial: TrialDir, cfg: TrialConfig) -> None:
        self._trial, self._lock, self._stop = trial, threading.Lock(), threading.Event()
        attempt = int(trial.state().get("attempt", 0)) + 1
        self._values: dict[str, Any] = {
            "state": RUNNING, "attempt": attempt, **this_process(), "started_ms": now_ms(),
            "stage": None, "stage_key": None, "runtime": cfg.runtime.model_dump(mode="json"),
        }  # fmt: skip
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @property
    def attempt(self) -> int:
        return int(self._values["attempt"])

    def write(self, **changes: Any) -> None:
        with self._lock:
            self._values.update(changes, heartbeat_ms=now_ms())
            write_json(self._trial.path / "state.json", self._values)

    def _beat(self) -> None:
        said = False
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self.write()
                said = False
            except OSError as error:  # a full disk must not end the training: it may have space again
                if not said:
                    print(f"heartbeat of trial {self._trial.key}: {error.strerror}; the trial goes on", flush=True)
                said = True

    def __enter__(self) -> _State:
        self.write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        note_end(self._trial, self.attempt)
        killed = isinstance(error, (KeyboardInterrupt, SystemExit))
        try:
            if error is None:
                self.write(state=FINISHED, ended_ms=now_ms())
                return
            if isinstance(error, TrainingStopped):  # nothing is wrong: neither an error nor a result
                remove(self._trial.path / "error.json")
                self.write(state=STOPPED, ended_ms=now_ms())
                return
            write_json(self._trial.path / "error.json", _describe(error, self._values))
            self.write(state=KILLED if killed else FAILED, ended_ms=now_ms())
        except OSError as second:  # a result alone decides that a trial is finished
            if storage_error(error) is None:  # else the same is being told
                print(f"state of trial {self._trial.key}: {second}", flush=True)


def _describe(error: BaseException, state: Mapping[str, Any]) -> dict[str, Any]:
    words = str(error) or type(error).__name__
    return {
        "type": type(error).__name__,
        "message": without_secrets(words if (hint := remedy(error)) is None else f"{words}; {hint}"),
        "stage": state["stage"],
        "attempt": state["attempt"],
        "host": state["host"],
        "time_ms": now_ms(),
        "traceback": without_secrets("".join(traceback.format_exception(error))),
    }


def record_failure(trial: TrialDir, error: Exception, *, after: int) -> None:
    """Record what kept an attempt later than `after` from starting, or ended its process; all else is recorded by
    `run_trial` itself."""
    state = trial.state()
    begun = state.get("attempt", 0) > after
    if trial.result() is not None or (begun and state.get("state") in (FAILED, KILLED)):
        return
    unbegun = {"attempt": after + 1, "host": socket.gethostname(), "stage": None}
    state = {**unbegun, **(state if begun else {}), "state": FAILED, "ended_ms": now_ms()}
    write_json(trial.path / "error.json", _describe(error, state))
    write_json(trial.path / "state.json", state)


def run_trial(
    cfg: TrialConfig, key: str, stages: list[tuple[str, str]], storage: Storage, rt: Runtime
) -> dict[str, Any]:
    """Run what is missing of a trial and write its result; the result when it was there already.

    A raise is recorded in `error.json`, the state becomes FAILED (KILLED for an interrupt), and it is raised again. A
    training that was asked to stop makes the state STOPPED, which says at which epoch and why.
    """
    trial = storage.trial(key)
    if (result := trial.result()) is not None:
        return result
    write_json(trial.path / "config.json", cfg.model_dump(mode="json"))
    with _State(trial, cfg) as state:
        dataset = open_data(cfg.data, storage)  # in here: data that went away is this trial's error too
        if cfg.data.on_broken == "skip":
            for split in data_splits(cfg):
                leave_out_broken(dataset, split, storage, with_labels=split in tagged_splits(cfg), planned=True)
        done: list[dict[str, Any]] = []
        merged: dict[str, Any] = {}
        cost = {"gpu_h": 0.0, "cpu_h": 0.0, "wall_s": 0.0}
        folders = {name: storage.stage(name, stage_key) for name, stage_key in stages}
        for name, stage_key in stages:
            state.write(stage=name, stage_key=stage_key)
            folder = folders[name]
            with folder.lock():
                manifest = folder.manifest()
                reused = manifest is not None
                if reused:
                    folder.tidy()
                if manifest is None:
                    start = time.monotonic()
                    inputs = {earlier: folders[earlier] for earlier in inputs_of(name, cfg, stages)}
                    folder.forget_stop()  # of whoever was at work here before
                    try:
                        outcome = run_stage(name, cfg, folder, inputs, dataset, rt)
                    except TrainingStopped:
                        state.write(stopped=folder.stop_asked())
                        raise
                    if dataset.left_out:
                        seen = STAGES[name].contents(cfg)
                        mine = {split: one for split, one in skipped(dataset).items() if split in seen}
                        outcome = {**outcome, "skipped": mine}
                    wall_s = time.monotonic() - start
                    manifest = folder.finish(outcome, wall_s=wall_s, trial=key, ran=_ran_with(cfg))
            done.append({"name": name, "key": stage_key, "reused": reused, "wall_s": manifest["wall_s"]})
            _pay(cost, manifest, key)
            _merge(merged, manifest["result"])
        result = {
            **merged, "stages": done, "wall_s": sum(s["wall_s"] for s in done), "finished_ms": now_ms(),
            "attempt": state.attempt, "host": socket.gethostname(), "cost": cost,
        }  # fmt: skip
        result.setdefault("metrics", {})
        write_json(trial.path / "result.json", result)
    with suppress(OSError):  # the error of an earlier attempt; a result outweighs it
        remove(trial.path / "error.json")
    return result


def _ran_with(cfg: TrialConfig) -> dict[str, float]:
    runtime = cfg.runtime
    return {
        "workers": runtime.workers,
        "cpus": runtime.workers * runtime.cpus_per_worker,
        "gpus": runtime.workers * runtime.gpus_per_worker,
    }


def _pay(cost: dict[str, float], manifest: Mapping[str, Any], key: str) -> None:
    """Add what a stage cost, if it is this trial that made it, now or in an earlier attempt."""
    if manifest.get("trial") == key:
        cost["gpu_h"] += manifest["cost"]["gpu_s"] / 3600
        cost["cpu_h"] += manifest["cost"]["cpu_s"] / 3600
        cost["wall_s"] += manifest["wall_s"]


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            into[name] = {**into[name], **value}
        else:
            into[name] = value
