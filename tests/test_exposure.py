"""What strangers can use: real sockets at loopback and beyond it, with a login and without."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ppc.artifacts import Storage
from ppc.cli import app
from ppc.exposure import (
    is_loopback,
    listeners,
    mlflow_exposures,
    open_to_others,
    own_addresses,
    ray_exposures,
    reached_at,
)

outside = pytest.mark.skipif(not own_addresses(), reason="this machine has no address but loopback")


@contextmanager
def server(host: str, status: int = 200, body: bytes = b"{}") -> Iterator[int]:
    """An HTTP server that says the same to everything; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *rest: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer((host, 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield httpd.server_port
        finally:
            httpd.shutdown()
            thread.join()


def mlflow_at(uri: str, tmp_path: Path) -> list[tuple[bool, str]]:
    return [tuple(found) for found in mlflow_exposures(Storage(tmp_path), {"MLFLOW_TRACKING_URI": uri})]


def test_names_and_addresses_of_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "localhost", "127.8.9.1", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.0.2.1", "no-such-host.invalid"]))
    assert open_to_others("127.0.0.1") is None and "no login" in (open_to_others("0.0.0.0") or "")


@outside
def test_sockets_are_seen_where_they_listen() -> None:
    with server("127.0.0.1") as inner, server("0.0.0.0") as outer, server(own_addresses()[0]) as one:
        ports = {listener.port: listener.address for listener in listeners()}
        assert [ports[inner], ports[outer], ports[one]] == ["127.0.0.1", "0.0.0.0", own_addresses()[0]]
        assert [reached_at(inner), reached_at(outer), reached_at(one)] == [[], own_addresses(), own_addresses()[:1]]


@outside
def test_mlflow_that_is_open_to_others_is_named(tmp_path: Path) -> None:
    with server("0.0.0.0") as port:
        for host in ("127.0.0.1", own_addresses()[0]):
            ((ok, text),) = mlflow_at(f"http://me:hunter2@{host}:{port}", tmp_path)
            assert not ok and "asks for no login" in text and "hunter2" not in text


@outside
@pytest.mark.parametrize(("status", "body"), [(401, b""), (403, b""), (200, b"<html>log in</html>")])
def test_mlflow_with_a_login_is_not(status: int, body: bytes, tmp_path: Path) -> None:
    with server("0.0.0.0", status, body) as port:
        for host in ("127.0.0.1", own_addresses()[0]):
            ((ok, text),) = mlflow_at(f"http://{host}:{port}", tmp_path)
            assert ok and "asks for a login" in text


def test_mlflow_at_loopback_is_not(tmp_path: Path) -> None:
    with server("127.0.0.1") as port:
        assert mlflow_at(f"http://localhost:{port}/", tmp_path) == [
            (True, f"MLflow on port {port}: listens at loopback only")
        ]
    assert mlflow_at("sqlite:////x.db", tmp_path) == []


@outside
def test_a_ray_job_server_that_is_open_to_others_is_named() -> None:
    with server("0.0.0.0", body=b'{"ray_version": "2"}') as outer, server("127.0.0.1") as inner:
        named = {"RAY_ADDRESS": f"http://127.0.0.1:{outer}", "PPC_ADDRESS": f"http://127.0.0.1:{inner}"}
        found = list(ray_exposures(named))[:2]
    assert [one.ok for one in found] == [False, True] and "RAY_AUTH_MODE=token" in found[0].text


DASHBOARD = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"ray_version": "2"}')
    def log_message(self, *rest): pass
server = http.server.ThreadingHTTPServer((sys.argv[1], 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@outside
def test_a_dashboard_that_runs_here_is_found_by_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "PPC_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "ray" / "dashboard" / "dashboard.py"
    script.parent.mkdir(parents=True)
    script.write_text(DASHBOARD)
    ports, processes = {}, []
    try:
        for host in ("0.0.0.0", "127.0.0.1"):
            process = subprocess.Popen([sys.executable, str(script), host], stdout=subprocess.PIPE, text=True)
            processes.append(process)
            assert process.stdout is not None
            ports[host] = int(process.stdout.readline())
        found = {one.text.split(":")[0]: one.ok for one in ray_exposures({})}
        said = CliRunner().invoke(app, ["doctor", "--storage", str(tmp_path)]).output
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert found[f"Ray dashboard on port {ports['127.0.0.1']}"] is True
    assert found["Ray dashboard at http"] is False
    (line,) = [line for line in said.splitlines() if f":{ports['0.0.0.0']}:" in line]
    assert line.startswith("WARNING") and "RAY_AUTH_MODE=token" in line


def test_ui_warns_before_it_serves_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*rest: object) -> None:
        raise ValueError("not started in this test")

    monkeypatch.setattr("ppc.mlflow_embedded.start_ui", refuse)
    said = {
        host: CliRunner().invoke(app, ["ui", "--storage", str(tmp_path), "--host", host]).output
        for host in ("127.0.0.1", "0.0.0.0")
    }
    assert "WARNING" not in said["127.0.0.1"] and said["0.0.0.0"].startswith("WARNING: the server at 0.0.0.0")
