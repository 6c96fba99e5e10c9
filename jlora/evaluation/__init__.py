"""How good the answers are, and what they cost."""

from jlora.errors import require_installed


def require_scores() -> None:
    """Refuse to go on without the libraries that score answers.

    Raises:
      ConfigError: one is not installed.
    """
    require_installed("scoring answers", ("rouge-score", "sacrebleu"), "'jlora[eval]'")
