"""Opens files that somebody else made: regular ones alone, since a pipe or a device may have no end, and bounded."""

import errno
import io
import json
import os
import stat
from pathlib import Path
from typing import Any

# The largest that are read whole, in bytes: of real files a tokenizer.json is below 40 MB, a template below 50 KB, a
# metrics.jsonl of a million steps below 500 MB.
MAX_JSON, MAX_TEMPLATE, MAX_LOG = 64 * 2**20, 2**20, 2**30


def open_theirs(path: Path) -> io.BufferedReader:
    """A file open for reading; links are followed.

    Raises:
      OSError: it cannot be opened, or is a pipe, a device or a folder, for which nobody waits.
    """
    # Without O_NONBLOCK a pipe is waited for here already.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return open(descriptor, "rb")


def read_theirs(path: Path, limit: int) -> bytes:
    """A file whole.

    Raises:
      OSError: as `open_theirs`.
      ValueError: it has more than `limit` bytes.
    """
    with open_theirs(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise ValueError(f"it has more than {limit >> 20} MiB")
        return file.read()


def text_of_theirs(path: Path, limit: int, errors: str = "strict") -> str:
    """A file of text in UTF-8 whole, its lines ended by `\\n`.

    Args:
      errors: as `bytes.decode` has it.

    Raises:
      OSError, ValueError: as `read_theirs`; or it is not UTF-8.
    """
    return io.TextIOWrapper(io.BytesIO(read_theirs(path, limit)), encoding="utf-8", errors=errors).read()


def parse(text: str) -> dict[str, Any] | None:
    """A JSON object, or None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
