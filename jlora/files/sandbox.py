"""Runs a piece of somebody else's program, such as a chat template, within bounds of time and memory.

Opens somebody else's file with a library in native code in a process of its own, whose death then kills no run: this
module as a script, which imports nothing of jlora and ends with an error where the file does. Memory is bounded on
Linux alone; in this process, time in the main thread alone.
"""

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Of processor time, so that a machine that is suspended or busy does not count; and of memory beyond what is in use.
SECONDS = 10
BYTES = 2**30

# The same of a process that opens somebody else's file, and what it may take more for each byte of a large one.
FILE_SECONDS, FILE_BYTES = 30, 2 * 2**30
BYTES_A_SECOND = 10_000_000

# No threads, each of which would take memory, and none of the arenas that pyarrow sets aside.
_ALONE = {
    "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONFAULTHANDLER": "",
}  # fmt: skip
# Letters, digits and signs, what normalizers know, and runs on which a pattern may never end.
TEXT = (
    "".join(map(chr, range(32, 127))) + "\n\t é ① ﬁ ☃ \u0301 日本 \N{GRINNING FACE} " + "a" * 64 + "! " + "0" * 64 + "!"
)


class _TimeUp(BaseException):
    """No `Exception`, which the program that is run could catch."""


@contextmanager
def confined() -> Iterator[None]:
    """Run the block in at most SECONDS and BYTES.

    Other threads must be at rest: what they compute and allocate meanwhile counts too.

    Raises:
      TimeoutError, MemoryError: the block took more.
    """
    with _bounded_memory(BYTES), timed():
        yield


@contextmanager
def timed() -> Iterator[None]:
    """Run the block in at most SECONDS, whatever memory it and other threads take.

    Raises:
      TimeoutError: the block took more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again each second, should the first have come where exceptions are dropped.
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
    except _TimeUp:
        raise TimeoutError from None


@contextmanager
def _bounded_memory(size: int) -> Iterator[None]:
    try:
        statm = os.open("/proc/self/statm", os.O_RDONLY)  # which a file of Python's takes ten times as long for
    except OSError:
        yield
        return
    pages = int(os.read(statm, 32).split()[0])
    os.close(statm)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + size
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def tried(kind: str, *files: str, content: bytes = b"", size: int = 0) -> str | None:
    """Open a file in a process of its own, in at most FILE_SECONDS and FILE_BYTES, to see whether it survives it.

    Args:
      kind: "tokenizer", of `content`, or "arrow", of `files`, which have `size` bytes for which it may take more.

    Returns:
      Why it failed, as a clause; None if it ended well.
    """
    seconds, most = FILE_SECONDS + size // BYTES_A_SECOND, FILE_BYTES + size
    command = [sys.executable, "-P", __file__, kind, str(seconds), str(most), *files]
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


def tokenizer(content: bytes) -> None:
    """Load a tokenizer.json; encode and decode a text. A text that it refuses is no fault of it."""
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_buffer(content)
    loaded.no_truncation()
    loaded.no_padding()
    loaded.get_vocab(with_added_tokens=True)
    for special in (True, False):
        try:
            ids = loaded.encode(TEXT, add_special_tokens=special).ids
        except Exception:  # the library raises nothing narrower; a panic is none
            continue
        loaded.decode(ids[:64])


def arrow(path: str) -> None:
    """Look at every value of a file of record batches, be it a stream or of random access."""
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(path) as file:
        try:
            batches = iter(ipc.open_stream(file))
        except pyarrow.ArrowInvalid:
            reader = ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            batch.validate(full=True)


if __name__ == "__main__":  # what `tried` starts: it bounds itself before it imports what it runs
    _kind, _seconds, _size, *_files = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(_seconds), int(_seconds) + 1))
    with _bounded_memory(int(_size)):
        if _kind == "tokenizer":
            tokenizer(sys.stdin.buffer.read())
        for _path in _files:
            arrow(_path)
