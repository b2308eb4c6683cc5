"""A study's missing trials on this machine without Ray: one after another here, or several processes at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from ppc.artifacts import Storage
from ppc.config import TrialConfig
from ppc.faults import StorageError, as_data, storage_error
from ppc.ledger import TrialRow
from ppc.processes import end_with_parent
from ppc.redact import without_secrets
from ppc.runtime import LocalRuntime, WorkerDiedError
from ppc.trial import record_failure, run_trial
from ppc.turns import Turns

ENDING = (signal.SIGINT, signal.SIGTERM)


def run_rows(rows: Sequence[TrialRow], storage: Storage, *, max_concurrent: int) -> None:
    """Run trials of the ledger; returns when each has a result or an error. An interrupt ends them all. StorageError
    when the storage kept one from going on: others would meet it too, and are not begun.

    At one a time they run in this process. Else each has a process of its own, and all share the first GPU where there
    is one: what a machine offers that has no Ray.
    """
    cpus = os.cpu_count() or 1
    if max_concurrent == 1:
        _run_here(rows, storage, cpus)
        return
    turns, context = Turns(rows, storage), get_context("spawn")
    share = max(1, cpus // max_concurrent)
    fault: StorageError | None = None
    running = dict[int, tuple[SpawnProcess, TrialRow, Connection]]()

    def fill_places() -> None:
        while len(running) < max_concurrent and (row := turns.take()) is not None:
            told, tell = context.Pipe(duplex=False)
            process = context.Process(target=_own_process, args=(row, storage, share, os.getpid(), tell))
            process.start()
            tell.close()
            running[process.sentinel] = (process, row, told)

    try:
        fill_places()
        while running:
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                process, row, told = running.pop(sentinel)
                process.join()
                turns.end(row.key)
                with told, suppress(EOFError):  # it had nothing to tell
                    fault = StorageError(*told.recv())
                if process.exitcode:
                    died = WorkerDiedError(f"the trial's process died (exit code {process.exitcode})")
                    record_failure(storage.trial(row.key), died, after=row.attempt)
            if fault is None:
                fill_places()
    finally:  # nothing of this launch works on when it is gone
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join()
    if fault is not None:
        raise fault


def _run_here(rows: Sequence[TrialRow], storage: Storage, cpus: int) -> None:
    for row in rows:
        if (fault := _run_row(row, storage, cpus)) is not None:
            raise fault


def _own_process(row: TrialRow, storage: Storage, cpus: int, parent: int, tell: Connection) -> None:
    for number in ENDING:
        signal.signal(number, _end_once)
    try:
        if end_with_parent(parent, signal.SIGTERM):
            if (fault := _run_row(row, storage, cpus)) is not None:
                tell.send(as_data(fault))
    except KeyboardInterrupt:
        pass  # recorded by the trial


def _end_once(number: int, frame: object) -> None:
    """End the trial, which records that. More signals follow the first: the launch's after the terminal's, and one for
    each thread of a launch that was killed; none may cut the recording short. They are taken and not ignored: of one
    that waits already when it is to be ignored Python prints a traceback."""
    for ending in ENDING:
        signal.signal(ending, lambda number, frame: None)
    raise KeyboardInterrupt


def _run_row(row: TrialRow, storage: Storage, cpus: int) -> StorageError | None:
    """What of the storage kept the trial from going on."""
    try:
        stages = [(s["name"], s["key"]) for s in row.stages]
        run_trial(TrialConfig.model_validate(row.config), row.key, stages, storage, LocalRuntime(map_processes=cpus))
    except Exception as error:  # recorded in the trial's error.json; the others go on
        if (fault := storage_error(error)) is not None:  # told by the launch
            return fault
        print(without_secrets(f"{row.label}: {type(error).__name__}: {error}"), flush=True)
    return None
