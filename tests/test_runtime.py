"""LocalRuntime: work in this process or in several, results in order, errors as they were raised."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from ppc.config import RuntimeConfig
from ppc.runtime import LocalRuntime, chunks, first_raise, prepare_process, raise_file, record_raise
from ppc.train import gather, sum_over_workers


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class OddError(ValueError):
    """An error of our own, with two arguments."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, what)

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


def squares(shared: int, part: Sequence[int], device: torch.device) -> Any:
    return sum(shared * x * x for x in part), len(part), os.getpid(), str(device)


def raise_at_7(shared: int, part: Sequence[int], device: torch.device) -> list[Any]:
    if 7 in part:
        raise OddError("item 7", "is odd")
    return list(part)


def test_chunks_keep_the_order() -> None:
    assert chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert chunks([], 2) == []


def test_threads_are_those_of_the_cpus_and_at_least_one() -> None:
    for cpus, threads in ((0.5, 1), (1, 1), (2, 2)):
        prepare_process(cpus)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("processes", [1, 2])
def test_map_hands_over_each_result_once_as_it_comes(processes: int) -> None:
    dones: list[int] = []
    results: list[Any] = []

    def take(done: int, result: Any) -> None:
        dones.append(done)
        results.append(result)

    cfg = RuntimeConfig(images_per_task=3)
    LocalRuntime(processes).map(squares, 10, list(range(8)), cfg, take)
    assert sorted(value for value, *_ in results) == [50, 500, 850]
    assert [sum(size for _, size, *_ in results[: i + 1]) for i in range(3)] == dones and dones[-1] == 8
    assert ({pid for *_, pid, _ in results} == {os.getpid()}) == (processes == 1)
    assert {device for *_, device in results} == {"cpu"}
    LocalRuntime(processes).map(squares, 1, [], cfg, take)
    assert len(dones) == 3


@pytest.mark.parametrize(("use_gpu", "device"), [(True, "cuda:0"), (False, "cpu")])
def test_map_hands_out_the_device(use_gpu: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found: list[Any] = []
    cfg = RuntimeConfig()
    LocalRuntime().map(squares, 1, [1], cfg, lambda done, result: found.append(result[-1]), use_gpu=use_gpu)
    assert found == [device]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_map_raises_what_its_function_raised(processes: int) -> None:
    with pytest.raises(OddError, match="item 7: is odd"):
        LocalRuntime(processes).map(raise_at_7, 0, list(range(8)), RuntimeConfig(images_per_task=3), lambda *_: None)


def note_rank(payload: Path, device: torch.device) -> None:
    rank = dist.get_rank()
    total = torch.tensor([float(rank + 1)])
    sum_over_workers([total])
    ranks, flags = gather(torch.tensor([[rank, 10 * rank]])), gather(torch.tensor([rank == 1]))
    text = f"{device} {dist.get_backend()} {total.item()} {ranks.tolist()} {flags.tolist()} {torch.get_num_threads()}"
    (payload / str(rank)).write_text(text)


def raise_in_one(payload: int, device: torch.device) -> None:
    if dist.get_rank() == payload:
        raise OddError("step 3", "is not finite")
    dist.barrier()  # the others wait for it, and fail for another reason


def hang(payload: Path, device: torch.device) -> None:
    (payload / str(os.getpid())).touch()
    time.sleep(120)


@pytest.mark.slow
def test_workers_talk_to_each_other(tmp_path: Path) -> None:
    LocalRuntime().train(note_rank, tmp_path, RuntimeConfig(workers=2))
    texts = {(tmp_path / str(rank)).read_text() for rank in range(2)}
    assert texts == {"cpu gloo 3.0 [[0, 0], [1, 10]] [False, True] 1"}


def test_one_worker_runs_here() -> None:
    here = []
    LocalRuntime().train(lambda payload, device: here.append((payload, device, os.getpid())), "p", RuntimeConfig())
    assert here[0][0] == "p" and here[0][2] == os.getpid() and not dist.is_initialized()


def test_what_a_worker_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="^step 3: is not finite$") as caught:
        LocalRuntime().train(raise_in_one, 1, RuntimeConfig(workers=2))
    assert type(caught.value).__name__ == "OddError"
    assert "raise_in_one" in str(caught.value.__cause__), "with the traceback of the worker"


def test_the_first_raise_counts_and_keeps_name_kind_and_words(tmp_path: Path) -> None:
    assert first_raise(tmp_path) is None
    for rank, error in ((1, OddError("step 3", "is not finite")), (0, RuntimeError("connection closed by peer"))):
        record_raise(tmp_path, rank, error)
    first = first_raise(tmp_path)
    assert (type(first).__name__, str(first), isinstance(first, ValueError)) == (
        "OddError", "step 3: is not finite", True,
    )  # fmt: skip
    raise_file(tmp_path, 1).unlink()
    second = first_raise(tmp_path)
    assert type(second) is RuntimeError and str(second) == "connection closed by peer"
    record_raise(tmp_path, 0, torch.OutOfMemoryError("tried to allocate 2 GiB"))
    third = first_raise(tmp_path)
    assert type(third).__name__ == "OutOfMemoryError" and not isinstance(third, ValueError)
    raise_file(tmp_path, 0).write_bytes(b"torn")
    assert first_raise(tmp_path) is None


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_where_a_worker_records_its_raise_is_not_run(tmp_path: Path) -> None:
    raise_file(tmp_path, 0).write_bytes(pickle.dumps((0, Trap(tmp_path / "ran"), "")))
    assert first_raise(tmp_path) is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_an_interrupt_ends_the_workers(tmp_path: Path) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    over, thread = threading.Event(), threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            LocalRuntime().train(hang, tmp_path, RuntimeConfig(workers=2))
    finally:
        over.set()
        thread.join()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# -- what is left of a process that was killed


def sleep_long(shared: Path, part: Sequence[int], device: torch.device) -> None:
    (shared / str(os.getpid())).touch()
    time.sleep(600)


def map_and_sleep(folder: Path) -> None:
    cfg = RuntimeConfig(images_per_task=1)
    LocalRuntime(map_processes=2).map(sleep_long, folder, [1, 2], cfg, lambda done, result: None)


def test_a_process_that_is_killed_leaves_none_of_its_pool(tmp_path: Path) -> None:
    process = get_context("spawn").Process(target=map_and_sleep, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 120
    while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.1)
    process.kill()
    process.join()
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "the pool works on for nobody"
        time.sleep(0.1)
