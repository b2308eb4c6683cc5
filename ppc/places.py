"""Where storage is: a folder (of this machine, or one that all nodes mount), or `s3://bucket/prefix`.

A path on storage is a `StoragePath`: a `Path`, or a `UPath` with the same methods. What the two do differently is here
and nowhere else: writing a file whole, appending to one, holding a lock, deleting a folder. An object appears whole
when its write ends, so it needs no renaming; it cannot be appended to, so it is written anew; and no kernel watches
over its locks, so these are leases that their holder renews.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.util import find_spec
from io import BytesIO, StringIO
from json import JSONDecodeError, dumps, loads
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias

from filelock import FileLock, Timeout

from ppc.faults import asking_store, not_written, writing

if TYPE_CHECKING:
    from upath import UPath

    StoragePath: TypeAlias = Path | UPath
else:
    StoragePath = Path

RENEW_S = 5.0
STALE_S = 45.0  # a lease that was not renewed for so long is taken over
REMOTE_EVERY_S = 5.0  # how often something that changes all the time is written to, or read from, an object store
HERE = Path(os.environ.get("PPC_HERE", "~/.cache/ppc"))  # for what can be made again, when storage is an object store


def storage_path(uri: str | Path) -> StoragePath:
    """The place that a user named. ValueError for one that is no folder and no s3 URI."""
    text = str(uri)
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text).expanduser().resolve()
    if scheme == "file" and rest.startswith("/"):
        return Path(rest)
    if scheme != "s3" or not rest.strip("/"):
        raise ValueError(f"storage {text}: expected a folder, file:///folder or s3://bucket/prefix")
    if find_spec("s3fs") is None or find_spec("upath") is None:
        raise ValueError(f"storage {text}: needs s3fs and universal-pathlib: pip install -e '.[s3]'")
    from upath import UPath

    # Listings are not cached: other processes write here.
    return UPath(text.rstrip("/"), use_listings_cache=False)


def is_remote(path: StoragePath) -> bool:
    """Whether the path is in an object store, and not in a file system of this machine."""
    return not isinstance(path, Path)


def local_folder(root: StoragePath) -> Path:
    """Folder of this machine for what belongs to a storage and can be made again: generated data, MLflow's database.

    For a storage that is a folder, that folder.
    """
    if isinstance(root, Path):
        return root
    return HERE.expanduser() / sha256(str(root).encode()).hexdigest()[:12]


def pause_s(path: StoragePath) -> float:
    """Seconds between two looks at, or two writes of, a file that changes all the time."""
    return REMOTE_EVERY_S if is_remote(path) else 0.5


@contextmanager
def told(path: StoragePath, *, absent: bool = False) -> Iterator[None]:
    """Storage that takes or gives nothing raises one StorageError about `path`, whatever it is and whoever noticed it.

    `absent`: the file may not be there, which is a FileNotFoundError.
    """
    with writing(path) if isinstance(path, Path) else asking_store(path, absent=absent):
        yield


def read_bytes(path: StoragePath) -> bytes:
    """Contents of a file. OSError when that fails, FileNotFoundError when it is not there."""
    with told(path, absent=True):
        return path.read_bytes()


def names_in(folder: StoragePath) -> list[str]:
    """Names in a folder, sorted; none when it is not there."""
    try:
        with told(folder, absent=True):
            return sorted(path.name for path in folder.iterdir() if path.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def size_of(path: StoragePath) -> int | None:
    """Bytes of a file, None when it is not there."""
    try:
        with told(path, absent=True):
            return int(path.stat().st_size)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_from(path: StoragePath, offset: int) -> bytes:
    """The bytes of a file from an offset on; nothing when the file is not there or ends before it."""
    size = size_of(path)
    if size is None or size <= offset:
        return b""
    if isinstance(path, Path):
        with path.open("rb") as handle:
            handle.seek(offset)
            return handle.read()
    with told(path, absent=True):
        return bytes(path.fs.cat_file(path.path, start=offset))


def remove_tree(folder: StoragePath) -> None:
    """Delete a folder and all in it, as far as that goes."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(OSError), told(folder):
        folder.fs.rm(folder.path, recursive=True)


def remove(path: StoragePath) -> None:
    """Delete a file, which may not be there."""
    with told(path, absent=True):
        path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: StoragePath, mode: str = "wb", *, durable: bool = True) -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when the block ends without an error.

    It outlives a power cut too, unless it is not `durable`. StorageError when the storage is full or read-only.
    """
    if not isinstance(path, Path):
        buffer: BytesIO | StringIO = BytesIO() if "b" in mode else StringIO()
        yield buffer
        value = buffer.getvalue()
        with told(path):
            path.fs.pipe_file(path.path, value.encode() if isinstance(value, str) else value)
        return
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(descriptor, mode) as handle:
                yield handle
                if durable:
                    handle.flush()
                    os.fsync(handle.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # it became read-only: the cause is what matters
                Path(temporary).unlink(missing_ok=True)
            raise


# -- files that grow


class Appender(Protocol):
    """A file at whose end lines are written."""

    def append(self, line: bytes) -> None:
        """Add a line. OSError when it could not be written whole; nothing of it is left then."""

    def flush(self) -> None:
        """Return when all lines can be read by others."""

    def close(self) -> None:
        """Flush and let go."""


def open_appender(path: StoragePath, whole: bytes) -> Appender:
    """Append to a file whose trustworthy beginning is `whole`; anything after that is cut off."""
    return FileAppender(path, whole) if isinstance(path, Path) else ObjectAppender(path, whole)


class FileAppender:
    """Each line is there when `append` returns."""

    def __init__(self, path: Path, whole: bytes) -> None:
        self._path = path
        with told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = path.open("ab", buffering=0)
            if self._handle.seek(0, os.SEEK_END) > len(whole):
                self._handle.truncate(len(whole))

    def append(self, line: bytes) -> None:
        """See `Appender.append`."""
        size = self._handle.seek(0, os.SEEK_END)
        try:
            written = self._handle.write(line)
        except OSError as error:
            raise not_written(error.errno or errno.EIO, self._path) from error
        if written != len(line):  # a disk that is nearly full takes a part
            self._handle.truncate(size)
            raise not_written(errno.ENOSPC, self._path)

    def flush(self) -> None:
        """See `Appender.flush`."""

    def close(self) -> None:
        """See `Appender.close`."""
        self._handle.close()


class ObjectAppender:
    """The object is written anew with all its lines, every few seconds and at each flush."""

    def __init__(self, path: UPath, whole: bytes) -> None:
        self._path, self._data, self._sent = path, bytearray(whole), len(whole)
        self._next = time.monotonic() + REMOTE_EVERY_S
        self._failed = False

    def append(self, line: bytes) -> None:
        """See `Appender.append`."""
        self._data += line
        if time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        """See `Appender.flush`."""
        if len(self._data) != self._sent:
            self._failed = True
            with told(self._path):
                self._path.fs.pipe_file(self._path.path, bytes(self._data))
            self._sent, self._failed = len(self._data), False
        self._next = time.monotonic() + REMOTE_EVERY_S

    def close(self) -> None:
        """See `Appender.close`. A store that did not answer the last time is not asked again: that takes long."""
        if not self._failed:
            self.flush()


# -- locks


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
    did not change for `STALE_S`, by the clock of who waits, or whose holder was a process of this host that is gone,
    is taken over. A holder that was cut off for so long may work on beside its successor: both write the same.
    """

    def __init__(self, path: UPath) -> None:
        self._fs = path.fs
        self._bucket, self._key, _ = self._fs.split_path(path.path)
        self._name = str(path)
        self._owner = uuid.uuid4().hex
        self._version = ""  # of the object, when it is ours
        self._seen: tuple[str, float] = ("", 0.0)  # version of another's object, and since when it is that
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _put(self, *, held: bool = True, **condition: str) -> bool:
        """Write the object under a condition; whether it is ours now."""
        value = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "held": held,
                 "beat": uuid.uuid4().hex}  # fmt: skip
        body = dumps(value).encode()
        try:
            answer = self._fs.call_s3("put_object", Bucket=self._bucket, Key=self._key, Body=body, **condition)
        except OSError as error:
            version, found = self._get()
            if found == value:  # an earlier try of this request did it, and its answer got lost
                self._version = version
                return True
            if _condition_failed(error):
                return False
            raise  # a store that is full, or where we may not write: no use in waiting for it
        self._version = str(answer["ETag"])
        return True

    def _get(self) -> tuple[str, dict[str, Any]]:
        """Version and contents of the object; empty when it is not there."""
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
        if holder.get("host") == socket.gethostname() and not _process_exists(holder.get("pid")):
            return True
        return time.monotonic() - self._seen[1] >= STALE_S

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


def _process_exists(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True
