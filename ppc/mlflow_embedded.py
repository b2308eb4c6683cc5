"""The MLflow server of a storage on this machine: found where one runs, else started, and ended with who started it.

It shows what is in the storage's SQLite file. The tracker writes to that file itself, so nothing waits for a server and
nothing is lost without one. Imports no mlflow.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

from ppc import tether
from ppc.artifacts import Storage, now_ms, read_json, write_json
from ppc.locks import LockedError, locked
from ppc.mlflow_server import (
    QUIET,
    TrackingError,
    default_database,
    default_uri,
    experiment_id,
    made_ms,
    move_artifacts,
    server_version,
)
from ppc.mlflow_views import study_link
from ppc.places import pause_s

PORT = 5000  # MLflow's own; another one when it is taken
START_S = 120.0
LAUNCH_NICENESS = 10  # it starts while trials start, and those come first
# A proxy knows nothing of this machine's ports.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EndedError(Exception):
    """Whoever wanted the server does not want it any more."""


def ui_command(storage: Storage, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Command line of the embedded server for a storage, and what it adds to the environment."""
    command = [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", default_uri(storage),
        "--artifacts-destination", str(storage.here / "mlflow" / "artifacts"),
        "--host", host, "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    return command, {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


# -- one that runs


def _note(storage: Storage) -> Path:
    """Where the server that runs for this storage on this host is written down."""
    return storage.here / "mlflow" / f"server-{socket.gethostname()}.json"


def serves(url: str, database: Path, timeout_s: float = 2.0) -> bool:
    """Whether an MLflow server answers there out of this very database: the time at which it was made tells."""
    expected = made_ms(database)
    try:
        with DIRECT.open(f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=timeout_s) as answer:
            found = json.loads(answer.read())["experiment"]["creation_time"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return False
    return expected is not None and int(found) == expected


def running(storage: Storage) -> tuple[str, str] | None:
    """(address, who started it: `ui` or `launch`) of the server that runs for a storage on this host, if one does."""
    note = read_json(_note(storage))
    if not isinstance(note, dict) or note.get("database") != default_uri(storage):  # a storage that was moved
        return None
    url = str(note.get("url"))
    there = url.startswith("http://") and serves(url, default_database(storage))
    return (url, str(note.get("by"))) if there else None


# -- one of our own


def free_port(host: str, port: int) -> bool:
    """Whether a server can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError:
            return False
    return True


def any_port(host: str) -> int:
    """A port on which nothing listens now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


class UiServer:
    """A running embedded server; leaving the `with` block, or the end of this process, ends it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path, note: Path) -> None:
        self.process, self.url, self.log, self._note = process, url, log, note

    def wait(self) -> int:
        """Wait until the server ends; its exit status."""
        return self.process.wait()

    def stop(self) -> None:
        """End the server and its worker: what it is tied to is let go."""
        note = read_json(self._note)
        if isinstance(note, dict) and note.get("pid") == self.process.pid:
            self._note.unlink(missing_ok=True)
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(tether.PATIENCE_S + 10.0)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> UiServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_ui(
    storage: Storage,
    host: str = "127.0.0.1",
    port: int | None = None,
    *,
    by: str = "ui",
    niceness: int = 0,
    ending: threading.Event | None = None,
) -> UiServer:
    """Start the embedded server and wait until it answers. Without a port it is 5000, or a free one.

    ValueError when the port is taken; TrackingError with the end of its log when it does not come up; EndedError when
    `ending` is set before.
    """
    if port is None:
        port = PORT if free_port(host, PORT) else any_port(host)
    elif not free_port(host, port):
        raise ValueError(f"{host}:{port} cannot be used: something listens there; choose another with --port")
    move_artifacts(storage)
    command, extra = ui_command(storage, host, port)
    log = storage.here / "mlflow" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    tied = [sys.executable, "-I", "-S", str(Path(tether.__file__).resolve()), str(niceness), *command]
    with log.open("ab") as handle:
        process = subprocess.Popen(
            tied, env={**os.environ, **extra}, stdin=subprocess.PIPE, stdout=handle, stderr=handle, cwd=log.parent,
            start_new_session=True,  # Ctrl-C is for us
        )  # fmt: skip
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    server = UiServer(process, f"http://{name}:{port}", log, _note(storage))
    try:
        _wait_until_healthy(server, ending or threading.Event())
        note = {"url": server.url, "database": default_uri(storage), "by": by, "pid": process.pid,
                "since_ms": now_ms()}  # fmt: skip
        write_json(_note(storage), note)
    except BaseException:
        server.stop()
        raise
    return server


def _wait_until_healthy(server: UiServer, ending: threading.Event) -> None:
    deadline = time.monotonic() + START_S
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            with DIRECT.open(f"{server.url}/health", timeout=2) as answer:
                answer.read()
                return
        except (OSError, http.client.HTTPException):
            if ending.wait(0.2):
                raise EndedError from None
    ended = server.process.poll()
    how = f"no answer in {START_S:.0f} s" if ended is None else f"it ended with status {ended}"
    lines = server.log.read_text(errors="replace").splitlines()[-5:]
    raise TrackingError("\n".join([f"the MLflow server did not start: {how}; its log {server.log} ends:", *lines]))


# -- of a launch


def server_of_launch(
    option: str | None, storage: Storage, study_name: str, say: Callable[[str], None]
) -> AbstractContextManager[object]:
    """The server that a launch offers while it works: only when the user named no tracker of his own."""
    if option is not None or os.environ.get("MLFLOW_TRACKING_URI"):
        return nullcontext()
    return LaunchServer(storage, study_name, say)


class LaunchServer:
    """Finds or starts the storage's server from a thread that nothing waits for, says its link once, ends it.

    It starts when the tracker has made the database, which two processes must not do at once. One that does not come
    up costs a line.
    """

    def __init__(self, storage: Storage, study_name: str, say: Callable[[str], None]) -> None:
        self._storage, self._study, self._say = storage, study_name, say
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ppc-mlflow-server", daemon=True)

    def _run(self) -> None:
        try:
            experiment = self._experiment()
            folder = self._storage.here / "mlflow"
            with locked(folder / ".server.lock", timeout_s=START_S, waiting=self._check):  # of two launches one starts
                found, server = running(self._storage), None
                if found is None:
                    server = start_ui(self._storage, by="launch", niceness=LAUNCH_NICENESS, ending=self._ending)
            url = found[0] if found else server.url if server else ""
            self._say(f"MLflow: {study_link(url, experiment, server_version(url))}")
            if server is not None:
                self._ending.wait()
                server.stop()
        except EndedError:
            return
        except (TrackingError, ValueError, OSError, LockedError, sqlite3.Error) as error:
            line = (str(error).splitlines() or [type(error).__name__])[0]
            self._say(f"no MLflow UI beside this launch: {line}; the study goes on, `ppc ui` starts one")

    def _experiment(self) -> str:
        """The study's experiment, once the tracker has made it."""
        uri, database = default_uri(self._storage), default_database(self._storage)
        while (found := experiment_id(self._storage, self._study, uri)) is None or made_ms(database) is None:
            if self._ending.wait(pause_s(self._storage.root)):
                raise EndedError
        return found

    def _check(self) -> None:
        if self._ending.is_set():
            raise EndedError

    def __enter__(self) -> LaunchServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(2 * tether.PATIENCE_S + 10.0)
