"""One process at a time: one run in a run folder, one maker of a cache's entry.

The system lets go of a dead process's lock, however it died. `filelock` locks a descriptor that is opened here: its own
classes take a pipe or a device for a lock file, too, and do not tell a file system without locks from a file that they
cannot open.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import lock_descriptor

from jlora.errors import ConfigError
from jlora.files.atomic import open_own

NAME = ".lock"
MARK = '{"pid": '  # how a note of ours begins
# A process that was just killed lets go of its memory first, and of its files then.
WAIT_SECONDS = 5.0


@contextmanager
def locked(run_dir: Path, mine: bool = True) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock, so that no other run writes there.

    Args:
      mine: False holds nothing; of the processes of one job only the first locks.

    Yields:
      what to call before writing there later: it raises ConfigError where the folder is gone, or another one by now.

    Raises:
      ConfigError: naming the process that holds it.
    """
    if not mine:
        yield lambda: None
        return
    with open(open_own(run_dir / NAME, os.O_RDWR | os.O_CREAT), "r+b") as file:
        _take(file.fileno(), run_dir)
        try:
            yield partial(_require_there, file.fileno(), run_dir)
        finally:
            _note(file.fileno(), "")


@contextmanager
def waited_for(path: Path) -> Iterator[bool]:
    """Hold the lock of a file once no other process does; whether locks work there."""
    with open(open_own(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
        try:
            alone = lock_descriptor(file.fileno())
        except OSError:
            alone = False
        yield alone


def held(run_dir: Path) -> bool:
    """Whether a process is training in a run folder; nobody is kept from beginning to."""
    try:
        with open(open_own(run_dir / NAME, os.O_RDONLY), "rb") as file:
            return not lock_descriptor(file.fileno(), blocking=False)
    except OSError:  # no lock, or no locks, there
        return False


def _require_there(descriptor: int, run_dir: Path) -> None:
    with suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), os.stat(run_dir / NAME)):
            return
    raise ConfigError(
        f"output_dir {run_dir}: was removed or replaced while a run was at work there, so nothing more is saved; "
        "run the same command again to start anew"
    )


def _take(descriptor: int, run_dir: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    try:
        while not lock_descriptor(descriptor, blocking=False):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"output_dir {run_dir}: {_holder(descriptor)} is training there; wait for it or end it, or set "
                    "another"
                )
            time.sleep(0.1)
    except OSError as error:
        print(
            f"warning: {run_dir}: cannot be locked here ({error.strerror}); start no second run there",
            file=sys.stderr,
        )
        return
    _note(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}))


def _note(descriptor: int, text: str) -> None:
    """Write who holds the lock, but over nothing else, nor into a file that has another name somewhere."""
    with suppress(OSError):  # of a full disk: who holds it is only for a message
        ours = os.pread(descriptor, len(MARK), 0) in (b"", MARK.encode())
        if ours and os.fstat(descriptor).st_nlink == 1:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
