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
from typing import TextIO

from jlora.errors import ConfigError

NAME = ".lock"
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
    with open(run_dir / NAME, "a+", encoding="utf-8") as stream:
        if _take(stream.fileno(), run_dir):
            _note(stream, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}))
        try:
            yield
        finally:
            _note(stream, "")


def _note(stream: TextIO, text: str) -> None:
    with suppress(OSError):  # of a full disk: who holds it is only for a message
        stream.truncate(0)
        os.write(stream.fileno(), text.encode())


def _take(descriptor: int, run_dir: Path) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"output_dir {run_dir}: {_holder(run_dir)} is training there; wait for it or end it, or set another"
                ) from None
        except OSError as error:
            print(
                f"warning: {run_dir}: can not be locked here ({error.strerror}); start no second run there",
                file=sys.stderr,
            )
            return False
        time.sleep(0.1)


def _holder(run_dir: Path) -> str:
    try:
        holder = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
