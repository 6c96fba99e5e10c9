"""Runs a piece of somebody else's program, such as a chat template, within bounds of time and memory.

Knows nothing of what is run. Time is bounded in the main thread alone, memory on Linux alone.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of processor time, so that a machine that is suspended or busy does not count; and of memory beyond what is in use.
SECONDS = 10
BYTES = 2**30


class _TimeUp(BaseException):
    """No `Exception`, which the program that is run could catch."""


@contextmanager
def confined() -> Iterator[None]:
    """Run the block in at most SECONDS and BYTES.

    Other threads must be at rest: what they compute and allocate meanwhile counts too.

    Raises:
      TimeoutError, MemoryError: the block took more.
    """
    try:
        with _bounded_memory(), _bounded_time():
            yield
    except _TimeUp:
        raise TimeoutError from None


@contextmanager
def _bounded_memory() -> Iterator[None]:
    in_use = Path("/proc/self/statm")
    if not in_use.is_file():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(in_use.read_text().split()[0]) * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _bounded_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again each second, should the first have come where exceptions are dropped.
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
