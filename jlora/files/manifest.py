"""What a folder held when it was written: each file's size and SHA-256, in a `manifest.json` beside them.

A folder without a manifest that is right to the last bit does not count as whole. Knows nothing of what the
files mean.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from jlora.files.theirs import MAX_JSON, open_theirs, read_theirs

NAME = "manifest.json"


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Bring every file of a folder to the disk, and write down what they are.

    Args:
      facts: JSON values kept beside the list of files.
    """
    files = {}
    for name, path in _files(folder).items():
        _sync(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    manifest = folder / NAME
    manifest.write_text(_render({"facts": facts, "files": files}), encoding="utf-8")
    _sync(manifest)
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            _sync(path)


def read(folder: Path) -> dict[str, Any]:
    """The facts of a manifest, which is whole itself.

    Raises:
      ValueError, OSError: it is not, or is not there.
    """
    return _read(folder)["facts"]


def fault(folder: Path, cached: bool = True) -> str | None:
    """What is wrong with a folder, such as `state/d/4a1: SHA-256 differs`; None if it is whole.

    Files that the manifest does not list are let be: network file systems leave such.

    Args:
      cached: False asks the disk, not the memory that holds what was just written, where the system can tell them
        apart.

    Raises:
      OSError: a file is there and cannot be read, for want of rights or of its disk, whatever it holds.
    """
    try:
        listed = _read(folder)["files"]
        found = _files(folder)
        for name, entry in listed.items():
            path = found.get(name)
            if path is None:
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _digest(path, cached) != entry["sha256"]:
                return f"{name}: SHA-256 differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:
        return f"{NAME} is damaged"
    return None


def sync_folder(folder: Path) -> None:
    """Bring names made or changed in a folder to the disk."""
    _sync(folder)


def _render(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({"content": content, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if path.exists() and not path.is_file():
        raise ValueError(NAME)
    text = read_theirs(path, MAX_JSON)
    try:
        tree = json.loads(text)
    except RecursionError:
        raise ValueError(NAME) from None
    # Written again from what it says, it is the same text, or a bit of it has changed.
    content: Any = tree.get("content") if isinstance(tree, dict) else None
    if not _has_form(content) or _render(content).encode() != text:
        raise ValueError(NAME)
    return content


def _has_form(content: Any) -> bool:
    """Whether a value is what `write` has rendered."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("facts", "files")):
        return False
    return all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in content["files"].values()
    )


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / NAME)
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _digest(path: Path, cached: bool = True) -> str:
    with open_theirs(path) as stream:
        if not cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
