"""Where storage is: a folder (of this machine, or one that all nodes mount), or `s3://bucket/prefix`.

A path on storage is a `StoragePath`: a `Path`, or a `UPath` with the same methods. What the two do differently is here
and in `locks.py`: writing a file whole, appending to one, deleting a folder. An object appears whole when its write
ends, so it needs no renaming; and it cannot be appended to, so it is written anew.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias

from ppc.faults import StorageError, asking_store, not_written, writing

if TYPE_CHECKING:
    from upath import UPath

    StoragePath: TypeAlias = Path | UPath
else:
    StoragePath = Path

REMOTE_EVERY_S = 5.0  # how often something that changes all the time is written to, or read from, an object store
REREAD_S = (0.05, 0.2, 1.0)  # seconds before a file that went away while it was read is read again
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


def file_sha256(path: Path) -> str:
    """sha256 of a file of this machine, in hex; FileNotFoundError says which file."""
    with path.open("rb") as handle:
        return file_digest(handle, "sha256").hexdigest()


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
    """Contents of a file. OSError when that fails, FileNotFoundError when it is not there.

    Of an object in one request: one that is looked up first and then read may have been written anew in between.
    """
    if not isinstance(path, Path):
        with told(path, absent=True):
            return bytes(path.fs.cat_file(path.path, max_concurrency=1))
    for pause_s in REREAD_S:
        try:
            with told(path):
                return path.read_bytes()
        except StorageError as error:  # over NFS: another host put a new file in its place while it was read
            if error.errno != errno.ESTALE:
                raise
        time.sleep(pause_s)
    with told(path):
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
    if (size_of(path) or 0) <= offset:
        return b""
    try:
        if isinstance(path, Path):
            with path.open("rb") as handle:
                handle.seek(offset)
                return handle.read()
        with told(path, absent=True):
            return bytes(path.fs.cat_file(path.path, start=offset))
    except OSError:
        if (size_of(path) or 0) <= offset:  # by now
            return b""
        raise


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

    It outlives a power cut too, unless it is not `durable`. Text is UTF-8 whatever the locale. StorageError when the
    storage is full or read-only.
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
            with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as handle:
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
        """See `Appender.flush`. What follows outlives a power cut, so these lines must."""
        with told(self._path):
            os.fsync(self._handle.fileno())

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
