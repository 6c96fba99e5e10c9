"""Files of a folder that somebody else made: confined to it, regular, and of a size that is looked at first."""

from pathlib import Path

from jlora.errors import ModelError


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, whose file lies in the folder, links followed; it need not exist.

    The hub's cache is a folder of links too, `snapshots/REVISION/NAME -> ../../blobs/HASH`; its blobs belong to it.

    Raises:
      ModelError: a path instead of a name, a link that leads out of the folder, or no regular file.
    """
    if Path(name).name != name or name == ".." or "\0" in name:
        raise ModelError(f"{folder}: names the file {name!r}, which lies outside the folder; it is refused")
    path, root = folder / name, folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ModelError(f"{path}: can not be followed ({error}); put the file itself there") from None
    snapshots = (parent for parent in root.parents if parent.name == "snapshots")
    roots = [root, *(parent.parent / "blobs" for parent in snapshots)]
    if not any(target.is_relative_to(one) for one in roots):
        raise ModelError(f"{path}: is a link to {target}, outside its folder; put the file itself there")
    if target.exists() and not target.is_file():
        raise ModelError(f"{path}: is not a regular file; get it again")
    return path
