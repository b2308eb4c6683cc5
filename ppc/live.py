"""How a study stands while it runs: a live table on a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live

from ppc.artifacts import Storage, now_ms
from ppc.costs import gpu_hours
from ppc.ledger import FAILED, FINISHED, RUNNING, STOPPED, TrialRow, read_rows
from ppc.places import is_remote, pause_s
from ppc.report import generated
from ppc.status import headline, status_lines, status_table

REFRESH_S = 1.0
PLAIN_EVERY_S = 20.0
AROUND_LINES = 8  # of a terminal, beside the trials: title, headings, frame, and errors that take a second line


def time_left_s(rows: list[TrialRow]) -> float | None:
    """Seconds until the last trial ends; None when nothing is known.

    A trial takes as long as the finished ones took; before any has, at least as long as its running stage says.
    """
    running = [row for row in rows if row.state == RUNNING]
    if not running:
        return None
    spent = {row.key: (now_ms() - (row.started_ms or now_ms())) / 1000 for row in running}
    stage_left = {row.key: float((row.progress or {}).get("left_s") or 0) for row in running}
    walls = [row.result["wall_s"] for row in rows if row.result and not row.reused]
    one_s = fmean(walls) if walls else max(spent[row.key] + stage_left[row.key] for row in running)
    if not walls and not any(stage_left.values()):
        return None
    waiting = sum(row.state not in (FINISHED, RUNNING, FAILED, STOPPED) for row in rows)
    here = [max(one_s - spent[row.key], stage_left[row.key]) for row in running]
    return max(max(here), (sum(here) + waiting * one_s) / len(running))


class _View:
    """A study on a console: a table that is drawn anew on a terminal, lines elsewhere, when something has changed."""

    def __init__(self, storage: Storage, study: dict[str, Any], console: Console) -> None:
        self._storage, self._study, self._console = storage, study, console
        self.refresh_s = max(REFRESH_S, pause_s(storage.root))
        self._live: Live | None = None
        self._last, self._said = 0.0, dict[str, Any]()

    def rows(self) -> list[TrialRow]:
        return read_rows(self._storage, self._study)

    def show(self, rows: list[TrialRow], spent: str = "") -> None:
        if self._live is not None:
            room = max(3, self._console.height - AROUND_LINES)
            title = self._headline(rows) + spent
            table = status_table(rows, title=title, generated=generated(self._study), max_rows=room)
            self._live.update(table, refresh=True)
            return
        states = {row.key: (row.state, row.stage, row.attempt) for row in rows}
        if states != self._said or time.monotonic() - self._last > PLAIN_EVERY_S:
            self._last, self._said = time.monotonic(), states
            lines = status_lines(rows, generated=generated(self._study))
            print(self._headline(rows) + spent, *(f"  {line}" for line in lines), sep="\n", flush=True)

    def _headline(self, rows: list[TrialRow]) -> str:
        return headline(self._study["name"], rows, gpu_hours(self._storage, rows), time_left_s(rows))

    def __enter__(self) -> _View:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def show(storage: Storage, study: dict[str, Any], console: Console) -> list[TrialRow]:
    """Print once how a study stands, all trials of it; its rows."""
    rows = read_rows(storage, study)
    title = headline(study["name"], rows, gpu_hours(storage, rows), time_left_s(rows))
    if console.is_terminal:
        console.print(status_table(rows, title=title, generated=generated(study)))
    else:
        lines = status_lines(rows, generated=generated(study))
        print(title, *(f"  {line}" for line in lines), sep="\n")
    return rows


def watch(storage: Storage, study: dict[str, Any], console: Console) -> list[TrialRow]:
    """Show a study until none of its trials is at work and no launch of it on this file system; the last rows."""
    with _View(storage, study, console) as view:
        while True:
            view.show(rows := view.rows())
            if not any(row.state == RUNNING for row in rows) and not _launched(storage, study["name"]):
                return rows
            time.sleep(view.refresh_s)
            study.update(storage.study(study["name"]).definition())  # a search goes on to its next round


def _launched(storage: Storage, name: str) -> bool:
    """Whether a launch is between two trials; an object store is not asked, and storage that is only read has none."""
    with suppress(OSError):
        return not is_remote(storage.root) and storage.study(name).being_run()
    return False


class LiveStatus:
    """Shows the rows of a study from a thread of its own until the block ends."""

    def __init__(self, storage: Storage, study: dict[str, Any], console: Console) -> None:
        self._view = _View(storage, study, console)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._start = time.monotonic()

    def _show(self) -> None:
        with self._view as view:
            while not self._stop.wait(view.refresh_s):
                with suppress(OSError):  # a store that does not answer: trials say so, and it may answer again
                    view.show(view.rows(), f"; {(time.monotonic() - self._start) / 60:.1f} min spent")

    def __enter__(self) -> LiveStatus:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
