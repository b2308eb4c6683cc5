"""The Ray side of `Runtime`: Ray Train for several workers or GPUs, Ray tasks for the rest.

A trial's driver holds no CPU. Training of a small trial is one task, per-image work is many; Ray starts a task again
whose process died, and the training function goes on from its last checkpoint. Both ways keep checkpoints, journal and
results in the stage's own folder on storage, so that Ray's own files are never read back.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray

from ppc.config import RuntimeConfig
from ppc.places import StoragePath, remove
from ppc.runtime import (
    MapFunction,
    Meter,
    TrainWorker,
    WorkerDiedError,
    chunks,
    first_raise,
    prepare_process,
    raise_file,
    record_raise,
    timed,
)
from ppc.train import TrainingStopped

# A trial's placement group captures what its driver starts; DEFAULT lets it go anywhere in the cluster.
ANYWHERE = {"scheduling_strategy": "DEFAULT"}
NO_GPU = (
    "torch finds none there: install a torch for its driver, start Ray there with as many GPUs as it has "
    "(ray start --num-gpus), or run on CPUs: --set runtime.gpus_per_worker=0"
)
NO_NCCL = "ProcessGroupNCCL is only supported with GPUs"  # what torch says where it finds none
START_TRIES = 10  # more tries to start the workers of a trial when they did not come up
ROUNDING = 1e-6  # of a share: 1 / 0.1 is a little less than ten shares


class RayRuntime:
    """Runs a trial's work on the cluster that this process is connected to."""

    def __init__(
        self, scratch: StoragePath, beside: Callable[[Any], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self.scratch = scratch  # folder for Ray Train's own files
        self._beside = beside  # called with a training's payload: what goes on while it runs
        self.meter = Meter()

    def train(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
        """See `Runtime.train`."""
        wait_for_resources({"CPU": cfg.cpus_per_worker, "GPU": cfg.gpus_per_worker}, cfg.workers, cfg.resource_wait_s)
        with self._beside(payload):
            self._train(worker, payload, cfg)

    def _train(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
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
        _get(task.remote(worker, payload, cfg.cpus_per_worker), cfg.max_failures)

    def _train_with_ray_train(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
        from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
        from ray.train.v2.api.exceptions import ControllerError

        # So long Ray Train waits for room to start workers, again after a node died. While the cluster has the room and
        # others use it, a trial waits on, as a task does.
        start_s = max(5.0, cfg.resource_wait_s)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{start_s:g}"
        deaths = 0
        tries_left = START_TRIES + cfg.max_failures
        while True:
            try:
                return self._fit(worker, payload, cfg)
            except ControllerError as error:
                one = {"CPU": cfg.cpus_per_worker, "GPU": cfg.gpus_per_worker}
                wait_for_resources(one, cfg.workers, 0, waited_s=start_s)
                if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                    continue
                if isinstance(error.controller_failure, ray.exceptions.RayActorError):
                    # A worker that dies while Ray Train starts it: that is not one of Ray Train's own tries.
                    deaths += 1
                    if deaths > cfg.max_failures:
                        raise _died(cfg.max_failures, error.controller_failure) from error
                    continue
                if NO_NCCL in str(error):
                    raise ValueError(f"Ray gave the trial's workers GPUs, but {NO_GPU}") from error
                if not tries_left or not isinstance(error.controller_failure, WorkerGroupStartupFailedError):
                    raise RuntimeError(f"Ray Train could not run the trial's workers: {error}") from error
                tries_left -= 1

    def _fit(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
        from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

        from ppc.ray_room import RoomBack

        resources = {"CPU": cfg.cpus_per_worker}
        if cfg.gpus_per_worker:
            resources["GPU"] = cfg.gpus_per_worker
        name = uuid.uuid4().hex  # never the name of an earlier run: Train would resume from its own snapshot
        raised = self.scratch / f"{name}-raised"
        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"worker": worker, "payload": payload, "cpus": cfg.cpus_per_worker, "raised": raised},
            scaling_config=ScalingConfig(
                num_workers=cfg.workers, use_gpu=cfg.gpus_per_worker > 0, resources_per_worker=resources
            ),
            torch_config=TorchConfig(
                backend="nccl" if cfg.gpus_per_worker >= 1 and not fake_gpus() else "gloo",
                timeout_s=peer_timeout_s(),
            ),
            run_config=RunConfig(
                name=name,
                **ray_storage(self.scratch),
                callbacks=[RoomBack()],
                # What keeps workers from starting is looked at here: Ray Train's own tries have no limit by default.
                failure_config=FailureConfig(max_failures=cfg.max_failures, controller_failure_limit=0),
            ),
        )
        try:
            with own_interrupts():
                trainer.fit()
        except WorkerGroupError as error:
            for failure in error.worker_failures.values():
                if isinstance(failure, WorkerHealthCheckFailedError):  # its peers raise because of it
                    raise _died(cfg.max_failures, failure) from error
            raise next(iter(error.worker_failures.values())) from error
        except ControllerError:
            raise
        except TrainingFailedError as error:
            raise RuntimeError(f"Ray Train could not run the trial's workers: {error}") from error
        if (first := first_raise(raised)) is not None:
            if type(first).__name__ == TrainingStopped.__name__:
                raise TrainingStopped(str(first))
            raise first

    def map(
        self,
        function: MapFunction,
        shared: Any,
        items: Sequence[Any],
        cfg: RuntimeConfig,
        done: Callable[[int, Any], None],
        *,
        use_gpu: bool = False,
    ) -> None:
        """See `Runtime.map`: one task a chunk, on all CPUs of the cluster, or on as many GPUs as training may use."""
        gpus = cfg.gpus_per_worker if use_gpu else 0
        wait_for_resources({"CPU": 1, "GPU": gpus}, 1, cfg.resource_wait_s)
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=cfg.max_failures + 1, **ANYWHERE)(_map_task)
        common = ray.put((function, shared))
        parts = chunks(items, cfg.images_per_task)
        sizes = {task.remote(common, part): len(part) for part in parts}
        finished = 0
        try:
            while sizes:
                (ref,), _ = ray.wait(list(sizes), num_returns=1)
                finished += sizes.pop(ref)
                spent_s, result = _get(ref, cfg.max_failures + 1)
                self.meter.add(spent_s, gpus=gpus)
                done(finished, result)
        finally:
            for ref in sizes:
                ray.cancel(ref, force=False)


def peer_timeout_s() -> int:
    """How long a worker waits for its peers before it raises.

    It bounds what a host that was cut off can hold up: Ray there lives on, and its first worker keeps the lock of the
    training while it waits for peers. Those that take its place wait for it, later and therefore longer.
    """
    return int(os.environ.get("PPC_PEER_TIMEOUT_S", "120"))


def ray_storage(path: StoragePath) -> dict[str, Any]:
    """How Ray is told of a folder of storage for its own files: through the very client that we use."""
    if isinstance(path, Path):
        return {"storage_path": str(path)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": path.path, "storage_filesystem": PyFileSystem(FSSpecHandler(path.fs))}


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Give SIGINT back its handler afterwards: Tune and Ray Train leave their own, for a run that has long ended."""
    if threading.current_thread() is not threading.main_thread():  # where Tune runs a trial nothing is installed
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _train_task(worker: TrainWorker, payload: Any, cpus: float) -> None:
    prepare_process(cpus)
    worker(payload, _device())


def _train_loop(config: dict[str, Any]) -> None:
    """One worker of Ray Train, which starts all again whatever one raises. So a raise is recorded and the worker ends
    well: only the death of a process is worth another try. What an earlier try recorded is no longer true: the peers
    of a process that died raise too."""
    import torch.distributed as dist
    from ray.train import get_context

    rank = get_context().get_world_rank()
    remove(raise_file(config["raised"], rank))
    prepare_process(config["cpus"])
    try:
        config["worker"](config["payload"], _device())
        remove(raise_file(config["raised"], rank))  # by a worker of a host that was cut off
    except TrainingStopped as error:  # all workers raise it at the same step
        record_raise(config["raised"], rank, error)
    except Exception as error:
        if not record_raise(config["raised"], rank, error):
            raise  # full storage: Ray Train tells of it, after its tries; what is not told is taken for a good end
        if dist.is_initialized():
            if dist.get_backend() == "nccl" and dist.get_world_size() > 1:
                raise  # nothing tells peers that wait on a GPU; Ray Train ends them
            dist.destroy_process_group()  # peers that wait for this one raise at once


def _map_task(common: tuple[MapFunction, Any], part: Sequence[Any]) -> tuple[float, Any]:
    prepare_process(1)
    function, shared = common
    return timed(function, shared, part, _device())


def _device() -> Any:
    """The GPU that Ray gave this process, or the CPU when it gave none. ValueError when torch cannot use that GPU."""
    import torch

    if not (gpus := ray.get_gpu_ids()) or fake_gpus():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        which = f"GPU {', '.join(map(str, gpus))} of {socket.gethostname()}"
        raise ValueError(f"Ray gave this process {which}, but {NO_GPU}")
    return torch.device("cuda")


def fake_gpus() -> bool:
    """Whether GPUs are only counted, and work runs on CPUs: PPC_FAKE_GPUS=1, for tests of a cluster without any."""
    return os.environ.get("PPC_FAKE_GPUS") == "1"


def _get(ref: Any, max_retries: int) -> Any:
    """The result of a task; its own exception, not Ray's wrapper around it.

    WorkerDiedError when its process died at every try.
    """
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            raise cause from error
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise _died(max_retries, error) from error


def _died(max_retries: int, error: Exception) -> WorkerDiedError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return WorkerDiedError(
        f"a process of the trial died and so did {max_retries} more tries (runtime.max_failures): {first}"
    )


def worker_resources(cfg: RuntimeConfig) -> dict[str, float]:
    """What one worker of a training takes."""
    resources = {"CPU": cfg.cpus_per_worker, "GPU": cfg.gpus_per_worker}
    return {name: amount for name, amount in resources.items() if amount > 0}


def room_for(one: Mapping[str, float]) -> int:
    """How many processes that take `one` each the nodes of the cluster can hold at a time, were all else to end."""
    return sum(_how_many(node["Resources"], one) for node in ray.nodes() if node["Alive"])


def _how_many(node: Mapping[str, float], one: Mapping[str, float]) -> int:
    """How many of these fit on a node; a share of a GPU is of one GPU."""
    counts = []
    for name, amount in one.items():
        there = node.get(name, 0)
        if name == "GPU" and amount < 1:
            counts.append(int(there) * int(1 / amount + ROUNDING))
        else:
            counts.append(int(there / amount + ROUNDING))
    return min(counts)


def wait_for_resources(one: Mapping[str, float], number: int, wait_s: float, *, waited_s: float = 0) -> None:
    """Wait until the cluster has room for `number` processes that take `one` each, whoever uses it now.

    ValueError if it never has, in all or on a node; its text counts what the caller `waited_s` before.
    """
    deadline = time.monotonic() + wait_s
    poll_s = float(os.environ.get("PPC_RESOURCE_POLL_S", "1"))
    asked = {name: amount for name, amount in one.items() if amount > 0}
    while (lack := _lacking(asked, number)) is not None:
        if time.monotonic() >= deadline:
            raise ValueError(
                f"the trial asks for {lack}, waited {waited_s + wait_s:g} s (runtime.resource_wait_s); "
                "lower runtime.workers, runtime.cpus_per_worker or runtime.gpus_per_worker, or add nodes"
            )
        time.sleep(poll_s)


def _lacking(one: Mapping[str, float], number: int) -> str | None:
    cluster = ray.cluster_resources()
    for name, amount in one.items():
        if cluster.get(name, 0) < amount * number:
            return f"{amount * number:g} {name} in all but the cluster has {cluster.get(name, 0):g}"
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in one.items()) for node in nodes):
        return " and ".join(f"{amount:g} {name}" for name, amount in one.items()) + " a worker but no node has that"
    if (room := room_for(one)) < number:
        each = " and ".join(f"{amount:g} {name}" for name, amount in one.items())
        return f"{number} workers of {each} each but the nodes have room for {room}"
    return None
