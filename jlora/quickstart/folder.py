"""The folder of a first run: rows, a config, and a base."""

import json
from importlib import resources
from pathlib import Path

from jlora.errors import ConfigError
from jlora.files.atomic import write_text
from jlora.quickstart.base import BASE, fetch_base

CONFIG = "quickstart.yaml"
FILES = ("README.md", "train.jsonl", "heldout.jsonl", "prompts.jsonl")


def write_folder(folder: str | Path, base: str | None = None) -> None:
    """Write the quickstart's files to `folder`, the config last.

    Args:
      base: hub name, folder or .gguf file of a chat model; None fetches one.

    Raises:
      ConfigError: the folder holds a quickstart. ModelError: the base cannot be fetched.
    """
    folder = Path(folder)
    if (folder / CONFIG).exists():
        raise ConfigError(f"{folder}: holds a {CONFIG} already; train with it, or name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if base is None:
        base = fetch_base(folder).name
    elif Path(base).exists():
        base = str(Path(base).resolve())
    ours = resources.files("jlora.quickstart")
    for name in FILES:
        (folder / name).write_bytes((ours / name).read_bytes())
    config = (ours / CONFIG).read_text(encoding="utf-8")
    write_text(folder / CONFIG, config if base == BASE else config.replace(BASE + "\n", f"{json.dumps(base)}\n"))
