"""A real S3 API on loopback, for tests of storage; its own process, as any server is."""

from __future__ import annotations

import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

BUCKET = "ppc-tests"
KEYS = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a server with an empty bucket, point this process and its children at it; its address."""
    from s3fs import S3FileSystem

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": address}.items():
        patch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    S3FileSystem.clear_instance_cache()  # s3fs keeps connections by their arguments, and the address is none of them
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                request = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
                with urllib.request.urlopen(request, timeout=5) as answer:
                    answer.read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()
        S3FileSystem.clear_instance_cache()


class Gate(socketserver.ThreadingTCPServer):
    """The way to a server, which can be shut: then each request gets one fixed answer, or a closed connection."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        host, _, port = server.rpartition("/")[2].partition(":")
        self.target, self.answer = (host, int(port)), None
        self.passing: set[socket.socket] = set()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def shut(self, status: str = "", code: str = "") -> None:
        """Answer with an HTTP status and an S3 error code from now on; without, with a closed connection."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{status}</Message></Error>".encode()
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        self.answer = head + body if status else b""
        for connection in list(self.passing):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        """Let all through again."""
        self.answer = None


class _Passing(socketserver.BaseRequestHandler):
    server: Gate

    def handle(self) -> None:
        if self.server.answer is not None:
            self.request.recv(1 << 16)
            self.request.sendall(self.server.answer)
            return
        with socket.create_connection(self.server.target) as onward:
            self.server.passing |= {self.request, onward}
            back = threading.Thread(target=_pump, args=(onward, self.request), daemon=True)
            back.start()
            _pump(self.request, onward)
            back.join()
            self.server.passing -= {self.request, onward}


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
