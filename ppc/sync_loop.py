"""Telling a tracker of a study while it runs, from a thread that nothing waits for. Knows no MLflow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

from ppc.faults import storage_error
from ppc.ledger import TrialRow
from ppc.places import StoragePath
from ppc.redact import without_secrets

EVERY_S = 3.0
LONGEST_WAIT_S = 30.0
FLUSH_S = 60.0


class Tracker(Protocol):
    """Where trials are recorded. Any method may raise; nothing it does reaches a trial."""

    def sync(self, rows: Sequence[TrialRow], *, final: bool = False, note: str = "") -> None:
        """Send what is new. `final`: the launch has ended. `note`: Markdown that the study's page shows from now on."""

    def attach(self, paths: Sequence[StoragePath]) -> None:
        """Add files (the report, PNGs) to the record of the launch."""

    def close(self) -> None:
        """Let go of connections."""


class NoTracker:
    """Records nothing."""

    def sync(self, rows: Sequence[TrialRow], *, final: bool = False, note: str = "") -> None:
        """See `Tracker.sync`."""

    def attach(self, paths: Sequence[StoragePath]) -> None:
        """See `Tracker.attach`."""

    def close(self) -> None:
        """See `Tracker.close`."""


class SyncLoop:
    """Keeps a tracker up to date from a daemon thread. An error is said once, and what failed is tried again.

    As a context manager it starts at once, and sends what is left when the block ends (after an error: briefly; when
    the storage has not answered: it has nothing to send). `note` makes of the rows what the study's page says.
    """

    def __init__(
        self,
        tracker: Tracker,
        rows: Callable[[], Sequence[TrialRow]],
        *,
        note: Callable[[Sequence[TrialRow]], str] = lambda rows: "",
        every_s: float = EVERY_S,
        longest_wait_s: float = LONGEST_WAIT_S,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self._tracker, self._rows, self._note, self._say = tracker, rows, note, say
        self._every_s, self._longest_wait_s = every_s, longest_wait_s
        self._ending, self._ended = threading.Event(), False
        self._deadline = 0.0
        self._files: list[StoragePath] = []
        self._thread = threading.Thread(target=self._run, name="ppc-tracking", daemon=True)
        self.last_error: str | None = None  # of the last try; None when it succeeded
        self.problem: str | None = None  # after the end: what the tracker has not got

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def finish(self, files: Sequence[StoragePath] = (), *, flush_s: float | None = None) -> bool:
        """Send the rest and the files; True when all went. Returns within about `flush_s`, whatever the server does."""
        flush_s = FLUSH_S if flush_s is None else flush_s
        self._files, self._deadline = list(files), time.monotonic() + flush_s
        self._ending.set()
        self._thread.join(flush_s)
        if self._thread.is_alive() and self.last_error is None:
            self.last_error = f"no answer within {flush_s:.0f} s"
        if not self._ended:
            self.problem = f"the tracker has not got everything: {self.last_error}. The files have it all."
        return self.problem is None

    def _run(self) -> None:
        wait_s = 0.0
        while not self._ending.wait(wait_s):
            if self._try(self._send):
                wait_s = self._every_s
            else:
                wait_s = min(self._longest_wait_s, max(1.0, 2 * wait_s))
        while not self._try(self._send_last):
            if time.monotonic() + 1.0 > self._deadline:
                return
            time.sleep(1.0)
        self._ended = True

    def _send(self, final: bool = False) -> None:
        rows = self._rows()
        try:
            note = self._note(rows)
        except Exception:  # no table is no reason to send no trial; whoever makes the report says what is wrong
            note = ""
        self._tracker.sync(rows, final=final, note=note)

    def _send_last(self) -> None:
        self._send(final=True)
        self._tracker.attach(self._files)
        self._tracker.close()

    def _try(self, send: Callable[[], None]) -> bool:
        try:
            send()
        except Exception as error:  # the study goes on, whatever a tracker raises
            text = without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
            silent = self._ending.is_set() or storage_error(error) is not None  # trials say what storage does not do
            if self.last_error is None and not silent:
                self._say(f"tracking: {text}; the study goes on, and this is sent later")
            self.last_error = text
            return False
        if self.last_error is not None and not self._ending.is_set():
            self._say("tracking: works again")
        self.last_error = None
        return True

    def __enter__(self) -> SyncLoop:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ending.is_set():
            self.finish(flush_s=FLUSH_S if error is None else 10.0 if storage_error(error) is None else 1.0)
