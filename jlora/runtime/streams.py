"""Standard streams whose other side may be gone: progress that nobody reads is dropped, a result is an error.

stderr holds progress, warnings and reasons, which are no result; who cannot be told is not told. stdout holds results,
except for what is in files, too (`told`).
"""

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from jlora.errors import ConfigError


class OutputLost(ConfigError):
    """A result could not be written to stdout."""


class _Written(io.FileIO):
    """A descriptor that bytes are written to, of results or else of progress."""

    def __init__(self, descriptor: int, results: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._results, self._lost = results, False

    def write(self, data: Any) -> int:
        """Write some of the bytes. Raises: OutputLost: once, where they are of a result and cannot be written."""
        if self._lost:  # what is left in a buffer above would fail again as Python ends, and change the exit code
            return len(data)
        try:
            while (count := super().write(data)) is None:  # full, and set not to block by a process that shares it
                select.select([], [self], [])
            return count
        except OSError as error:
            if not self._results:
                return len(data)  # tried again with the next line: a reader of a named pipe may come back
            self._lost = True
            raise OutputLost(
                f"stdout: the result cannot be written ({error.strerror}); send it to a disk with room, or to a reader "
                "that stays"
            ) from None


def _text(stream: TextIO | None, results: bool) -> io.TextIOWrapper:
    """A text stream in the place of one of Python's own; None is one that was closed before Python began."""
    if stream is None:  # this takes its number, which else the next file would get, and takes no bytes either
        stream = open(os.open(os.devnull, os.O_RDONLY), encoding="utf-8", closefd=False)
    buffer = io.BufferedWriter(_Written(stream.fileno(), results))
    lines = getattr(stream, "line_buffering", False) or getattr(stream, "write_through", False)
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=lines)


def take_over() -> None:
    """Have all that this process writes to stdout and stderr go through `_Written`; a caller's own streams stay."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(sys.stdout, results=True)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(sys.stderr, results=False)


def keep_stdout() -> None:
    """Leave stdout to Python's results: what native code writes there goes to stderr from now on."""
    sys.stdout.flush()
    results = open(os.dup(sys.stdout.fileno()), "w", encoding=sys.stdout.encoding, closefd=False)
    os.dup2(2, 1)
    sys.stdout = _text(results, results=True)


def flush() -> None:
    """Write what waits in the buffers, as far as somebody takes it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, OutputLost):
            stream.flush()


@contextmanager
def told(result: bool = False) -> Iterator[None]:
    """What is printed on stdout meanwhile is in files, too: it is for people, and a reader who is gone misses nothing.

    Args:
      result: it is a result after all, such as JSON that was asked for.
    """
    try:
        yield
        sys.stdout.flush()
    except OutputLost:
        if result:
            raise
