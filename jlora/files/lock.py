"""One run at a time in a run folder. The system lets go of a dead process's lock, however it died."""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jlora.errors import ConfigError
from jlora.files.atomic import open_own

NAME = ".lock"
MARK = '{"pid": '  # how a note of ours begins
# A process that was just killed lets go of its memory first, and of its files then.
WAIT_SECONDS = 5.0


@contextmanager
def held(run_dir: Path, mine: bool = True) -> Iterator[None]:
    """Hold the folder's lock, so that no other run writes there.

    Args:
      mine: False holds nothing; of the processes of one job only the first locks.

    Raises:
      ConfigError: naming the process that holds it.
    """
    if not mine:
        yield
        return
    descriptor = open_own(run_dir / NAME, os.O_RDWR | os.O_CREAT)
    try:
        if _take(descriptor, run_dir):
            _note(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}))
        try:
            yield
        finally:
            _note(descriptor, "")
    finally:
        os.close(descriptor)


def _note(descriptor: int, text: str) -> None:
    """Write who holds the lock, but over nothing else, nor into a file that has another name somewhere."""
    with suppress(OSError):  # of a full disk: who holds it is only for a message
        ours = os.pread(descriptor, len(MARK), 0) in (b"", MARK.encode())
        if ours and os.fstat(descriptor).st_nlink == 1:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)


def _take(descriptor: int, run_dir: Path) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = _holder(descriptor)
                raise ConfigError(
                    f"output_dir {run_dir}: {holder} is training there; wait for it or end it, or set another"
                ) from None
        except OSError as error:
            print(
                f"warning: {run_dir}: can not be locked here ({error.strerror}); start no second run there",
                file=sys.stderr,
            )
            return False
        time.sleep(0.1)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
