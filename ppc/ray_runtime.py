"""The Ray side of `Runtime`: Ray Train for several workers or GPUs, Ray tasks for the rest.

A trial's driver holds no CPU. Training of a small trial is one task, per-image work is many; Ray starts a task again
whose process died, and the training function goes on from its last checkpoint. Both ways keep checkpoints, journal and
results in the stage's own folder on storage, so that Ray's own files are never read back.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray

from ppc.config import RuntimeConfig
from ppc.runtime import MapFunction, TrainWorker, chunks, prepare_process

# A trial's placement group captures what its driver starts; DEFAULT lets it go anywhere in the cluster.
ANYWHERE = {"scheduling_strategy": "DEFAULT"}


class RayRuntime:
    """Runs a trial's work on the cluster that this process is connected to."""

    def __init__(self, scratch: str) -> None:
        self.scratch = scratch  # folder for Ray Train's own files

    def train(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
        """See `Runtime.train`."""
        wait_for_resources(cfg)
        several = cfg.workers > 1 or cfg.gpus_per_worker > 0
        if cfg.engine == "train" or (cfg.engine == "auto" and several):
            self._train_with_ray_train(worker, payload, cfg)
            return
        if cfg.workers > 1:
            raise ValueError("runtime.engine: task trains with one worker; use auto or train for runtime.workers > 1")
        options = {
            "num_cpus": cfg.cpus_per_worker, "num_gpus": cfg.gpus_per_worker, "max_retries": cfg.max_failures,
            **ANYWHERE,
        }  # fmt: skip
        task = ray.remote(**options)(_train_task)
        _get(task.remote(worker, payload, cfg.cpus_per_worker))

    def _train_with_ray_train(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

        resources = {"CPU": cfg.cpus_per_worker}
        if cfg.gpus_per_worker:
            resources["GPU"] = cfg.gpus_per_worker
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"worker": worker, "payload": payload, "cpus": cfg.cpus_per_worker},
            scaling_config=ScalingConfig(
                num_workers=cfg.workers, use_gpu=cfg.gpus_per_worker > 0, resources_per_worker=resources
            ),
            torch_config=TorchConfig(backend="nccl" if cfg.gpus_per_worker >= 1 else "gloo", timeout_s=300),
            run_config=RunConfig(
                name=uuid.uuid4().hex,  # never the name of an earlier run: Train would resume from its own snapshot
                storage_path=self.scratch,
                # A controller that fails for ever would hang the grid; the default is no limit.
                failure_config=FailureConfig(max_failures=cfg.max_failures, controller_failure_limit=10),
            ),
        )
        try:
            trainer.fit()
        except WorkerGroupError as error:
            raise next(iter(error.worker_failures.values())) from error
        except TrainingFailedError as error:
            raise RuntimeError(f"Ray Train could not run the trial's workers: {error}") from error

    def map(
        self,
        function: MapFunction,
        shared: Any,
        items: Sequence[Any],
        cfg: RuntimeConfig,
        done: Callable[[int], None],
        *,
        use_gpu: bool = False,
    ) -> list[Any]:
        """See `Runtime.map`: one task a chunk, on all CPUs of the cluster."""
        gpus = cfg.gpus_per_worker if use_gpu else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=cfg.max_failures + 1, **ANYWHERE)(_map_task)
        common = ray.put((function, shared))
        parts = chunks(items, cfg.images_per_task)
        index_of = {task.remote(common, part): i for i, part in enumerate(parts)}
        waiting, results, finished = list(index_of), [[] for _ in parts], 0  # type: ignore[var-annotated]
        try:
            while waiting:
                ready, waiting = ray.wait(waiting, num_returns=1)
                for ref in ready:
                    index = index_of[ref]
                    results[index] = _get(ref)
                    done(finished := finished + len(parts[index]))
        finally:
            for ref in waiting:
                ray.cancel(ref, force=False)
        return [value for part in results for value in part]


def _train_task(worker: TrainWorker, payload: Any, cpus: float) -> None:
    prepare_process(cpus)
    worker(payload, _device())


def _train_loop(config: dict[str, Any]) -> None:
    prepare_process(config["cpus"])
    config["worker"](config["payload"], _device())


def _map_task(common: tuple[MapFunction, Any], part: Sequence[Any]) -> list[Any]:
    prepare_process(1)
    function, shared = common
    return function(shared, part)


def _device() -> Any:
    """The GPU that Ray gave this process, or the CPU (also where a cluster only pretends to have GPUs)."""
    import torch

    return torch.device("cuda") if ray.get_gpu_ids() and torch.cuda.is_available() else torch.device("cpu")


def _get(ref: Any) -> Any:
    """The result of a task; its own exception, not Ray's wrapper around it."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            raise cause from error
        raise


def trial_resources(cfg: RuntimeConfig) -> dict[str, float]:
    """What the training of one trial takes at a time."""
    resources = {"CPU": cfg.workers * cfg.cpus_per_worker, "GPU": cfg.workers * cfg.gpus_per_worker}
    return {name: amount for name, amount in resources.items() if amount > 0}


def wait_for_resources(cfg: RuntimeConfig) -> None:
    """Wait until the cluster has what the trial asks, in all and a worker on a node; ValueError if it never does."""
    deadline = time.monotonic() + cfg.resource_wait_s
    poll_s = float(os.environ.get("PPC_RESOURCE_POLL_S", "1"))
    while (lack := _lacking(cfg)) is not None:
        if time.monotonic() >= deadline:
            raise ValueError(
                f"the trial asks for {lack}, waited {cfg.resource_wait_s:g} s (runtime.resource_wait_s); "
                "lower runtime.workers, runtime.cpus_per_worker or runtime.gpus_per_worker, or add nodes"
            )
        time.sleep(poll_s)


def _lacking(cfg: RuntimeConfig) -> str | None:
    cluster = ray.cluster_resources()
    for name, amount in trial_resources(cfg).items():
        if cluster.get(name, 0) < amount:
            return f"{amount:g} {name} in all but the cluster has {cluster.get(name, 0):g}"
    one = {"CPU": cfg.cpus_per_worker, "GPU": cfg.gpus_per_worker}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in one.items()) for node in nodes):
        return " and ".join(f"{a:g} {n}" for n, a in one.items() if a) + " a worker but no node has that"
    return None
