"""Files and folders written whole or not at all: under a hidden name that is this process's alone, until it is done.

Nothing is deleted, cut short or written through but what this process made. Knows nothing of what is written.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from jlora.errors import UserError

# `.NAME.RANDOM.partial` is at most this long, in bytes, on every file system in use.
LONGEST_NAME, RANDOM_BYTES, ENDING = 255, 8, ".partial"


def beside(path: Path) -> Path:
    """A name in the folder of `path` that nobody has, or could have foreseen."""
    name = path.name
    while len(os.fsencode(name)) > LONGEST_NAME - 2 * RANDOM_BYTES - len(ENDING) - 2:
        name = name[:-1]
    return path.parent / f".{name}.{secrets.token_hex(RANDOM_BYTES)}{ENDING}"


def leftovers(path: Path) -> list[Path]:
    """What processes that were killed, or are at work, have beside `path` under such names."""
    named = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{{2 * RANDOM_BYTES}}}{re.escape(ENDING)}")
    return [found for found in path.parent.iterdir() if named.fullmatch(found.name) and not found.is_symlink()]


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """`write_text` of a JSON object, indented for people."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, in place of the regular file that is there.

    Raises:
      OSError: it cannot be written; or what is there is a link, a folder or a device, which stays as it is.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        _refuse(path, "is there and is no regular file")
    partial = beside(path)
    stream = open(partial, "xb")
    try:
        with stream:
            stream.write(content)
        os.replace(partial, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends well, and else is gone.

    Errors of the block that name it are told of `target`.
    """
    partial = beside(target)
    try:
        yield partial
        partial.replace(target)
    except UserError as error:
        error.args = (str(error).replace(str(partial), str(target)),)
        raise
    finally:
        partial.unlink(missing_ok=True)


def open_own(path: Path, flags: int) -> int:
    """The descriptor of a file that is kept open: never one behind a link, and only a regular one.

    Args:
      flags: of `os.open`; nothing is cut short.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            _refuse(path, "is a link, which is not followed")
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        _refuse(path, "is there and is no regular file")
    return descriptor


@contextmanager
def new_folder(target: Path, *, partial: Path | None = None, ours: Collection[str] = ()) -> Iterator[Path]:
    """A fresh folder to be filled, which becomes `target` when the block ends well, and else is gone.

    An empty `target` gives way. Errors of the block that name the fresh folder are told of `target`.

    Args:
      partial: the fresh folder, where others have to know it; beside `target`, which is then no link.
      ours: what jlora writes there. A `target` from before of these files alone is replaced; one that holds others,
        too, is kept under a name of its own, which a line on stderr tells.

    Raises:
      FileExistsError: something else is there; it stays as it is.
    """
    final = target if partial else target.resolve()
    partial = partial or beside(final)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            if file.is_file():  # safetensors writes files that only their owner may read
                file.chmod(partial.stat().st_mode & 0o666)
        _place(partial, final, ours)
    except UserError as error:
        error.args = (str(error).replace(str(partial), str(target)),)
        raise
    except OSError as error:
        where = str(error.filename or final)
        error.filename = str(target) if where == str(final) else where.replace(str(partial), str(target))
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _place(partial: Path, target: Path, ours: Collection[str]) -> None:
    try:
        partial.rename(target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    if not ours or target.is_symlink() or not target.is_dir():
        _refuse(target, "something is there by now and stays as it is, so nothing was written")
    old = target.with_name(f"{target.name}.before-{secrets.token_hex(RANDOM_BYTES)}")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        with suppress(OSError):  # somebody else was faster
            old.rename(target)
        raise
    others = sorted(path.name for path in old.iterdir() if path.name not in ours or path.is_dir())
    if others:
        shown = ", ".join(others[:3])
        print(f"warning: {target}: the one before held what jlora did not write ({shown}); see {old}", file=sys.stderr)
        return
    for path in old.iterdir():
        path.unlink()
    old.rmdir()


def _refuse(path: Path, why: str) -> NoReturn:
    raise FileExistsError(errno.EEXIST, why, str(path))


def strict_json(value: Any) -> str:
    """One line of JSON; a figure that is not finite, for which JSON has no word, becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
