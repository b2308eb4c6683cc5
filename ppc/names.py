"""Names that become parts of paths: of studies, trials, stages, splits and images. Whoever makes a path checks them.
And what was meant by a name that there is not."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

TOLD = 20  # names at most, where none is close
MAX_BYTES = 200  # file systems take 255: there is room for a suffix and for the name of a temporary file


def check_name(name: str, what: str) -> str:
    """The name, when it can only name something in the folder that it is put in.

    ValueError for an empty or very long one, one that begins with a dot, and one that holds a slash, a backslash or a
    character that cannot be printed; `what` says whose name it is.
    """
    if not name:
        raise ValueError(f"{what}: the name is empty")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} {name!r}: the name is no valid text") from None
    if size > MAX_BYTES:
        raise ValueError(f"{what} {name[:40]!r}...: the name has {size} bytes, at most {MAX_BYTES} are possible")
    if name.startswith(".") or not name.isprintable() or "/" in name or "\\" in name:
        raise ValueError(
            f"{what} {name!r}: a name does not begin with a dot, and holds no slash, backslash or control character"
        )
    return name


def nearest(name: str, names: Iterable[str]) -> str:
    """What could have been meant, to end a message with."""
    names = list(names)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(names[:TOLD]) or 'none'}"
