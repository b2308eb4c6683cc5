"""Ray Tune as the scheduler of a study's missing trials.

A Tuner is disposable: it is given the keys of the trials that have no result, and what happened is read from the
ledger afterwards. Resuming is launching again.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray import tune
from ray._private import ray_constants as constants

from ppc.artifacts import Storage
from ppc.config import TrialConfig
from ppc.faults import StorageError, as_data, storage_error
from ppc.ledger import TrialRow
from ppc.places import StoragePath
from ppc.ray_runtime import RayRuntime, own_interrupts, ray_storage, room_for, worker_resources
from ppc.ray_stopping import Early, KeepingAsha, reporting
from ppc.runtime import WorkerDiedError
from ppc.train import TrainingStopped
from ppc.trial import record_failure, run_trial

QUIET_ENV = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_DEDUP_LOGS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_task_oom_retries": "3",  # of a task that Ray itself kills for memory; without it, for ever
}


@contextmanager
def cluster(
    address: str | None, *, num_cpus: int | None = None, num_gpus: int | None = None, temp_dir: str | None = None
) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine when no address is given (never joining one by accident).

    `num_cpus` and `num_gpus` are those of a cluster that is started; by default what this machine has.
    """
    for name, value in QUIET_ENV.items():
        os.environ.setdefault(name, value)
    local = address in (None, "local")
    options: dict[str, Any] = {"address": "local" if local else address, "logging_level": logging.ERROR}
    if local:
        options |= {"include_dashboard": False, "num_cpus": num_cpus, "num_gpus": num_gpus, "_temp_dir": temp_dir}
    with _on_loopback() if local else nullcontext():
        try:
            with _own_sigterm():
                ray.init(log_to_driver=False, configure_logging=True, **options)
            yield
        finally:
            ray.shutdown()


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a cluster of this machine alone listen at 127.0.0.1: Ray opens its ports, which take code, to all the world.

    This is its switch for systems whose firewall asks the user about open ports, and Ray reads it when it is imported.
    """
    name, before = constants.ENABLE_RAY_CLUSTERS_ENV_VAR, constants.ENABLE_RAY_CLUSTER
    told = os.environ.get(name)
    os.environ[name], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if told is not None:
            os.environ[name] = told


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Give SIGTERM back its handler: Ray's own ends this process on the spot, before anything is recorded."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # elsewhere Ray installs none
            signal.signal(signal.SIGTERM, before)


def concurrency(rows: list[TrialRow], limit: int | None) -> int:
    """How many trials the cluster can train at a time, at most `limit`."""
    fits = len(rows)
    runtimes = [TrialConfig.model_validate(row.config).runtime for row in rows]
    for workers, one in {(each.workers, tuple(worker_resources(each).items())) for each in runtimes}:
        fits = min(fits, room_for(dict(one)) // workers)
    return max(1, min(fits, limit or fits))


def run_rows(
    rows: list[TrialRow],
    storage: Storage,
    launch_dir: StoragePath,
    *,
    max_concurrent: int | None,
    early: Early | None = None,
) -> None:
    """Run trials of the ledger; returns when each has a result or an error or was stopped, or when interrupted.

    StorageError when one could not go on because of the storage.
    """
    trials = {row.key: (row.config, [(s["name"], s["key"]) for s in row.stages], row.attempt) for row in rows}
    # No CPU: a driver waits while its tasks work. Ray wants some resource, and a driver belongs on the head.
    resources = {"cpu": 0, "node:__internal_head__": 0.001}
    trainable = tune.with_resources(
        tune.with_parameters(
            _drive, trials=trials, storage=storage, scratch=launch_dir / "train", metric=early and early.rule.metric
        ),
        resources,
    )
    # Tune's own state is never read: a full disk that does not take it is no news beside what the trials say.
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)
    tuner = tune.Tuner(
        trainable,
        param_space={"key": tune.grid_search(list(trials))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrency(rows, max_concurrent),
            scheduler=early and KeepingAsha(early, rows, storage),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            **ray_storage(launch_dir),
            verbose=0,
            # A raise inside a trial is recorded by the trial itself; this is for a driver process that dies once.
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    faults: list[StorageError] = []
    with own_interrupts():
        outcomes = tuner.fit()
    for outcome in outcomes:
        if (told := (outcome.metrics or {}).get("fault")) is not None:
            faults.append(StorageError(*told))
        if outcome.error is not None and outcome.config is not None:  # its process died again
            key = outcome.config["key"]
            died = WorkerDiedError(f"the trial's own process died twice: {outcome.error}")
            if (fault := _record(storage, key, died, after=trials[key][-1])) is not None:
                faults.append(fault)
    if faults:  # one full disk is one message, however many trials met it
        raise faults[0]


def _drive(
    config: dict[str, Any], trials: dict[str, Any], storage: Storage, scratch: StoragePath, metric: str | None
) -> None:
    """The trial's driver, in a process of its own. Its raise is in the ledger; Tune is told of the end alone."""
    data, stages, before = trials[config["key"]]
    rt = RayRuntime(scratch) if metric is None else RayRuntime(scratch, lambda p: reporting(p.folder, metric))
    try:
        run_trial(TrialConfig.model_validate(data), config["key"], stages, storage, rt)
        tune.report({"finished": 1})
    except TrainingStopped:
        tune.report({"finished": 0})
    except Exception as error:
        fault = storage_error(error) or _record(storage, config["key"], error, after=before)
        told = {} if fault is None else {"fault": as_data(fault)}
        tune.report({"finished": 0, **told})


def _record(storage: Storage, key: str, error: Exception, *, after: int) -> StorageError | None:
    """`record_failure`; what of the storage kept it from being recorded."""
    try:
        record_failure(storage.trial(key), error, after=after)
    except StorageError as fault:
        return fault
    return None
