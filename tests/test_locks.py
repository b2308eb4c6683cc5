"""Locks in a folder and in an S3 bucket: one holder, whatever becomes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from ppc import locks
from ppc.artifacts import write_json
from ppc.locks import Lease, LockedError, locked
from ppc.places import StoragePath, read_bytes, storage_path
from ppc.processes import this_process


def test_of_many_that_want_a_lock_one_at_a_time_has_it(place: StoragePath) -> None:
    inside, most, entered = [0], [0], [0]

    def enter() -> None:
        with locked(place / ".lock", poll_s=0.01):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            entered[0] += 1
            inside[0] -= 1

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most[0], entered[0]) == (1, 6)


def test_a_lock_that_is_held_is_not_waited_for_longer_than_told(place: StoragePath) -> None:
    waits: list[int] = []
    with locked(place / ".lock"):
        with pytest.raises(LockedError), locked(place / ".lock", timeout_s=0.3, waiting=lambda: waits.append(1)):
            raise AssertionError("two hold it")
    assert waits
    with locked(place / ".lock", timeout_s=0):
        pass


def wait_for(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


HOLD = """
import sys, time
from ppc.locks import locked
from ppc.places import storage_path
with locked(storage_path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_of_this_host_is_free(place: StoragePath) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout as out:
        assert out.readline() == "held\n"
        with pytest.raises(LockedError), locked(place / ".lock", timeout_s=0.2, poll_s=0.05):
            pass
        holder.kill()
        holder.wait()
    with locked(place / ".lock", timeout_s=5, poll_s=0.1):
        pass


def test_a_lease_of_another_host_is_taken_over_when_it_is_not_renewed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = storage_path(f"{bucket}/{uuid.uuid4().hex}/.lock")
    monkeypatch.setattr(locks, "STALE_S", 2.0)  # the renewing thread of a busy machine comes late
    monkeypatch.setattr(locks, "RENEW_S", 0.1)
    elsewhere = {"owner": "them", "host": "elsewhere", "pid": os.getpid(), "held": True}
    write_json(path, elsewhere)
    start = time.monotonic()
    with locked(path, timeout_s=20, poll_s=0.05):
        assert time.monotonic() - start >= 1.0, "the store's clock has whole seconds"
        held = json.loads(read_bytes(path))
        wait_for(lambda: json.loads(read_bytes(path))["beat"] != held["beat"], "it is renewed while it is held")
        with pytest.raises(LockedError), locked(path, timeout_s=3.0, poll_s=0.05):
            raise AssertionError("a lease that is renewed was taken over")


def test_a_lease_that_nobody_renews_is_stale_at_the_first_look(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = storage_path(f"{bucket}/{uuid.uuid4().hex}/.lock")
    monkeypatch.setattr(locks, "STALE_S", 3.0)
    write_json(path, {"owner": "them", "host": "elsewhere", "pid": os.getpid(), "held": True})
    with pytest.raises(LockedError), locked(path, timeout_s=0):
        raise AssertionError("it may be renewed yet")
    time.sleep(4.1)
    with locked(path, timeout_s=0):
        pass


@pytest.mark.parametrize(
    ("changes", "free"), [({}, True), ({"host": "elsewhere"}, False), ({"pid_space": "pid:[1]"}, False)]
)
def test_only_of_this_host_and_container_a_process_is_known_to_be_gone(
    changes: dict[str, str], free: bool, bucket: str
) -> None:
    path: Any = storage_path(f"{bucket}/{uuid.uuid4().hex}/.lock")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_json(path, {"owner": "them", **this_process(), "pid": ended.pid, "held": True, **changes})
    lease = Lease(path)
    assert lease.try_acquire() == free
    if free:
        lease.release()


def test_a_renewal_whose_answer_got_lost_is_no_loss_of_the_lease(bucket: str) -> None:
    path: Any = storage_path(f"{bucket}/{uuid.uuid4().hex}/.lock")
    lease = Lease(path)
    assert lease._put(IfNoneMatch="*")
    known = lease._version
    assert lease._put(IfMatch=known)
    lease._version = known  # that answer never came
    assert lease._put(IfMatch=lease._version) and lease._version == lease._get()[0] != known
    lease._version = known
    assert not Lease(path)._put(IfMatch=known), "another one has to wait"
    lease.release()
    assert Lease(path).try_acquire(), "it was given back, though its version was not known"


def test_a_lease_that_was_taken_over_is_not_taken_back_by_its_old_holder(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path: Any = storage_path(f"{bucket}/{uuid.uuid4().hex}/.lock")
    monkeypatch.setattr(locks, "RENEW_S", 0.1)
    with locked(path):
        successor = Lease(path)
        version, _ = successor._get()
        assert successor._put(IfMatch=version)
        time.sleep(0.5)
        mine = json.loads(read_bytes(path))
    assert json.loads(read_bytes(path)) == mine and mine["owner"] == successor._owner
    assert "taken over" in capsys.readouterr().out


def test_a_store_that_does_not_answer_for_a_while_is_told_once_and_asked_again(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path: Any = storage_path(f"{bucket}/{uuid.uuid4().hex}/.lock")
    monkeypatch.setattr(locks, "RENEW_S", 0.05)
    put, asked, silent = Lease._put, [0], [False]

    def may_be_silent(self: Lease, **how: Any) -> bool:
        if silent[0]:
            asked[0] += 1
            raise ConnectionError("no route")
        return put(self, **how)

    monkeypatch.setattr(Lease, "_put", may_be_silent)
    with locked(path):
        for times in (1, 2):
            silent[0] = True
            first = asked[0]
            wait_for(lambda first=first: asked[0] >= first + 3, "it is asked again")  # type: ignore[misc]
            silent[0] = False
            beat = json.loads(read_bytes(path))["beat"]
            wait_for(lambda beat=beat: json.loads(read_bytes(path))["beat"] != beat, "renewed")  # type: ignore[misc]
            said = capsys.readouterr().out
            assert said.count("not renewed: ConnectionError: no route") == 1, f"silence {times}: {said}"
    assert Lease(path).try_acquire(), "it was given back"
