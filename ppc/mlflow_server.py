"""Where MLflow is: tracking URIs, whether a server answers, and the embedded server with its UI. Imports no mlflow."""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from ppc.artifacts import Storage, read_json
from ppc.redact import safe_uri, without_secrets

DRIVERS = {
    "psycopg2": "psycopg2-binary", "psycopg": "psycopg[binary]", "pymysql": "pymysql", "mysqldb": "mysqlclient",
    "pyodbc": "pyodbc",
}  # fmt: skip
SUGGESTED = {"postgresql": "postgresql+psycopg2", "mysql": "mysql+pymysql", "mssql": "mssql+pyodbc"}
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


class TrackingError(Exception):
    """MLflow could not be told something now; it can be told later."""


def default_uri(storage: Storage) -> str:
    """A SQLite file of the storage, by its absolute path: the current folder never matters."""
    return f"sqlite:///{storage.here / 'mlflow' / 'mlflow.db'}"


def check_uri(uri: str) -> str:
    """The URI, made absolute; ValueError says what is wrong with it and what would be right."""
    if find_spec("mlflow") is None:
        raise ValueError("MLflow is not installed: pip install -e '.[mlflow]', or go without it by --tracking none")
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme in ("http", "https") or uri.partition(":")[0] == "databricks":
        return uri.rstrip("/")
    if scheme == "sqlite":
        name = uri.removeprefix("sqlite:///")
        if name in (uri, "", ":memory:"):
            raise ValueError(f"tracking URI {uri}: a SQLite file is named as sqlite:////absolute/path/mlflow.db")
        return f"sqlite:///{Path(name).expanduser().resolve()}"
    dialect, _, driver = scheme.partition("+")
    if dialect == "postgres":
        dialect = "postgresql"
    if dialect not in SUGGESTED:
        raise ValueError(f"tracking URI {safe_uri(uri)}: expected http(s)://, sqlite:/// or a database URI, or none")
    if not driver:
        # SQLAlchemy's own choice of a driver changed between versions, and MLflow does not install any
        raise ValueError(f"tracking URI {safe_uri(uri)}: name the driver, for instance {SUGGESTED[dialect]}://...")
    if find_spec(driver) is None:
        package = DRIVERS.get(driver, driver)
        raise ValueError(f"tracking URI {safe_uri(uri)}: its driver is not installed: pip install '{package}'")
    return uri


def tracking_uri(option: str | None, storage: Storage) -> str:
    """`--tracking`, else MLFLOW_TRACKING_URI, else the storage's own SQLite file; checked and absolute, or `none`."""
    uri = option or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(storage)
    return uri if uri == "none" else check_uri(uri)


def experiment_id(storage: Storage, study_name: str, uri: str) -> str | None:
    """Id of a study's experiment at a tracking URI; None when nothing was sent there."""
    memory = read_json(storage.study(study_name).path / "tracking.json") or {}
    found = memory.get(safe_uri(uri), {}).get("experiment")
    return None if found is None else str(found)


def words_of(error: BaseException, uri: str) -> str:
    """One line of an error that is fit for messages: without the URI's password."""
    lines = without_secrets(str(error).replace(uri, safe_uri(uri))).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def is_server(uri: str) -> bool:
    """Whether the URI is that of a server, which keeps artifacts itself, and not of a database."""
    return not re.match(r"(sqlite|postgres|mysql|mssql)", uri)


def probe(uri: str, timeout_s: float = 3.0) -> None:
    """TrackingError unless the server answers at /health; MLflow's own client would hang for minutes.

    A URI that is not http(s) always passes.
    """
    if not uri.startswith(("http://", "https://")):
        return
    address = safe_uri(uri)
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=timeout_s) as answer:
            answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise TrackingError(f"no MLflow server answers at {address}: {reason}") from error


# -- the embedded server


def ui_command(storage: Storage, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Command line of the embedded server for a storage, and what it adds to the environment."""
    folder = storage.here / "mlflow"
    command = [
        sys.executable, "-m", "mlflow", "server",
        "--backend-store-uri", default_uri(storage), "--artifacts-destination", str(folder / "artifacts"),
        "--host", host, "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    return command, {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def study_link(base_url: str, experiment: str | None) -> str:
    """Address of a study's runs in the UI; of the UI itself when the study has no experiment there."""
    if experiment is None:
        return base_url
    return f"{base_url.rstrip('/')}/#/experiments/{quote(experiment)}/runs?workflowType=machine_learning"


class UiServer:
    """A running embedded server; leaving the `with` block ends it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log

    def wait(self) -> int:
        """Wait until the server ends; its exit status."""
        return self.process.wait()

    def stop(self, wait_s: float = 15.0) -> None:
        """End the server and its worker."""
        self.process.terminate()  # it passes the signal on to its worker
        try:
            self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> UiServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_ui(storage: Storage, host: str = "127.0.0.1", port: int = 5000, *, wait_s: float = 120.0) -> UiServer:
    """Start the embedded server and wait until it answers.

    ValueError when the port is taken; TrackingError with the end of its log when it does not come up in `wait_s`.
    """
    with socket.socket() as probe_socket:
        probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe_socket.bind((host, port))
        except OSError as error:
            raise ValueError(f"{host}:{port} cannot be used: {error.strerror}; choose another with --port") from error
    command, extra = ui_command(storage, host, port)
    log = storage.here / "mlflow" / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as handle:
        process = subprocess.Popen(command, env={**os.environ, **extra}, stdout=handle, stderr=handle, cwd=log.parent)
    server = UiServer(process, f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}", log)
    try:
        _wait_until_healthy(server, wait_s)
    except BaseException:
        server.stop()
        raise
    return server


def _wait_until_healthy(server: UiServer, wait_s: float) -> None:
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # a proxy knows nothing of this machine's ports
    deadline = time.monotonic() + wait_s
    while server.process.poll() is None and time.monotonic() < deadline:
        try:
            with direct.open(f"{server.url}/health", timeout=2) as answer:
                answer.read()
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.2)
    ended = server.process.poll()
    how = f"no answer in {wait_s:.0f} s" if ended is None else f"it ended with status {ended}"
    lines = server.log.read_text(errors="replace").splitlines()[-5:]
    raise TrackingError("\n".join([f"the MLflow server did not start: {how}; its log {server.log} ends:", *lines]))
