"""Paths as users write and read them, and folders: others' files stay inside theirs, and caches are the user's."""

import difflib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from jlora.errors import ConfigError, ModelError, UserError

# What the commands write in a run folder.
RUN_FILES = (
    *(".lock", ".shared", "config.yaml", "metrics.jsonl", "samples.json", "starts.jsonl", "summary.json"),
    "report.html",
    *("effort.json", "effort.html", "effort.png"),
)
RUN_FOLDERS = ("adapter", "checkpoints", "quarantine", "tensorboard", "wandb", "mlflow", "trackio")


def expand_home(path: str) -> str:
    """`~/NAME` as a path of the home folder; the shell leaves it so behind `=`.

    Raises:
      ValueError: nobody knows the home folder.
    """
    if path.startswith("~") and (expanded := os.path.expanduser(path)) != path:
        return expanded
    if path == "~" or path.startswith("~/"):
        raise ValueError(f"'{path}': the home folder is not known (HOME is not set); write the whole path")
    return path


def inside(folder: Path, name: str, error: type[UserError] = ModelError, folders: bool = False) -> Path:
    """`folder / name`, whose file (or folder, with `folders`) lies in the folder, links followed; it need not exist.

    The hub's cache is a folder of links too, `snapshots/REVISION/NAME -> ../../blobs/HASH`; its blobs belong to it.

    Raises:
      error: a path instead of a name, a link that leads out of the folder, or no regular file.
    """
    if Path(name).name != name or name == ".." or "\0" in name:
        raise error(f"{folder}: names the file {name!r}, which lies outside the folder; it is refused")
    path, root = folder / name, folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as circle:  # of links
        raise error(f"{path}: cannot be followed ({circle}); put the file itself there") from None
    snapshots = (parent for parent in root.parents if parent.name == "snapshots")
    roots = [root, *(parent.parent / "blobs" for parent in snapshots)]
    if not any(target.is_relative_to(one) for one in roots):
        raise error(f"{path}: is a link to {target}, outside its folder; put the file itself there")
    if target.exists() and not (target.is_dir() if folders else target.is_file()):
        raise error(f"{path}: is not a {'folder' if folders else 'regular file'}; get it again")
    return path


def beside(path: str | Path) -> str:
    """What follows a file that is not there: one beside it with nearly its name, or that the path is to be checked."""
    try:
        names = [name for name in os.listdir(Path(path).parent) if not name.startswith(".")]
    except OSError:
        names = []
    close = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.75)
    return f"; did you mean {Path(path).parent / close[0]}?" if close else "; check the path"


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Of each path as few of its last names as tell it from the others; the path itself where none do."""
    parts = [Path(path).parts for path in paths]

    def short(path: str | Path, own: tuple[str, ...]) -> str:
        ends = (own[start:] for start in range(len(own) - 1, -1, -1))
        alone = (end for end in ends if sum(other[-len(end) :] == end for other in parts) == 1)
        return next(("/".join(end) for end in alone), str(path))

    return list(map(short, paths, parts))


def require_own(run_dir: Path, error: type[UserError], more: Iterable[str] = ()) -> None:
    """A run folder, which may have come from others, holds its files and folders itself; any may be missing.

    No link is followed, whoever made it: one in an unpacked archive belongs to whoever unpacked it, too. The run folder
    may be a link.

    Args:
      error: what to raise. more: folders beside those of every run.

    Raises:
      error: naming a link, or what is no regular file or no folder.
    """
    folders = [run_dir / name for name in (*RUN_FOLDERS, *more)]
    checkpoints = run_dir / "checkpoints"
    if checkpoints.is_dir() and not checkpoints.is_symlink():
        folders += [path for path in sorted(checkpoints.iterdir()) if path.is_symlink()]
    for path in (*(run_dir / name for name in RUN_FILES), *folders):
        try:
            mode = path.lstat().st_mode
        except OSError:  # not there
            continue
        if stat.S_ISLNK(mode):
            raise error(
                f"{path}: is a link to {os.readlink(path)}, and jlora follows no links in a run folder; remove it, or "
                "put there what it leads to (the run folder as a whole may be a link)"
            )
        if not (stat.S_ISDIR(mode) if path in folders else stat.S_ISREG(mode)):
            kind = "folder" if path in folders else "regular file"
            raise error(f"{path}: is not a {kind}; move it away")


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
