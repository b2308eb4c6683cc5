"""Storage in a folder and in an S3 bucket: the same rules for files that grow, files that are whole, and locks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import BUCKET, free_port, s3_server

import ppc.places as places
from ppc.artifacts import Journal, Progress, Storage, read_journal, read_json, write_json
from ppc.places import (
    Lease,
    LockedError,
    StoragePath,
    atomic_write,
    is_remote,
    locked,
    names_in,
    read_bytes,
    read_from,
    remove_tree,
    size_of,
    storage_path,
)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch):
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    if request.param == "folder":
        return storage_path(tmp_path / "root")
    return storage_path(f"{request.getfixturevalue('bucket')}/{uuid.uuid4().hex}")


@pytest.mark.parametrize("bad", ["s3://", "gs://bucket/x", "file://relative", "http://host/x"])
def test_a_place_of_an_unknown_kind_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="expected a folder, file:///folder or s3://bucket/prefix"):
        storage_path(bad)


def test_places_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_path("x") == tmp_path / "x" and storage_path(f"file://{tmp_path}/x") == tmp_path / "x"
    assert str(storage_path("s3://bucket/a/b/")) == "s3://bucket/a/b" and is_remote(storage_path("s3://bucket/a"))


def test_a_file_is_there_whole_or_not_at_all(root: StoragePath) -> None:
    path = root / "deep" / "file.bin"
    with pytest.raises(RuntimeError), atomic_write(path) as handle:
        handle.write(b"half")
        raise RuntimeError
    assert size_of(path) is None and names_in(root / "deep") == [] and read_json(path) is None
    with atomic_write(path) as handle:
        handle.write(b"0123456789")
    assert (size_of(path), read_bytes(path), read_from(path, 7)) == (10, b"0123456789", b"789")
    assert read_from(path, 10) == read_from(path, 99) == read_from(root / "none", 0) == b""
    write_json(root / "deep" / "a.json", {"a": 1})
    assert read_json(root / "deep" / "a.json") == {"a": 1} and names_in(root / "deep") == ["a.json", "file.bin"]
    with pytest.raises(FileNotFoundError):
        read_bytes(root / "none")
    remove_tree(root / "deep")
    assert names_in(root / "deep") == [] and size_of(path) is None
    remove_tree(root / "deep")


def test_a_journal_is_read_while_it_grows_and_goes_on_after_a_kill(root: StoragePath) -> None:
    path = root / "journal.jsonl"
    journal, offset, seen = Journal(path), 0, []
    for step in range(1, 4):
        journal.write(step, {"a": float(step)})
        journal.flush()
        points, offset = read_journal(path, offset)
        seen += [point["step"] for point in points]
    assert seen == [1, 2, 3] and read_journal(path, offset) == ([], offset)
    with atomic_write(path) as handle:  # the killed writer's last line is torn; it never closed the file
        handle.write(b'{"t":1,"step":1,"m":{"a":1.0}}\n{"t":1,"st')
    again = Journal(path)
    assert again.last_step == 1
    for step in (1, 2):
        again.write(step, {"a": 10.0 * step})
    again.close()
    assert [(p["step"], p["m"]["a"]) for p in read_journal(path)[0]] == [(1, 1.0), (2, 20.0)]
    if isinstance(journal._file, places.FileAppender):
        journal.close()


def test_an_object_is_not_written_anew_at_every_point(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = storage_path(f"{bucket}/{uuid.uuid4().hex}/journal.jsonl")
    clock = [100.0]
    monkeypatch.setattr(places.time, "monotonic", lambda: clock[0])
    journal = Journal(path)
    journal.write(1, {"a": 1.0})
    assert size_of(path) is None
    clock[0] += places.REMOTE_EVERY_S
    journal.write(2, {"a": 2.0})
    assert [p["step"] for p in read_journal(path)[0]] == [1, 2]
    journal.write(3, {"a": 3.0})
    journal.close()
    assert [p["step"] for p in read_journal(path)[0]] == [1, 2, 3]


def test_progress_is_there_at_the_end(root: StoragePath) -> None:
    progress = Progress(root / "progress.json", total=3, unit="image")
    for done in range(1, 4):
        progress.update(done)
    found = read_json(root / "progress.json")
    assert found is not None and (found["done"], found["total"]) == (3, 3)


def test_of_many_that_want_a_lock_one_at_a_time_has_it(root: StoragePath) -> None:
    inside, most, entered = [0], [0], [0]

    def enter() -> None:
        with locked(root / ".lock", poll_s=0.01):
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


def test_a_lock_that_is_held_is_not_waited_for_longer_than_told(root: StoragePath) -> None:
    waits: list[int] = []
    with locked(root / ".lock"):
        with pytest.raises(LockedError), locked(root / ".lock", timeout_s=0.3, waiting=lambda: waits.append(1)):
            raise AssertionError("two hold it")
    assert waits
    with locked(root / ".lock", timeout_s=0):
        pass


HOLD = """
import sys, time
from ppc.places import locked, storage_path
with locked(storage_path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_of_this_host_is_free(root: StoragePath) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout as out:
        assert out.readline() == "held\n"
        with pytest.raises(LockedError), locked(root / ".lock", timeout_s=0.2, poll_s=0.05):
            pass
        holder.kill()
        holder.wait()
    with locked(root / ".lock", timeout_s=5, poll_s=0.1):
        pass


def test_a_lease_of_another_host_is_taken_over_when_it_is_not_renewed(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = storage_path(f"{bucket}/{uuid.uuid4().hex}/.lock")
    monkeypatch.setattr(places, "STALE_S", 0.6)
    monkeypatch.setattr(places, "RENEW_S", 0.1)
    elsewhere = {"owner": "them", "host": "elsewhere", "pid": os.getpid(), "held": True}
    write_json(path, elsewhere)
    start = time.monotonic()
    with locked(path, timeout_s=5, poll_s=0.05):
        assert time.monotonic() - start >= 0.6
        held = json.loads(read_bytes(path))
        time.sleep(0.5)
        assert json.loads(read_bytes(path))["beat"] != held["beat"], "it is renewed while it is held"
        with pytest.raises(LockedError), locked(path, timeout_s=1.5, poll_s=0.05):
            raise AssertionError("a lease that is renewed was taken over")


def test_a_lease_that_was_taken_over_is_not_taken_back_by_its_old_holder(
    bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path: Any = storage_path(f"{bucket}/{uuid.uuid4().hex}/.lock")
    monkeypatch.setattr(places, "RENEW_S", 0.1)
    with locked(path):
        successor = Lease(path)
        version, _ = successor._get()
        assert successor._put(IfMatch=version)
        time.sleep(0.5)
        mine = json.loads(read_bytes(path))
    assert json.loads(read_bytes(path)) == mine and mine["owner"] == successor._owner
    assert "taken over" in capsys.readouterr().out


def test_a_store_that_does_not_answer_or_has_no_such_bucket_is_one_clear_error(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="storage s3://no-such-bucket/x cannot be written"):
        Storage.at("s3://no-such-bucket/x").check_writable()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    try:
        path = storage_path(f"s3://{BUCKET}/x")
        with pytest.raises(ValueError, match=f"storage s3://{BUCKET}/x cannot be written"):
            Storage(path).check_writable()
        with pytest.raises(OSError) as caught:
            read_bytes(path / "y")
        assert caught.value.errno == errno.EIO
    finally:
        S3FileSystem.clear_instance_cache()
