"""Where MLflow is: tracking URIs, the storage's own database, whether a server answers. Imports no mlflow."""

from __future__ import annotations

import http.client
import os
import re
import sqlite3
import ssl
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

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


def default_database(storage: Storage) -> Path:
    """The SQLite file of a storage."""
    return storage.here / "mlflow" / "mlflow.db"


def default_uri(storage: Storage) -> str:
    """A SQLite file of the storage, by its absolute path: the current folder never matters."""
    return f"sqlite:///{default_database(storage)}"


def artifact_place(storage: Storage, study_name: str) -> str:
    """URI of the folder where a database without a server has the artifacts of a study."""
    return (storage.here / "mlflow" / "artifacts" / study_name).as_uri()


def _open_database(path: Path, mode: str) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True, timeout=30.0))


def made_ms(database: Path) -> int | None:
    """When an MLflow database was made, unix ms: MLflow does that last. None when it is not there yet."""
    try:
        with _open_database(database, "ro") as connection:
            found = connection.execute("select creation_time from experiments where experiment_id = 0").fetchone()
    except sqlite3.Error:
        return None
    return None if found is None or found[0] is None else int(found[0])


def move_artifacts(storage: Storage) -> None:
    """Have the storage's own database look for artifacts where they are now: MLflow keeps absolute paths in it, and a
    storage can be moved. TrackingError when it is in use for long."""
    path = default_database(storage)
    if made_ms(path) is None:
        return
    try:
        with _open_database(path, "rw") as connection, connection:
            known = (
                "select experiment_id, name, artifact_location from experiments where artifact_location like 'file:%'"
            )
            for number, name, before in connection.execute(known).fetchall():
                place = artifact_place(storage, name.removeprefix("ppc/"))
                if name.startswith("ppc/") and before != place:
                    connection.execute(
                        "update runs set artifact_uri = ? || substr(artifact_uri, ?)"
                        " where experiment_id = ? and instr(artifact_uri, ?) = 1",
                        (place, len(before) + 1, number, before + "/"),
                    )
                    connection.execute(
                        "update experiments set artifact_location = ? where experiment_id = ?", (place, number)
                    )
    except sqlite3.Error as error:
        raise TrackingError(f"{path}: {error}") from error


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


def sent_to(storage: Storage, study_name: str, uri: str) -> dict[str, Any]:
    """What the tracker remembers of a study at a tracking URI; empty when nothing was sent there."""
    memory = read_json(storage.study(study_name).path / "tracking.json") or {}
    found: dict[str, Any] = memory.get(safe_uri(uri), {})
    if not found and uri == default_uri(storage):  # its own database, before the storage was moved
        own = (name for name in memory if name.startswith("sqlite:") and name.endswith("/mlflow/mlflow.db"))
        found = memory.get(next(own, ""), {})
    return found


def experiment_id(storage: Storage, study_name: str, uri: str) -> str | None:
    """Id of a study's experiment at a tracking URI; None when nothing was sent there."""
    found = sent_to(storage, study_name, uri).get("experiment")
    return None if found is None else str(found)


def words_of(error: BaseException, uri: str) -> str:
    """One line of an error that is fit for messages: without the URI's password."""
    lines = without_secrets(str(error).replace(uri, safe_uri(uri))).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def is_server(uri: str) -> bool:
    """Whether the URI is that of a server, which keeps artifacts itself, and not of a database."""
    return not re.match(r"(sqlite|postgres|mysql|mssql)", uri)


def _trusted() -> ssl.SSLContext:
    """The certificates that MLflow's client trusts, by the variables that it reads."""
    place = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or os.environ.get("REQUESTS_CA_BUNDLE")
    place = place or os.environ.get("CURL_CA_BUNDLE") or None
    folder = place is not None and Path(place).is_dir()
    context = ssl.create_default_context(cafile=None if folder else place, capath=place if folder else None)
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _get(url: str, page: str, timeout_s: float) -> bytes:
    """What a server answers at a page, asked with the login and the certificates of MLflow's client. OSError,
    HTTPException."""
    parts = urlsplit(url)
    user = unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    request = urllib.request.Request(f"{safe_uri(url).rstrip('/')}/{page}")
    if user:
        request.add_unredirected_header("Authorization", f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}")
    elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    own = parts.hostname in ("localhost", "127.0.0.1", "::1")  # a proxy knows nothing of this machine's ports
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})] if own else []
    if parts.scheme == "https":
        handlers.append(urllib.request.HTTPSHandler(context=_trusted()))
    with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as answer:
        return bytes(answer.read(100))


def probe(uri: str, timeout_s: float = 3.0) -> None:
    """TrackingError unless the server answers at /health; MLflow's own client would hang for minutes.

    A URI that is not http(s) always passes.
    """
    if not uri.startswith(("http://", "https://")):
        return
    address = safe_uri(uri)
    try:
        _get(uri, "health", timeout_s)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        if getattr(error, "code", None) in (401, 403):
            raise TrackingError(
                f"{address} wants a login, or another one: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            ) from error
        reason = getattr(error, "reason", None) or error
        raise TrackingError(f"no MLflow server answers at {address}: {reason}") from error


def server_version(url: str, timeout_s: float = 3.0) -> str | None:
    """The version of the MLflow server at an address, such as 3.17.2; None when it does not say.

    A login is that of the address, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.
    """
    try:
        found = _get(url, "version", timeout_s).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return None
    return found if re.fullmatch(r"[\w.+]+", found) else None
