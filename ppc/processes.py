"""Which process stands behind something that was written down, and whether it is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from collections.abc import Mapping
from typing import Any

PR_SET_PDEATHSIG = 1  # a name of Linux's prctl.h


def end_with_parent(parent: int, number: signal.Signals) -> bool:
    """Have this process sent a signal when its parent, of that pid, ends; False when it has ended before."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    return os.getppid() == parent


def this_process() -> dict[str, Any]:
    """Host, pid, and which numbering of processes the pid is of: containers of one host may share its name."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_space": _pid_space()}


def is_gone(who: Mapping[str, Any]) -> bool:
    """Whether the process of that record is known to have ended; of other hosts and containers nothing is known."""
    if (who.get("host"), who.get("pid_space")) != (socket.gethostname(), _pid_space()):
        return False
    try:
        os.kill(int(who["pid"]), 0)
    except (ProcessLookupError, KeyError, TypeError, ValueError):
        return True
    except PermissionError:
        return False
    return False


def _pid_space() -> str:
    """Name of the pid namespace; empty where the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
