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
from rich.table import Table

from ppc.artifacts import Storage, now_ms
from ppc.ledger import FAILED, FINISHED, RUNNING, STOPPED, TrialRow, counts, read_rows
from ppc.places import pause_s
from ppc.report import generated
from ppc.status import status_lines, status_table

REFRESH_S = 1.0
PLAIN_EVERY_S = 20.0


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


class LiveStatus:
    """Shows the rows of a study from a thread of its own until the block ends."""

    def __init__(self, storage: Storage, study: dict[str, Any], console: Console) -> None:
        self._storage, self._study, self._console = storage, study, console
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self._start = time.monotonic()
        self._refresh_s = max(REFRESH_S, pause_s(storage.root))

    def _headline(self, rows: list[TrialRow]) -> str:
        spent_s = time.monotonic() - self._start
        left_s = time_left_s(rows)
        words = ", ".join(f"{n} {state.lower()}" for state, n in counts(rows).items())
        left = "?" if left_s is None else f"{left_s / 60:.1f} min"
        return f"{self._study['name']}: {words}; {spent_s / 60:.1f} min spent, about {left} left"

    def _table(self, rows: list[TrialRow]) -> Table:
        return status_table(rows, title=self._headline(rows), generated=generated(self._study))

    def _next_rows(self) -> list[TrialRow] | None:
        """The rows a while later; None at the end."""
        while not self._stop.wait(self._refresh_s):
            with suppress(OSError):  # a store that does not answer: trials say so, and it may answer again
                return read_rows(self._storage, self._study)
        return None

    def _show(self) -> None:
        if self._console.is_terminal:
            with Live(console=self._console, auto_refresh=False) as live:
                while (rows := self._next_rows()) is not None:
                    live.update(self._table(rows), refresh=True)
            return
        last = 0.0
        said: dict[str, str] = {}
        while (rows := self._next_rows()) is not None:
            states = {row.key: row.state for row in rows}
            if states != said or time.monotonic() - last > PLAIN_EVERY_S:
                last, said = time.monotonic(), states
                lines = status_lines(rows, generated=generated(self._study))
                print(self._headline(rows), *(f"  {line}" for line in lines), sep="\n", flush=True)

    def __enter__(self) -> LiveStatus:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
