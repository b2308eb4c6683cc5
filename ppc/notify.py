"""One JSON message to a web address when a trial of a launch first fails, and one when its study ends.

The study neither waits for an answer nor fails without one. An address may itself be a secret (a login, the path of a
chat's webhook): of it only scheme and host are ever printed.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from types import TracebackType
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ppc.artifacts import Storage
from ppc.gallery import best_variant
from ppc.ledger import FAILED, FINISHED, INTERRUPTED, RUNNING, STOPPED, TrialRow, counts, read_rows
from ppc.places import pause_s
from ppc.redact import without_secrets
from ppc.report import generated, number, one_line

TIMEOUT_S = 5.0  # of a connection and of an answer
LAST_WAIT_S = 8.0  # at the end, in all: the process ends then, and what was not sent by then is lost
EVERY_S = 2.0


def check_url(url: str | None) -> str | None:
    """The address as given, None for none; ValueError when it is not http:// or https:// with a host."""
    if not url:
        return None
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or any(letter.isspace() for letter in url):
        raise ValueError("--notify (PPC_NOTIFY): pass an address http://... or https://... that takes a POST of JSON")
    return url


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"


class _NoRedirect(HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive as a GET without its message, and take the login along."""

    def redirect_request(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


def post(url: str, message: dict[str, Any], *, timeout_s: float = TIMEOUT_S) -> None:
    """Send one message. OSError when it was not taken."""
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json", "User-Agent": "ppc"}
    if "@" in parts.netloc:
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
    request = Request(bare, json.dumps(message).encode(), headers, method="POST")
    with build_opener(_NoRedirect).open(request, timeout=timeout_s):
        pass


def message_of(study: dict[str, Any], rows: Sequence[TrialRow], state: str, first: str) -> dict[str, Any]:
    """What is sent; the mean of `best` is in its own unit, an IoU in [0, 1], and in the `message` alone in per cent."""
    metric, best, words = study["metric"], None, ""
    if (variant := best_variant(study, rows)) is not None:
        values = [value for row in rows if row.variant == variant and (value := row.metric(metric)) is not None]
        best = {"variant": variant, "metric": metric, "mean": fmean(values), "seeds": len(values)}
        words = f"; best so far {variant}: {metric} {number(fmean(values), metric)}, mean of {len(values)} seed(s)"
    named = f"study {study['name']}{' (generated data)' if generated(study) else ''}"
    trials = ", ".join(f"{n} {word.lower()}" for word, n in counts(list(rows)).items()) or "no trial could be read"
    text = without_secrets(f"{named}: {first}; {trials}{words}")
    return {"study": study["name"], "state": state, "counts": counts(list(rows)), "best": best, "message": text}


class Notifier:
    """Watches a launch from a thread of its own while its block runs."""

    def __init__(
        self, url: str, storage: Storage, study: dict[str, Any], say: Callable[[str], None], *, every_s: float = EVERY_S
    ) -> None:
        self._url, self._storage, self._study, self._say = url, storage, study, say
        self._every_s = max(every_s, pause_s(storage.root))
        self._ending, self._told, self._failed = threading.Event(), False, False
        self._error = ""  # that ended the block
        self._before = {(row.key, row.attempt) for row in self._rows() if row.state == FAILED}
        self._thread = threading.Thread(target=self._run, name="ppc-notify", daemon=True)

    def _rows(self) -> list[TrialRow]:
        try:
            return read_rows(self._storage, self._study)
        except OSError:  # trials say so
            return []

    def _run(self) -> None:
        try:
            while not self._ending.wait(self._every_s) and not self._failed:
                self._look(self._rows())
            self._ending.wait()
            rows = self._rows()
            self._look(rows)
            self._send(rows, *self._end(rows))
        except Exception as error:  # whatever is wrong here, the study goes on
            self._tell(type(error).__name__)

    def _look(self, rows: Sequence[TrialRow]) -> None:
        """Send the first failure of this launch, once."""
        fresh = [row for row in rows if row.state == FAILED and (row.key, row.attempt) not in self._before]
        if self._failed or not fresh:
            return
        self._failed = True
        self._send(rows, RUNNING, f"trial {fresh[0].label} failed: {one_line(fresh[0].error or {})}")

    def _end(self, rows: Sequence[TrialRow]) -> tuple[str, str]:
        if rows and not self._error and all(row.state in (FINISHED, STOPPED) for row in rows):
            return FINISHED, "ended"
        state = FAILED if self._error or any(row.state == FAILED for row in rows) else INTERRUPTED
        resume = f"ppc study resume {self._study['name']} --storage {self._storage.root}"
        return state, f"ended{self._error}; run what is missing: {resume}"

    def _send(self, rows: Sequence[TrialRow], state: str, first: str) -> None:
        try:
            post(self._url, message_of(self._study, rows, state, first))
        except HTTPError as error:
            self._tell(f"it answers {error.code}")
            error.close()
        except URLError as error:
            self._tell(str(error.reason))
        except OSError as error:
            self._tell(str(error) or type(error).__name__)

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._say(without_secrets(f"notify: {_shown(self._url)} did not take the message: {text}"))

    def __enter__(self) -> Notifier:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._error = "" if kind is None else f" by {kind.__name__}"
        self._ending.set()
        self._thread.join(LAST_WAIT_S)
        if self._thread.is_alive():
            self._tell(f"no answer within {LAST_WAIT_S:.0f} s")


def notifying(
    url: str | None, storage: Storage, study: dict[str, Any], say: Callable[[str], None]
) -> AbstractContextManager[Any]:
    """A block that is told of to an address; nothing for None."""
    return nullcontext() if url is None else Notifier(url, storage, study, say)
