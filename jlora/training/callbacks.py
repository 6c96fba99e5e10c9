"""What a Python program may hear of a run while it goes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Callbacks:
    """Functions that the training loop calls, in the process of `train`; one that raises ends the run.

    Attributes:
      on_step: of each logged step, with its number and its line of metrics.jsonl.
      on_eval: of each evaluation, with the step and its figures; what it returns, a dict of numbers, is logged beside
        them.
      on_save: of each checkpoint whose writing began, with the step and the folder that it will be.
    """

    on_step: Callable[[int, dict[str, Any]], None] = lambda step, line: None
    on_eval: Callable[[int, dict[str, Any]], dict[str, Any] | None] = lambda step, figures: None
    on_save: Callable[[int, Path], None] = lambda step, folder: None
