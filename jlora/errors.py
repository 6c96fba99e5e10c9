"""The errors a user can cause, each with its exit code. Knows nothing of the rest of the package.

Every message is one sentence that says what is wrong, where, and what to do. `jlora.cli` turns
one into a line on stderr and the exit code below; anything else that is raised is a bug of ours (1).
"""

import importlib.util
import re
from collections.abc import Sequence

REPOSITORY = "https://github.com/jlora/jlora"  # where an extra is installed from
LONGEST = 3000  # characters: a value from the user's files may be of any length


class UserError(Exception):
    """Base class; never raised itself. The middle of a very long message is left out."""

    exit_code = 1

    def __init__(self, message: str = ""):
        half = LONGEST // 2
        super().__init__(message if len(message) <= LONGEST else f"{message[:half]} ... {message[-half:]}")


class ConfigError(UserError):
    """Bad usage or configuration."""

    exit_code = 2


class DataError(UserError):
    """Bad training, evaluation or prompt data."""

    exit_code = 3


class ModelError(UserError):
    """Bad base model, tokenizer, checkpoint or adapter."""

    exit_code = 4


def with_extra(name: str) -> str:
    """What follows `pip install` to add an extra of ours; the README has the same."""
    return f"'jlora[{name}] @ git+{REPOSITORY}'"


def require_installed(what: str, packages: Sequence[str], install: str) -> None:
    """Refuse to go on without packages of others.

    Args:
      what: needs them. install: what follows `pip install`.

    Raises:
      ConfigError: naming those that are not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise ConfigError(f"{what} needs {' and '.join(missing)}, not installed here; pip install {install}")


def require_scores() -> None:
    """Refuse to go on without the libraries that score answers; asked for before anything large is imported."""
    require_installed("scoring answers", ("rouge-score", "sacrebleu"), with_extra("eval"))


class MemoryExceeded(UserError):
    """The run does not fit on the device."""

    exit_code = 5


class NonFiniteError(UserError):
    """More steps than the configured limit were skipped, for what was not finite or for a spike of the loss."""

    exit_code = 6


class NothingTrained(UserError):
    """A run came to its end, and no step of it changed what it trains."""

    exit_code = 6


class HostLost(UserError):
    """Another process of the job was lost, or none makes steps any more."""

    exit_code = 7


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; no `Exception`, which somebody's code might catch."""

    exit_code = 130

    def __str__(self) -> str:
        return "interrupted"


class Stopped(Interrupted):
    """A signal asked a run to stop before it made a step."""

    exit_code = 75

    def __str__(self) -> str:
        return "stopped before a step was made, so there is nothing new to save; run the same command again"


def finding(error: Exception) -> str:
    """What an assertion of chex, or a library's error, says: at most 200 characters for a message to a user."""
    said = re.sub(r"^\[Chex\] Assertion \w+ failed: (Trees 0 and 1 differ in )?", "", " ".join(str(error).split()))
    return said.rstrip(".")[:200]
