"""A study's missing trials on this machine without Ray: one after another here, or several processes at a time."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

from ppc.artifacts import Storage
from ppc.config import TrialConfig
from ppc.ledger import TrialRow
from ppc.redact import without_secrets
from ppc.runtime import LocalRuntime, WorkerDiedError
from ppc.trial import record_failure, run_trial

PR_SET_PDEATHSIG = 1  # a name of Linux's prctl.h
ENDING = (signal.SIGINT, signal.SIGTERM)


def run_rows(rows: Sequence[TrialRow], storage: Storage, *, max_concurrent: int) -> None:
    """Run trials of the ledger; returns when each has a result or an error. An interrupt ends them all.

    At one a time they run in this process. Else each has a process of its own, and all share the first GPU where there
    is one: what a machine offers that has no Ray.
    """
    cpus = os.cpu_count() or 1
    if max_concurrent == 1:
        for row in rows:
            _run_row(row, storage, cpus)
        return
    waiting, running = list(reversed(rows)), dict[int, tuple[SpawnProcess, TrialRow]]()
    try:
        while waiting or running:
            while waiting and len(running) < max_concurrent:
                row = waiting.pop()
                share = max(1, cpus // max_concurrent)
                process = get_context("spawn").Process(target=_own_process, args=(row, storage, share, os.getpid()))
                process.start()
                running[process.sentinel] = (process, row)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, row = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    died = WorkerDiedError(f"the trial's process died (exit code {process.exitcode})")
                    record_failure(storage.trial(row.key), died)
    finally:  # nothing of this launch works on when it is gone
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _own_process(row: TrialRow, storage: Storage, cpus: int, parent: int) -> None:
    for number in ENDING:
        signal.signal(number, _end_once)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        if os.getppid() == parent:  # else it died before it could be told of
            _run_row(row, storage, cpus)
    except KeyboardInterrupt:
        pass  # recorded by the trial


def _end_once(number: int, frame: object) -> None:
    """End the trial, which records that. More signals follow the first: the launch's after the terminal's, and one for
    each thread of a launch that was killed; none may cut the recording short."""
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run_row(row: TrialRow, storage: Storage, cpus: int) -> None:
    try:
        stages = [(s["name"], s["key"]) for s in row.stages]
        run_trial(TrialConfig.model_validate(row.config), row.key, stages, storage, LocalRuntime(map_processes=cpus))
    except Exception as error:  # recorded in the trial's error.json; the others go on
        print(without_secrets(f"{row.label}: {type(error).__name__}: {error}"), flush=True)
