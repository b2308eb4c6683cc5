"""Run a command for as long as stdin stays open: `python -I -S tether.py NICENESS COMMAND...`.

Whoever starts this holds the other end of a pipe. However that process ends, by SIGKILL too, the kernel closes the
pipe; then the command and all that it started get SIGTERM, and after `PATIENCE_S` SIGKILL. It has to be started as the
leader of a process group, and imports nothing of ppc: it is there in an instant.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

PATIENCE_S = 5.0


def _end_with_stdin(process: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    os.killpg(0, signal.SIGKILL)


def main(words: list[str]) -> int:
    """Run the command; its exit status, when it ends before stdin does."""
    os.nice(int(words[0]))
    process = subprocess.Popen(words[1:], stdin=subprocess.DEVNULL)
    for number in (signal.SIGTERM, signal.SIGINT):  # what the group is sent is for the command
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_stdin, args=(process,), daemon=True).start()
    status = process.wait()
    os.killpg(0, signal.SIGTERM)  # to what it left behind
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
