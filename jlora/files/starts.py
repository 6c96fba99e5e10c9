"""The starts of a run, `starts.jsonl` in its folder: when each began, by which command, and where its paths lay.

A config keeps its paths as they were typed, which lead there only from the folder that the command ran in.
"""

from pathlib import Path
from typing import Any

from jlora.files.atomic import strict_json, write_text
from jlora.files.theirs import MAX_JSON, parse, text_of_theirs

NAME = "starts.jsonl"


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """What is written down of each start, the first one first; none where there is no such file.

    A start has `step`, which it went on from, `started`, `command`, `changes` to the config, as name -> [from, to], and
    `paths`, those of the config as they were typed -> absolute; each may be missing, or of another type.
    """
    try:
        lines = text_of_theirs(run_dir / NAME, MAX_JSON, "replace").splitlines()
    except (OSError, ValueError):
        return []
    return [start for line in lines if (start := parse(line))]


def add_start(run_dir: Path, start: dict[str, Any]) -> None:
    """Write a start down behind those before it; instead of them where it begins the run anew."""
    before = read_starts(run_dir) if start["step"] else []
    write_text(run_dir / NAME, "".join(f"{strict_json(each)}\n" for each in (*before, start)))


def places(run_dir: Path) -> dict[str, str]:
    """Where the paths of a run's config lay when it was trained: as they were typed -> absolute."""
    found: dict[str, str] = {}
    for start in read_starts(run_dir):
        paths = start.get("paths")
        found |= {k: v for k, v in paths.items() if isinstance(v, str)} if isinstance(paths, dict) else {}
    return found
