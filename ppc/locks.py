"""Locks on storage. Those of a folder are the kernel's; over an object store no kernel watches, so a lock there is a
lease that its holder renews."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from json import JSONDecodeError, dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ppc.places import StoragePath, told
from ppc.processes import is_gone, this_process

if TYPE_CHECKING:
    from upath import UPath

RENEW_S = 5.0
STALE_S = 45.0  # a lease that was not renewed for so long is taken over


class LockedError(Exception):
    """Somebody else holds a lock."""


@contextmanager
def locked(
    path: StoragePath,
    *,
    timeout_s: float | None = None,
    waiting: Callable[[], None] = lambda: None,
    poll_s: float = 1.0,
) -> Iterator[None]:
    """Hold a lock while the block runs; LockedError when that was not possible within `timeout_s` (None: wait on).

    A lock outlives its holder by nothing in a file system, whose kernel drops it, and by `STALE_S` in an object store.
    """
    lock = _KernelLock(path) if isinstance(path, Path) else Lease(path)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while not _try(lock, path):
        if deadline is not None and time.monotonic() >= deadline:
            raise LockedError(str(path))
        waiting()
        time.sleep(poll_s if deadline is None else max(0.0, min(poll_s, deadline - time.monotonic())))
    try:
        yield
    finally:
        lock.release()


def _try(lock: _KernelLock | Lease, path: StoragePath) -> bool:
    with told(path):
        return lock.try_acquire()


class _KernelLock:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(path))

    def try_acquire(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    def release(self) -> None:
        self._lock.release()


class Lease:
    """A lock in an object store: an object with its holder's name, renewed every `RENEW_S` by a thread.

    Every write is conditional on the version that was read, so of two that want it one gets it. A lease whose object
    did not change for `STALE_S`, by the store's clock or by that of who waits, or whose holder was a process of this
    host that is gone, is taken over. A holder that was cut off for so long may work on beside its successor: both
    write the same.
    """

    def __init__(self, path: UPath) -> None:
        self._fs = path.fs
        self._bucket, self._key, _ = self._fs.split_path(path.path)
        self._name = str(path)
        self._owner = uuid.uuid4().hex
        self._version = ""  # of the object, when it is ours
        self._age_s = 0.0
        self._seen: tuple[str, float] = ("", 0.0)  # version of another's object, and since when it is that
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _put(self, *, held: bool = True, **condition: str) -> bool:
        """Write the object under a condition; whether it is ours now."""
        value = {"owner": self._owner, **this_process(), "held": held, "beat": uuid.uuid4().hex}
        body = dumps(value).encode()
        try:
            answer = self._fs.call_s3("put_object", Bucket=self._bucket, Key=self._key, Body=body, **condition)
        except OSError as error:
            version, found = self._get()
            if found == value:  # an earlier try of this request did it, and its answer got lost
                self._version = version
                return True
            if _condition_failed(error):
                # A renewal whose answer got lost, and with it the version to go on from: it is ours all the same.
                ours = found.get("owner") == self._owner and bool(found.get("held"))
                return ours and self._put(held=held, IfMatch=version)
            raise  # a store that is full, or where we may not write: no use in waiting for it
        self._version = str(answer["ETag"])
        return True

    def _get(self) -> tuple[str, dict[str, Any]]:
        """Version and contents of the object; empty when it is not there. `_age_s` is its age, by the store's clock."""
        from fsspec.asyn import sync

        try:
            answer = self._fs.call_s3("get_object", Bucket=self._bucket, Key=self._key)
        except FileNotFoundError:
            return "", {}
        body = sync(self._fs.loop, answer["Body"].read)
        try:
            found = loads(body)
        except JSONDecodeError:
            found = None
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        self._age_s = 0.0 if told is None else (parsedate_to_datetime(told) - answer["LastModified"]).total_seconds()
        return str(answer["ETag"]), found if isinstance(found, dict) else {}

    def try_acquire(self) -> bool:
        """Whether the lease is ours now."""
        version, holder = self._get()
        if not version:
            got = self._put(IfNoneMatch="*")
        elif not holder.get("held") or self._is_stale(version, holder):
            got = self._put(IfMatch=version)
        else:
            got = False
        if got:
            self._thread = threading.Thread(target=self._renew, daemon=True, name="ppc-lease")
            self._thread.start()
        return got

    def _is_stale(self, version: str, holder: dict[str, Any]) -> bool:
        if version != self._seen[0]:
            self._seen = (version, time.monotonic())
        return is_gone(holder) or max(self._age_s, time.monotonic() - self._seen[1]) >= STALE_S

    def _renew(self) -> None:
        said = False
        while not self._stop.wait(RENEW_S):
            try:
                if not self._put(IfMatch=self._version):
                    print(f"lease {self._name} was taken over by another process", flush=True)
                    return
                said = False
            except Exception as error:  # the store does not answer now
                if not said:
                    print(f"lease {self._name} not renewed: {type(error).__name__}: {error}", flush=True)
                said = True

    def release(self) -> None:
        """Let others have it."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(Exception):  # it goes stale by itself
            self._put(held=False, IfMatch=self._version)


def _condition_failed(error: OSError) -> bool:
    """Whether a conditional write was refused because somebody else wrote, or deleted, the object before."""
    answer = getattr(error.__cause__, "response", {})
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in (409, 412) or answer.get("Error", {}).get("Code") == "NoSuchKey"
