"""A parent for a process of a job: passes signals on, and explains an end that Python did not see."""

import ctypes
import math
import mmap
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from jlora.errors import HostLost
from jlora.runtime import streams

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DONE = "done, to end with "

_board: mmap.mmap | None = None  # where this process stands, for the parent that outlives it


def stop_signals() -> list[signal.Signals]:
    """Those that ask a run to stop: a terminal that goes away, too, but where that is ignored already (nohup)."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]


def supervise(stopped_seconds: float) -> None:
    """Go on in a child process; its parent waits, passes signals on, and explains an end that Python did not see.

    Args:
      stopped_seconds: a child that is stopped (SIGSTOP) for longer is ended; the job has given it up by then.
    """
    global _board
    _board = mmap.mmap(-1, 4096)
    child = os.fork()
    if child == 0:
        if sys.platform == "linux":  # PR_SET_PDEATHSIG: whoever kills the parent kills both
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        return

    def pass_on(number: int, frame: Any) -> None:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGINT)  # in the child JAX takes SIGTERM, also where it is not heard before a step

    for number in stop_signals():
        signal.signal(number, pass_on)
    code, was_stopped = _wait_for(child, stopped_seconds)
    stood = _board[:].rstrip(b"\0").decode() or "at its start"
    if code == -signal.SIGABRT and stood.startswith(DONE):
        code = int(stood.removeprefix(DONE))
    elif code < 0:
        name = signal.Signals(-code).name
        why = {
            signal.SIGABRT: "another process of the job was lost, or could not be reached in time",
            signal.SIGKILL: f"it was stopped for {stopped_seconds:.0f} s (distributed.host_timeout)"
            if was_stopped
            else "somebody killed it, or the host ran out of memory",
        }.get(signal.Signals(-code), "it crashed")
        print(
            f"error: {socket.gethostname()}: ended by {name} {stood}: {why}; see the logs of all processes, then "
            "run the same command again to resume from the last checkpoint",
            file=sys.stderr,
        )
        code = HostLost.exit_code
    sys.stderr.flush()
    os._exit(code)


def _wait_for(child: int, stopped_seconds: float) -> tuple[int, bool]:
    """Exit code of a child, and whether it was ended for being stopped too long."""
    since = math.inf
    while True:
        look = os.WUNTRACED | os.WCONTINUED | (0 if since == math.inf else os.WNOHANG)
        pid, status = os.waitpid(child, look)
        if pid == 0:
            if time.monotonic() - since > stopped_seconds:
                os.kill(child, signal.SIGKILL)
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), True
            time.sleep(0.1)
        elif os.WIFSTOPPED(status):
            since = time.monotonic()
        elif os.WIFCONTINUED(status):
            since = math.inf
        else:
            return os.waitstatus_to_exitcode(status), False


def stands(text: str) -> None:
    """Leave word of where this process stands, such as `after step 17`."""
    if _board is not None:
        _board[:] = text.encode()[:4096].ljust(4096, b"\0")


def done(code: int) -> None:
    """All work is done: this process ends with `code`, also where JAX aborts it over who leaves late."""
    streams.flush()
    stands(f"{DONE}{code}")
