"""Storage in a folder and in an S3 bucket: the same rules for files that grow and files that are whole."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
from s3_server import BUCKET, free_port

import ppc.places as places
from ppc.artifacts import Journal, Progress, Storage, read_journal, read_json, write_json
from ppc.places import (
    StoragePath,
    atomic_write,
    is_remote,
    names_in,
    read_bytes,
    read_from,
    remove_tree,
    size_of,
    storage_path,
)


@pytest.mark.parametrize("bad", ["s3://", "gs://bucket/x", "file://relative", "http://host/x"])
def test_a_place_of_an_unknown_kind_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="expected a folder, file:///folder or s3://bucket/prefix"):
        storage_path(bad)


def test_places_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage_path("x") == tmp_path / "x" and storage_path(f"file://{tmp_path}/x") == tmp_path / "x"
    assert str(storage_path("s3://bucket/a/b/")) == "s3://bucket/a/b" and is_remote(storage_path("s3://bucket/a"))


def test_a_file_is_there_whole_or_not_at_all(place: StoragePath) -> None:
    path = place / "deep" / "file.bin"
    with pytest.raises(RuntimeError), atomic_write(path) as handle:
        handle.write(b"half")
        raise RuntimeError
    assert size_of(path) is None and names_in(place / "deep") == [] and read_json(path) is None
    with atomic_write(path) as handle:
        handle.write(b"0123456789")
    assert (size_of(path), read_bytes(path), read_from(path, 7)) == (10, b"0123456789", b"789")
    assert read_from(path, 10) == read_from(path, 99) == read_from(place / "none", 0) == b""
    write_json(place / "deep" / "a.json", {"a": 1})
    assert read_json(place / "deep" / "a.json") == {"a": 1} and names_in(place / "deep") == ["a.json", "file.bin"]
    with pytest.raises(FileNotFoundError):
        read_bytes(place / "none")
    remove_tree(place / "deep")
    assert names_in(place / "deep") == [] and size_of(path) is None
    remove_tree(place / "deep")


def test_a_journal_is_read_while_it_grows_and_goes_on_after_a_kill(place: StoragePath) -> None:
    path = place / "journal.jsonl"
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


def test_a_file_that_is_written_anew_all_the_time_can_be_read_at_any_moment(place: StoragePath) -> None:
    path, stop = place / "state.json", threading.Event()
    write_json(path, {"n": 0})

    def write() -> None:
        n = 0
        while not stop.is_set():
            write_json(path, {"n": (n := n + 1)}, durable=False)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        deadline, seen = time.monotonic() + 60, set[int]()
        while len(seen) < 40 and time.monotonic() < deadline:
            found = read_json(path)
            assert found is not None
            seen.add(found["n"])
    finally:
        stop.set()
        writer.join()
    assert len(seen) >= 40


def test_a_file_that_shrinks_or_goes_while_it_is_read_has_no_more_to_give(
    place: StoragePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = place / "journal.jsonl", places.size_of
    with atomic_write(path) as handle:
        handle.write(b"0123456789")
    for now in (b"01", None):
        if now is None:
            path.unlink()
        else:
            with atomic_write(path) as handle:
                handle.write(now)
        answers = [10]  # of before
        monkeypatch.setattr(places, "size_of", lambda path, answers=answers: answers.pop() if answers else size(path))
        assert read_from(path, 5) == b"" and answers == []


def test_a_file_that_another_host_replaces_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, fails = tmp_path / "state.json", Path.read_bytes, [2]
    write_json(path, {"n": 1})

    def stale(self: Path) -> bytes:
        if fails[0]:
            fails[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", stale)
    monkeypatch.setattr(places, "REREAD_S", (0.01, 0.01))
    assert read_json(path) == {"n": 1}
    fails[0] = 3
    with pytest.raises(OSError, match="Stale file handle; mount it again"):
        read_json(path)


def test_progress_is_there_at_the_end(place: StoragePath) -> None:
    progress = Progress(place / "progress.json", total=3, unit="image")
    for done in range(1, 4):
        progress.update(done)
    found = read_json(place / "progress.json")
    assert found is not None and (found["done"], found["total"]) == (3, 3)


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


def test_text_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    code = "from ppc.places import *\nwith atomic_write(Path('t'), 'w') as file: file.write('\\xb1')"
    env = {**os.environ, "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "t").read_bytes() == "\xb1".encode()
