"""What a Python program may hear of a run while it goes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsFloat

from jlora.errors import ConfigError


@dataclass(frozen=True)
class Callbacks:
    """Functions that the training loop calls, in the process of `train`; one that raises ends the run.

    Attributes:
      on_step: of each logged step, with its number and its line of metrics.jsonl.
      on_eval: of each evaluation, with the step and its figures; what it returns, a dict of numbers, is logged
        beside them.
      on_save: of each checkpoint whose writing began, with the step and the folder that it will be.
    """

    on_step: Callable[[int, dict[str, Any]], None] = lambda step, line: None
    on_eval: Callable[[int, dict[str, Any]], dict[str, Any] | None] = lambda step, figures: None
    on_save: Callable[[int, Path], None] = lambda step, folder: None


def figures_of(returned: object, taken: dict[str, Any]) -> dict[str, float]:
    """What `on_eval` returned, as figures to log beside those that are measured.

    Raises:
      ConfigError: it is no dict of numbers by names that are free.
    """
    if returned is None:
        return {}
    if not isinstance(returned, dict):
        raise ConfigError(f"on_eval returned {type(returned).__name__}; let it return a dict of numbers, or None")
    figures = {}
    for name, value in returned.items():
        if not isinstance(name, str) or name in taken:
            raise ConfigError(f"on_eval returned a figure named {name!r}, which is none or taken; name it otherwise")
        if isinstance(value, str) or not isinstance(value, SupportsFloat):
            raise ConfigError(f"on_eval returned {name}={value!r:.50}; let it be a number")
        figures[name] = float(value)
    return figures
