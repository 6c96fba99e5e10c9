"""The kinds of GGUF that llama.cpp's own program makes, which the `gguf` package reads but cannot make."""

import shutil
import subprocess
from pathlib import Path

from jlora.errors import ConfigError, ModelError

PROGRAM = "llama-quantize"
# Of the program's, those that jlora reads back; the largest first.
KINDS = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")


def require_program(kind: str, file: Path) -> None:
    """The program is on the path.

    Raises:
      ConfigError: it is not; with what to do instead.
    """
    if shutil.which(PROGRAM) is None:
        raise ConfigError(
            f"--quantize {kind}: is made by llama.cpp's {PROGRAM}, which is not on the path; put it there, or write "
            f"F16 and run where it is: {PROGRAM} {file} OUT.gguf {kind}"
        )


def quantize_file(first: Path, second: Path, kind: str) -> None:
    """Write `second`, of a kind, from `first`, an F16 file.

    Raises:
      ModelError: the program refuses it.
    """
    done = subprocess.run(
        [PROGRAM, str(first), str(second), kind],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        said = [line for line in (*done.stdout.splitlines(), *done.stderr.splitlines()) if line.strip()]
        last = next((line for line in reversed(said) if "error" in line.lower() or "failed" in line.lower()), "")
        last = last or (said[-1] if said else f"exit code {done.returncode}")
        raise ModelError(f"{second}: {PROGRAM} does not make {kind} of this model ({last.strip()}); write another kind")
