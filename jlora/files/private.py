"""Folders whose content is trusted, such as caches: the user's own, in which nobody else may write."""

import os
from pathlib import Path

from jlora.errors import ConfigError


def shared(path: Path) -> str | None:
    """Who else may write in a folder, as a clause; None where nobody is known to."""
    status = path.stat()
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    return "may be written to by others" if status.st_mode & 0o022 else None


def private(folder: Path, name: str, why: str) -> None:
    """Make a folder for its owner alone, or see that nobody else may write in the one that is there.

    Args:
      name: what sets it. why: what somebody else could do there, as a clause.

    Raises:
      ConfigError: somebody else may.
      OSError: it is not there and cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if fault := shared(folder):
        raise ConfigError(
            f"{name} {folder}: {fault}, and {why}; set a folder of your own, or empty it and make it yours alone "
            "(chmod 700)"
        )
