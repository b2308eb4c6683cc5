"""What --notify posts, to a server on loopback; and that a launch neither waits for it nor fails by it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fake_study import FakeStudy
from typer.testing import CliRunner

import ppc.notify
from ppc.cli import app
from ppc.notify import Notifier, check_url, notifying


class Hook:
    """A server that keeps what it is sent, and answers `status`, after `wait_s`."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.logins: list[str | None] = []
        self.paths: list[str] = []
        self.status, self.wait_s = 200, 0.0
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                body = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(hook.wait_s)
                hook.got.append(json.loads(body))
                hook.logins.append(self.headers.get("Authorization"))
                hook.paths.append(self.path)
                self.send_response(hook.status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()

            do_GET = do_POST  # noqa: N815

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def url(self, login: str = "") -> str:
        return f"http://{login}{self.address}/hook/T0K3N"


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    yield hook
    hook.server.shutdown()
    hook.thread.join()
    hook.server.server_close()


def until(done: Any) -> None:
    deadline = time.monotonic() + 10
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert done()


def watch(fake: FakeStudy, url: str, said: list[str]) -> Notifier:
    return Notifier(url, fake.storage, fake.study, said.append, every_s=0.05)


def test_the_first_failure_at_once_and_the_end_once(tmp_path: Path, hook: Hook) -> None:
    fake, said = FakeStudy(tmp_path), list[str]()
    fake.finish(0, 0.4)
    with watch(fake, hook.url(), said):
        fake.start(1)
        fake.fail(1)
        until(lambda: hook.got)
        fake.start(2)
        fake.fail(2)
        fake.finish(3, 0.5)
    first, end = hook.got
    assert set(first) == {"study", "state", "counts", "best", "message"}
    assert (first["study"], first["state"], first["counts"]["FAILED"]) == ("demo", "RUNNING", 1)
    assert "prototype_top_k=0 s=1 failed: RuntimeError in train_cam: no memory left" in first["message"]
    assert (end["state"], end["counts"]) == ("FAILED", {"FINISHED": 2, "FAILED": 2})
    assert end["best"] == {"variant": "prototype_top_k=4", "metric": "mask_miou_train", "mean": 0.5, "seeds": 1}
    assert "(generated data)" in end["message"] and "ppc study resume demo" in end["message"]
    assert not said


def test_old_failures_are_no_news_and_a_whole_study_is_finished(tmp_path: Path, hook: Hook) -> None:
    fake = FakeStudy(tmp_path, seeds=(0,))
    fake.start(0)
    fake.fail(0)
    with watch(fake, hook.url(), []):
        time.sleep(0.3)
        for index in (0, 1):
            fake.finish(index, 0.4)
    (end,) = hook.got
    assert (end["state"], end["counts"]) == ("FINISHED", {"FINISHED": 2})


def test_a_login_becomes_a_header_and_nothing_of_an_address_is_printed(tmp_path: Path, hook: Hook) -> None:
    hook.status, said = 500, list[str]()
    fake = FakeStudy(tmp_path)
    fake.start(0)
    with watch(fake, hook.url("me:pass%20word@"), said):
        fake.fail(0)
    assert set(hook.logins) == {"Basic bWU6cGFzcyB3b3Jk"} and hook.paths == ["/hook/T0K3N"] * 2
    assert said == ["notify: http://127.0.0.1 did not take the message: it answers 500"], "told once"


def test_a_redirect_is_not_followed(tmp_path: Path, hook: Hook) -> None:
    hook.status, said = 302, list[str]()
    with watch(FakeStudy(tmp_path), hook.url("me:word@"), said):
        pass
    assert hook.paths == ["/hook/T0K3N"] and said[0].endswith("it answers 302")


def test_a_slow_server_and_none_at_all_delay_nothing(
    tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.wait_s, said = 4.0, list[str]()
    monkeypatch.setattr(ppc.notify, "LAST_WAIT_S", 0.3)
    fake = FakeStudy(tmp_path)
    started = time.monotonic()
    with watch(fake, hook.url(), said):
        assert time.monotonic() - started < 2
    assert time.monotonic() - started < 3.5 and "did not take the message" in said[0]
    monkeypatch.setattr(ppc.notify, "LAST_WAIT_S", 8.0)
    said.clear()
    with watch(fake, "http://127.0.0.1:9/x", said):  # the port of `discard`, where nobody listens
        pass
    assert len(said) == 1 and "refused" in said[0]
    until(lambda: hook.got)


def test_an_error_of_the_launch_is_an_end_too(tmp_path: Path, hook: Hook) -> None:
    with pytest.raises(KeyError), watch(FakeStudy(tmp_path), hook.url(), []):
        raise KeyError("x")
    assert hook.got[0]["state"] == "FAILED" and "ended by KeyError" in hook.got[0]["message"]


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/x", "host/x", "http:///x", "http://h:x/", "http://h /"]
)
def test_only_web_addresses(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PPC_NOTIFY") as told:
        check_url(url)
    assert url not in str(told.value)
    for words in (["study", "resume", "demo", "--notify", url], ["study", "launch", str(tmp_path), "--notify", url]):
        assert isinstance(CliRunner().invoke(app, words).exception, ValueError)


def test_a_launch_tells_of_its_end(tmp_path: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_study import QUIET, make_study

    import ppc.launch
    from ppc.artifacts import Storage

    storage = Storage(tmp_path)
    make_study(storage, k=[0], seeds=[0])
    monkeypatch.setattr(ppc.launch, "_run", lambda *args: None)  # nothing runs: the trial stays pending
    where = ppc.launch.Where(local=True, tracking="none", notify=hook.url())
    assert ppc.launch.run_study(storage, "k", where, QUIET) == 1
    assert [(one["state"], one["counts"]) for one in hook.got] == [("INTERRUPTED", {"PENDING": 1})]
    with notifying(None, storage, {}, print) as nothing:
        assert nothing is None


def test_a_job_is_not_sent_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    sent = []
    monkeypatch.setattr("ppc.cli.resume_there", lambda *words: sent.append(words) or typer.Exit(0))
    words = ["study", "resume", "demo", "--address", "http://head:8265"]
    done = CliRunner(env={"PPC_NOTIFY": "https://chat/T0K3N"}).invoke(app, words)
    assert done.exit_code == 0 and "environment of the cluster's nodes" in done.output
    assert "T0K3N" not in done.output + repr(sent) and sent
