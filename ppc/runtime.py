"""Where work runs, behind two verbs: `train` a function on every worker, `map` a function over items.

Stages know this protocol alone. `LocalRuntime` needs no cluster; the Ray one is in `ray_runtime.py`. A training
function is called as `worker(payload, device)` with torch.distributed set up when there are several workers, a map
function as `function(shared, chunk, device)`: the runtime alone knows which device is whose.
"""

from __future__ import annotations

import ctypes
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from ppc.artifacts import read_json, write_json
from ppc.config import RuntimeConfig
from ppc.data.dataset import OR_SKIP
from ppc.data.labels import DataError
from ppc.faults import StorageError, as_data
from ppc.places import StoragePath, names_in
from ppc.processes import end_with_parent
from ppc.redact import without_secrets

TrainWorker = Callable[[Any, torch.device], None]
MapFunction = Callable[[Any, Sequence[Any], torch.device], Any]


class Meter:
    """CPU and GPU seconds that the tasks of `Runtime.map` held, finished ones alone."""

    def __init__(self) -> None:
        self._cpu_s = self._gpu_s = 0.0

    def add(self, spent_s: float, *, gpus: float) -> None:
        """One task, which held one CPU and `gpus`."""
        self._cpu_s += spent_s
        self._gpu_s += spent_s * gpus

    def read(self) -> tuple[float, float]:
        """CPU and GPU seconds so far."""
        return self._cpu_s, self._gpu_s


class Runtime(Protocol):
    """What a stage may ask of the place it runs in."""

    meter: Meter

    def train(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
        """Call `worker(payload, device)` in `cfg.workers` processes; start dead ones again, at most
        `cfg.max_failures` times. Raises what the worker raised."""

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
        """`function(shared, chunk, device)` over chunks of the items, in any order.

        `done(n, result)` is called in the caller's process as chunks finish: `n` items are ready by now, and `result`
        is what the function returned for that chunk. Nothing is kept here, so the caller decides what a large dataset
        takes in memory. `use_gpu` says that the function can use one; without it the device is the CPU.
        """


class WorkerDiedError(RuntimeError):
    """A process of a trial died, without a raise, each time that it was started."""


def remedy(error: BaseException) -> str | None:
    """What a user can do about a broken image or a trial too large for its resources; ends the error's message."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ == "OutOfMemoryError":  # torch's, also when a worker told of it
            return (
                "give the trial more memory: ppc study resume STUDY --set runtime.workers=2 (halves the batch of a "
                "worker), or --set runtime.gpus_per_worker=1 (shares its GPU with no other trial)"
            )
        if isinstance(seen, (WorkerDiedError, BrokenProcessPool, ProcessExitedException, MemoryError)):
            return (
                "mostly the memory of the machine was full (its kernel log says so); run fewer trials at a time: "
                "ppc study resume STUDY --max-concurrent 1, or let one take less: --set runtime.loader_workers=0 "
                "--set runtime.images_per_task=4"
            )
        if isinstance(seen, DataError) and seen.of_image:
            return OR_SKIP
        seen = seen.__cause__
    return None


def timed(function: MapFunction, shared: Any, part: Sequence[Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that a chunk took, and its result."""
    start = time.monotonic()
    result = function(shared, part, device)
    return time.monotonic() - start, result


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Items in order, `size` at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def prepare_process(cpus: float) -> None:
    """Use as many threads as the worker has CPUs, on any machine: sums are split the same way everywhere.

    And keep freed memory: glibc gives large tensors back to the kernel at every step and asks for them again, which
    took a fifth of a CPU training step in page faults.
    """
    torch.set_num_threads(max(1, int(cpus)))
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of glibc's malloc.h


class LocalRuntime:
    """This machine alone: one process a worker, and `map_processes` processes for per-image work."""

    def __init__(self, map_processes: int = 1) -> None:
        self.map_processes = map_processes
        self.meter = Meter()

    def train(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
        """See `Runtime.train`. A raise is final here: there is nobody to notice a dead process but the user."""
        if cfg.workers == 1:
            prepare_process(cfg.cpus_per_worker)
            worker(payload, _device(0))
            return
        with tempfile.TemporaryDirectory() as folder:
            arguments = (worker, payload, cfg.workers, cfg.cpus_per_worker, folder)
            context = spawn(_spawned, args=arguments, nprocs=cfg.workers, join=False)  # type: ignore[no-untyped-call]
            try:
                while not context.join():
                    pass
            except ProcessRaisedException:
                if (first := first_raise(Path(folder))) is not None:
                    raise first  # noqa: B904 - its cause is the worker's traceback
                raise
            finally:  # an interrupt must not leave workers that train on
                for process in context.processes:
                    process.kill()
                    process.join()

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
        """See `Runtime.map`. With a GPU all is done here: one process fills it."""
        parts = chunks(items, cfg.images_per_task)
        finished = 0
        processes = min(self.map_processes, len(parts))
        device = _device(0) if use_gpu else torch.device("cpu")
        gpus = 0 if device.type == "cpu" else 1
        if processes <= 1 or device.type != "cpu":
            prepare_process(1)
            for part in parts:
                spent_s, result = timed(function, shared, part, device)
                self.meter.add(spent_s, gpus=gpus)
                done(finished := finished + len(part), result)
        else:
            context = get_context("spawn")
            with ProcessPoolExecutor(processes, context, _prepare_pool_process, (os.getpid(),)) as pool:
                sizes = {pool.submit(timed, function, shared, part, device): len(part) for part in parts}
                try:
                    for future in as_completed(list(sizes)):
                        finished += sizes.pop(future)
                        spent_s, result = future.result()
                        self.meter.add(spent_s, gpus=gpus)
                        done(finished, result)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise


def _prepare_pool_process(parent: int) -> None:
    """As `prepare_process`; and it ends when a signal that nothing can catch ends the process whose work it does."""
    if not end_with_parent(parent, signal.SIGKILL):
        os._exit(1)
    prepare_process(1)


def _device(index: int) -> torch.device:
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def _spawned(rank: int, worker: TrainWorker, payload: Any, world_size: int, cpus: float, folder: str) -> None:
    prepare_process(cpus)
    gpus = torch.cuda.device_count()
    backend = "nccl" if gpus >= world_size else "gloo"
    rendezvous = f"file://{Path(folder) / 'rendezvous'}"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        worker(payload, _device(rank) if backend == "nccl" else torch.device("cpu"))
    except Exception as error:
        record_raise(Path(folder), rank, error)
        raise
    finally:
        dist.destroy_process_group()


def raise_file(folder: StoragePath, rank: int) -> StoragePath:
    """Where a worker records what it raised."""
    return folder / f"raised-{rank}"


def record_raise(folder: StoragePath, rank: int, error: Exception) -> bool:
    """Record what a worker raised, for `first_raise`; before its peers can notice that it is gone. Whether it could.

    As text: the folder may be on storage, and nothing is unpickled from there.
    """
    record = {
        "time_ns": time.time_ns(),
        "type": type(error).__name__,
        "message": str(error),
        "value_error": isinstance(error, ValueError),
        "storage": as_data(error) if isinstance(error, StorageError) else None,
        "traceback": without_secrets("".join(traceback.format_exception(error))),
    }
    try:
        write_json(raise_file(folder, rank), record)
    except OSError:  # a full disk must not hide the error
        return False
    return True


def first_raise(folder: StoragePath) -> Exception | None:
    """What was raised first, with the worker's traceback as its cause; None when nothing was recorded.

    It has the name and the words of the worker's error, and is a ValueError where that was one. The workers that waited
    for that one raise too, and say nothing of the cause.
    """
    names = [name for name in names_in(folder) if name.startswith("raised-")]
    found = [record for name in names if isinstance(record := read_json(folder / name), dict)]
    if not found:
        return None
    first = min(found, key=lambda record: int(record["time_ns"]))
    if first["storage"] is not None:
        error: Exception = StorageError(*first["storage"])
    else:
        kind: type[Exception] = ValueError if first["value_error"] else RuntimeError
        if first["type"] != kind.__name__:
            kind = type(str(first["type"]), (kind,), {"__module__": "ppc.worker"})
        error = kind(str(first["message"]))
    error.__cause__ = RuntimeError(f"in a worker:\n{first['traceback']}")
    return error
