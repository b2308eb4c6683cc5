"""Where work runs, behind two verbs: `train` a function on every worker, `map` a function over items.

Stages know this protocol alone. `LocalRuntime` needs no cluster; the Ray one is in `ray_runtime.py`. A training
function is called as `worker(payload, device)` with torch.distributed set up when there are several workers.
"""

from __future__ import annotations

import ctypes
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException, spawn

from ppc.config import RuntimeConfig

TrainWorker = Callable[[Any, torch.device], None]
MapFunction = Callable[[Any, Sequence[Any]], list[Any]]


class Runtime(Protocol):
    """What a stage may ask of the place it runs in."""

    def train(self, worker: TrainWorker, payload: Any, cfg: RuntimeConfig) -> None:
        """Call `worker(payload, device)` in `cfg.workers` processes; start dead ones again, at most
        `cfg.max_failures` times. Raises what the worker raised."""

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
        """`function(shared, chunk)` over chunks of the items; results in the order of the items.

        `done(n)` is called in the caller's process as items finish. `use_gpu` says that the function can use one.
        """


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
            except ProcessRaisedException as error:
                raise _first_raise(Path(folder)) or error from error
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
        done: Callable[[int], None],
        *,
        use_gpu: bool = False,
    ) -> list[Any]:
        """See `Runtime.map`."""
        parts = chunks(items, cfg.images_per_task)
        results: list[list[Any]] = [[] for _ in parts]
        finished = 0
        processes = min(self.map_processes, len(parts))
        if processes <= 1 or (use_gpu and torch.cuda.is_available()):
            prepare_process(1)
            for index, part in enumerate(parts):
                results[index] = function(shared, part)
                done(finished := finished + len(part))
        else:
            context = get_context("spawn")
            with ProcessPoolExecutor(processes, context, prepare_process, (1,)) as pool:
                futures = {pool.submit(function, shared, part): i for i, part in enumerate(parts)}
                try:
                    for future in as_completed(futures):
                        index = futures[future]
                        results[index] = future.result()
                        done(finished := finished + len(parts[index]))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        return [value for part in results for value in part]


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
        with suppress(Exception):  # what cannot be pickled is raised in the parent as torch's wrapper with its text
            blob = pickle.dumps(error)
            (Path(folder) / f"raised-{time.time_ns():020d}-{rank}").write_bytes(blob)
        raise
    finally:
        dist.destroy_process_group()


def _first_raise(folder: Path) -> Exception | None:
    """What was raised first: the workers that waited for that one raise too, and say nothing of the cause."""
    for path in sorted(folder.glob("raised-*")):
        with suppress(Exception):
            error: Exception = pickle.loads(path.read_bytes())
            return error
    return None
