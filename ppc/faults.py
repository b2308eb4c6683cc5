"""Storage that is full, read-only or does not answer: one error that names the file and the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

KEPT = "then resume: what is finished is kept"
REMEDIES = {
    errno.ENOSPC: f"free space there, {KEPT}",
    errno.EDQUOT: f"free space there or ask for more quota, {KEPT}",
    errno.EROFS: f"make it writable again, {KEPT}",
    errno.ESTALE: f"mount it again, {KEPT}",
    errno.ENOTCONN: f"mount it again, {KEPT}",
    errno.ETIMEDOUT: f"look at the server behind it and the network, {KEPT}",
}
STORE_REMEDY = f"look at the store, its address and your rights there, {KEPT}"


class StorageError(OSError):
    """Storage that takes or gives nothing now, whatever was to be written: nothing is wrong with a trial or a file.

    `strerror` says what was tried and why it failed, the whole text also what to do. Both, errno and path come along
    from another process.
    """

    def __str__(self) -> str:
        return f"{self.strerror}; {REMEDIES.get(self.errno or 0, STORE_REMEDY)}"


def as_data(error: OSError) -> list[Any]:
    """What makes the error again elsewhere: `StorageError(*as_data(error))`."""
    return [error.errno, error.strerror, str(error.filename)]


def storage_error(error: BaseException | None) -> StorageError | None:
    """The StorageError in an error, however it was wrapped; None when it is something else."""
    while error is not None:
        if isinstance(error, StorageError):
            return error
        error = error.__cause__ or error.__context__
    return None


def not_written(number: int, path: Any) -> OSError:
    """What keeps a file from being written, in words: a StorageError where we know a remedy."""
    why = os.strerror(number)
    if number not in REMEDIES:
        return OSError(number, f"not written: {why}", str(path))
    return StorageError(number, f"not written: {path}: {why}", str(path))


@contextmanager
def writing(path: Any) -> Iterator[None]:
    """What a full or read-only file system raises inside becomes one StorageError about `path`; all else passes.

    Libraries hide it: torch.save complains of a position in its archive.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, StorageError):  # told before, and this is another error, raised while it was handled
                break
            if isinstance(cause, OSError) and cause.errno in REMEDIES:
                raise not_written(cause.errno, path) from error
            cause = cause.__cause__ or cause.__context__
        raise


@contextmanager
def asking_store(path: Any, *, absent: bool) -> Iterator[None]:
    """Whatever the client of an object store raises inside becomes one StorageError about `path`.

    With `absent` it passes that a file or folder is not there. Where one is written, it is the bucket that is not.
    """
    try:
        yield
    except (StorageError, ValueError):
        raise
    except Exception as error:
        if absent and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
        number = (error.errno if isinstance(error, OSError) else None) or errno.EIO
        words = next((line for line in str(error).splitlines() if line.strip()), "no answer")
        raise StorageError(number, f"{path}: {type(error).__name__}: {words}", str(path)) from error
