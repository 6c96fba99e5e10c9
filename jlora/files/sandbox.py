"""Runs a piece of somebody else's program, such as a chat template, within bounds of time and memory.

Knows nothing of what is run. Memory is bounded on Linux alone; in this process, time in the main thread alone.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of processor time, so that a machine that is suspended or busy does not count; and of memory beyond what is in use.
SECONDS = 10
BYTES = 2**30

# The same of a process that opens somebody else's file, and what it may take more for each byte of a large one.
FILE_SECONDS, FILE_BYTES = 30, 2 * 2**30
BYTES_A_SECOND = 10_000_000

# Bounds itself before it imports what it runs.
_START = """
import pathlib, resource, runpy, sys
seconds, size = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
statm = pathlib.Path("/proc/self/statm")
if statm.is_file():
    in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size += in_use
    resource.setrlimit(resource.RLIMIT_AS, (size if soft == resource.RLIM_INFINITY else min(soft, size), hard))
del sys.argv[1:3]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# No threads, each of which would take memory, and none of the arenas that pyarrow sets aside.
_ALONE = {
    "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONFAULTHANDLER": "",
}  # fmt: skip


class _TimeUp(BaseException):
    """No `Exception`, which the program that is run could catch."""


@contextmanager
def confined() -> Iterator[None]:
    """Run the block in at most SECONDS and BYTES.

    Other threads must be at rest: what they compute and allocate meanwhile counts too.

    Raises:
      TimeoutError, MemoryError: the block took more.
    """
    with _bounded_memory(), timed():
        yield


@contextmanager
def timed() -> Iterator[None]:
    """Run the block in at most SECONDS, whatever memory it and other threads take.

    Raises:
      TimeoutError: the block took more.
    """
    try:
        with _bounded_time():
            yield
    except _TimeUp:
        raise TimeoutError from None


@contextmanager
def _bounded_memory() -> Iterator[None]:
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY)  # which a file of Python's takes ten times as long for
    except OSError:
        yield
        return
    pages = int(os.read(statm, 32).split()[0])
    os.close(statm)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + BYTES
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


def tried(script: Path, *arguments: str, content: bytes = b"", size: int = 0) -> str | None:
    """Run a script in a process of its own, in at most FILE_SECONDS and FILE_BYTES, to see whether it survives a file.

    Args:
      content: what it reads from stdin. size: of a file that it maps, in bytes, for which it may take more.

    Returns:
      Why it failed, as a clause; None if it ended well.
    """
    seconds, most = FILE_SECONDS + size // BYTES_A_SECOND, FILE_BYTES + size
    command = [sys.executable, "-P", "-c", _START, str(seconds), str(most), str(script), *arguments]
    done = subprocess.run(command, input=content, capture_output=True, env=os.environ | _ALONE)
    if done.returncode == 0:
        return None
    said = done.stderr.decode("utf-8", "replace")
    last = next((line for line in reversed(said.split("\n")) if line.strip()), "")
    out_of_memory = "memory allocation of" in said or "MemoryError" in last
    if out_of_memory or -done.returncode in (signal.SIGXCPU, signal.SIGKILL):
        return f"more than {seconds} seconds or {most >> 30} GiB are needed to read it"
    if done.returncode < 0:
        return f"it crashes the library that reads it ({signal.Signals(-done.returncode).name})"
    return last.partition(": ")[2] or last


@contextmanager
def panics() -> Iterator[None]:
    """A panic of a library in Rust becomes a RuntimeError; it comes as no `Exception`, and has no name to import."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from None
