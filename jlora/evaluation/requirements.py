"""What must be installed to judge answers, asked for before anything large is imported."""

from jlora.errors import require_installed, with_extra


def require_scores() -> None:
    """Refuse to go on without the libraries that score answers.

    Raises:
      ConfigError: one is not installed.
    """
    require_installed("scoring answers", ("rouge-score", "sacrebleu"), with_extra("eval"))
