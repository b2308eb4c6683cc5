"""Run what a study misses, and say how it stands. Decides nothing about numbers."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ppc import changes, local_study
from ppc.artifacts import Storage, StudyDir, now_ms, read_json, write_json
from ppc.definition import as_today, next_round_of, save
from ppc.faults import StorageError
from ppc.gallery import draw_study
from ppc.ledger import FINISHED, HEARTBEAT_S, KILLED, RUNNING, STOPPED, TrialRow, alive, counts, missing, read_rows
from ppc.live import LiveStatus
from ppc.locks import STALE_S, LockedError, locked
from ppc.mlflow_embedded import server_of_launch
from ppc.mlflow_server import is_server, tracking_uri
from ppc.mlflow_views import links
from ppc.notify import check_url, notifying
from ppc.places import StoragePath, is_remote
from ppc.processes import this_process
from ppc.redact import AS_IT_IS
from ppc.report import build_report, live_note, print_report, write_report
from ppc.stopping import must_run, no_effect
from ppc.study_config import EarlyStopping
from ppc.sync_loop import SyncLoop
from ppc.tracking import make_tracker

SETTLE_S = 20.0
FAULT_FLUSH_S = 5.0  # for a tracker whose files are on a storage that takes nothing


@dataclass(frozen=True)
class Where:
    """Where and how a launch runs; nothing of it changes a number."""

    local: bool = False  # without Ray: in this process, or several beside it
    address: str | None = None  # of a Ray cluster; None starts one on this machine
    num_cpus: int | None = None  # of the cluster that is started
    max_concurrent: int | None = None
    tracking: str | None = None  # MLflow URI, `none`, or None for the storage's own
    ui: bool = False  # beside a launch that tracks into the storage's own, serve it
    notify: str | None = None  # web address that is told of the first failure and of the end


@contextmanager
def launch_lock(folder: StudyDir) -> Iterator[None]:
    """One launch of a study at a time. The lock of a dead launch is free at once in a file system, and within `STALE_S`
    in an object store, for which this waits."""
    holder = folder.path / "launch-holder.json"
    with ExitStack() as stack:
        try:
            # 1 s: whoever only looks whether the study is being run (`being_run`) holds it for a moment
            timeout_s = STALE_S + 5.0 if is_remote(folder.path) else 1.0
            stack.enter_context(locked(folder.launch_lock, timeout_s=timeout_s))
        except LockedError as error:
            raise _held(folder, read_json(holder) or {}) from error
        write_json(holder, {**this_process(), "since_ms": now_ms()})
        yield


def _held(folder: StudyDir, who: dict[str, Any]) -> ValueError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who.get("since_ms", 0) / 1000))
    return ValueError(
        f"study {folder.name} is being run by pid {who.get('pid', '?')} on {who.get('host', '?')} since {since}; "
        f"watch it with: ppc study status {folder.name} --watch --storage {folder.path.parents[1]}"
    )


def run_study(
    storage: Storage,
    name: str,
    where: Where,
    console: Console,
    definition: dict[str, Any] | None = None,
    *,
    runtime: Sequence[str] = (),
    stopped: bool = False,
    accept_changes: bool = False,
) -> int:
    """Run the missing trials of a study, then print its table. 0 when all trials have a result, or were stopped as the
    study asks for, else 1.

    With a definition that is saved first (a launch); without, the study is as it was saved (a resume), but for
    `runtime`: overrides (`runtime.workers=2`) of what is still to run. With `stopped` the trials that were stopped
    early are missing too, and run to the end. A resume of what has changed is refused with a diff, or with
    `accept_changes` recorded (`as_today`). SIGINT and SIGTERM end the trials and no more. So does storage that is full,
    read-only or does not answer, when a trial has met it.
    """
    check_url(where.notify)
    storage.check_writable()
    folder = storage.study(name)
    if definition is None:
        folder.definition()  # before the lock makes a folder of that name
    with _interruptible(), launch_lock(folder):
        differences = save(definition, storage) if definition else []
        study = folder.definition()
        rows = _settled(storage, study)
        todo = missing(rows, must_run(rows, study["baseline"]), stopped=stopped)
        saved = study
        study, keys = as_today(storage, saved, {row.key for row in todo}, runtime, accept=accept_changes)
        if study is not saved:
            write_json(folder.path / "study.json", study)
            rows = read_rows(storage, study)
            todo = [row for row in missing(rows, must_run(rows, study["baseline"]), stopped=stopped) if row.key in keys]
        if len(taken := study.get("changes", [])) > len(saved.get("changes", [])):
            differences = taken[-1]["what"]
        _say_plan(console, study, rows, todo, differences, where)
        launch_dir = folder.new_launch()
        tracker = make_tracker(where.tracking, storage, study, launch_dir.name)
        option = where.tracking if where.ui else "none"

        def say(text: str) -> None:
            console.print(text, **AS_IT_IS)

        server = server_of_launch(option, storage, name, say)
        told = notifying(where.notify, storage, study, say)  # at the end last of all: the report is there by then
        with told, server, SyncLoop(tracker, lambda: read_rows(storage, study), note=live_note(storage, study)) as loop:
            fault: OSError | None = _run_rounds(todo, storage, study, launch_dir, where, console)
            report = build_report(storage, name)
            files = list[StoragePath]()
            try:
                files = write_report(report, folder.path / "report", storage)
            except OSError as error:  # the table is printed all the same
                fault = fault or error
            if fault is None:
                files += _draw(storage, study, folder, console)
            loop.finish(files, flush_s=None if fault is None else FAULT_FLUSH_S)
    print_report(report, console)
    rows = read_rows(storage, study)
    _say_end(console, storage, study, rows, loop, files, where)
    if fault is not None:
        console.print(f"storage: {fault}", **AS_IT_IS)
    return 0 if fault is None and all(row.state in (FINISHED, STOPPED) for row in rows) else 1


def _draw(storage: Storage, study: dict[str, Any], folder: StudyDir, console: Console) -> list[StoragePath]:
    """The study's figures beside its report; what could not be drawn is told."""
    files, problems = draw_study(storage, study, read_rows(storage, study), folder.path / "report")
    for problem in problems:
        console.print(problem, **AS_IT_IS)
    return files


def _run_rounds(
    todo: list[TrialRow],
    storage: Storage,
    study: dict[str, Any],
    launch_dir: StoragePath,
    where: Where,
    console: Console,
) -> StorageError | None:
    """Run trials, and those of a search's next rounds; what of the storage ended it before."""
    while todo or (todo := next_round_of(storage, study, console)):
        ended, fault = False, None
        with LiveStatus(storage, study, console):
            try:
                _run(todo, storage, study, launch_dir, where)
                ended = True
            except KeyboardInterrupt:
                print("interrupted: trials stop; what they finished stays", flush=True)
            except StorageError as error:
                fault = error
        if fault is not None:  # each trial has tried to write its last word
            return fault
        _mark_killed(storage, todo)
        if not ended:
            return None
        todo = []
    return None


def _settled(storage: Storage, study: dict[str, Any]) -> list[TrialRow]:
    """The rows once the processes of a launch that was just killed are gone.

    We hold the study's lock: a trial that runs belongs to such processes, which their cluster ends within seconds, or
    to another study that shares it, and then it goes on. On another host only the heartbeat tells them apart: one that
    still beats after `SETTLE_S` is alive, and one that stopped is waited for until it counts as dead.
    """
    settled_ms = now_ms() + 1000 * SETTLE_S
    while True:
        rows = read_rows(storage, study)
        running = [storage.trial(row.key).state() for row in rows if row.state == RUNNING]
        if all(state.get("heartbeat_ms", 0) > settled_ms for state in running):
            return rows
        time.sleep(0.2)


def _run(todo: list[TrialRow], storage: Storage, study: dict[str, Any], launch_dir: StoragePath, where: Where) -> None:
    """Run trials; what one raises is in its error.json. StorageError when the storage kept one from going on."""
    limit = where.max_concurrent or study["max_concurrent"]
    if not where.local:
        from ppc.ray_study import cluster, run_rows  # ray is not needed for a local run

        with cluster(where.address, num_cpus=where.num_cpus):
            run_rows(todo, storage, launch_dir, max_concurrent=limit, early=_early(todo, storage, study))
        return
    local_study.run_rows(todo, storage, max_concurrent=limit or 1)


def _early(todo: list[TrialRow], storage: Storage, study: dict[str, Any]) -> Any:
    """The study's early stopping, or None; what was stopped before and is to run again is never stopped."""
    from ppc.ray_stopping import Early

    if not study.get("early_stopping"):
        return None
    never = frozenset(row.key for row in todo if row.state == STOPPED)
    return Early(
        EarlyStopping.model_validate(study["early_stopping"]),
        read_rows(storage, study),
        study["baseline"],
        never,
        changes.trained_otherwise(study),
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does, and SIGINT works even where the launch was started with SIGINT ignored, as a shell
    does with what it puts in the background: Ray's job stop sends that one. Afterwards all handlers are as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _mark_killed(storage: Storage, rows: list[TrialRow]) -> None:
    """The cluster of this launch is gone, or ends its trials: one of ours that still says RUNNING was killed.

    A process that lives for a moment more would write RUNNING again, so it is waited for.
    """
    deadline = time.monotonic() + 2 * HEARTBEAT_S  # after that a living one would have said so once more
    for row in rows:
        trial = storage.trial(row.key)
        while trial.result() is None and (state := trial.state()).get("state") == RUNNING:
            if state.get("attempt", 0) <= row.attempt:  # not ours
                break
            if alive(state) and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            trial.write_state(state=KILLED, ended_ms=now_ms())


def command() -> str:
    """How the user can call us: `ppc` in an activated environment, else its path."""
    found = shutil.which("ppc")
    beside = Path(sys.executable).parent / "ppc"
    if found is None and beside.exists():
        return os.path.relpath(beside)
    return "ppc"


def _say_plan(
    console: Console,
    study: dict[str, Any],
    rows: list[TrialRow],
    todo: list[TrialRow],
    differences: list[str],
    where: Where,
) -> None:
    if differences:
        text = "\n  ".join(["changed since the study was saved:", *differences])
        console.print(text, **AS_IT_IS)
    have = ", ".join(f"{n} {state.lower()}" for state, n in counts(rows).items())
    console.print(f"study {study['name']}: {len(rows)} trials ({have}); {len(todo)} to run", **AS_IT_IS)
    if text := no_effect(study, local=where.local):
        console.print(text, **AS_IT_IS)


def _say_end(
    console: Console,
    storage: Storage,
    study: dict[str, Any],
    rows: list[TrialRow],
    loop: SyncLoop,
    files: list[StoragePath],
    where: Where,
) -> None:
    for row in rows:
        if row.error:
            path = storage.trial(row.key).path / "error.json"
            console.print(f"traceback of {row.label}: {path}", **AS_IT_IS)
    flag, how = f" --storage {storage.root}", " --local" if where.local else ""
    how += f" --max-concurrent {where.max_concurrent}" if where.max_concurrent else ""
    if any(row.state not in (FINISHED, STOPPED) for row in rows):
        console.print(f"run what is missing: {command()} study resume {study['name']}{flag}{how}", **AS_IT_IS)
    if loop.problem:
        console.print(f"{loop.problem}\n  send it later: ppc sync {study['name']}{flag}", **AS_IT_IS)
    for path in files:
        if path.suffix in (".md", ".html"):
            console.print(f"report: {path}", **AS_IT_IS)
    uri = tracking_uri(where.tracking, storage)
    if uri != "none" and is_server(uri) and not loop.problem:
        for name, link in links(uri, storage, study["name"], uri).items():
            console.print(f"{name}: {link}", **AS_IT_IS)
    else:
        console.print(f"MLflow UI: {command()} ui {study['name']}{flag}", **AS_IT_IS)
