"""Which of a launch's trials starts next where a place is free. Decides nothing about numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from ppc.artifacts import Storage
from ppc.ledger import TrialRow, stage_dirs


class Turns:
    """Hands out trials in their order, but passes over one that would only wait.

    Trials share stages: masks by CRF and by PSA are of one training. Of two that have to make the same stage next, the
    second waits for the first, in a place where a trial with a training of its own could be at work.
    """

    def __init__(self, rows: Sequence[TrialRow], storage: Storage) -> None:
        self._waiting, self._storage = list(rows), storage
        self._running: dict[str, TrialRow] = {}
        self._is_done: dict[str, bool] = {}  # of a stage's key, as it was seen for this choice or, once done, before

    def take(self) -> TrialRow | None:
        """The trial whose turn it is, which runs until its `end`; None when there is none left."""
        if not self._waiting:
            return None
        place = 0
        self._is_done = {key: True for key, done in self._is_done.items() if done}
        with suppress(OSError):  # storage that does not answer is the trials' to tell
            busy = {self._next_stage(row) for row in self._running.values()} - {None}
            place = next((i for i, row in enumerate(self._waiting) if self._next_stage(row) not in busy), 0)
        row = self._waiting.pop(place)
        self._running[row.key] = row
        return row

    def end(self, key: str) -> None:
        """That trial runs no more."""
        self._running.pop(key, None)

    def _next_stage(self, row: TrialRow) -> str | None:
        """Key of the first stage that is to be made."""
        for stage in stage_dirs(self._storage, row):
            if stage.key not in self._is_done:
                self._is_done[stage.key] = stage.manifest() is not None
            if not self._is_done[stage.key]:
                return stage.key
        return None
