"""Early stopping: whether the held-out loss still falls, as far as the evaluations of a run have shown."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class Stopping:
    """What a run remembers of its evaluations; the one before its first step is none of them.

    As transformers' `EarlyStoppingCallback`: an evaluation counts where its loss is lower than the lowest before it, by
    more than `min_delta`; after `patience` in a row that do not, the run is over.

    Attributes:
      patience: None never stops a run.
      min_delta: in nats.
      lowest: the lowest loss so far.
      waited: evaluations in a row that did not count.
    """

    patience: int | None
    min_delta: float
    lowest: float = math.inf
    waited: int = 0

    @property
    def over(self) -> bool:
        """Whether the run has waited long enough."""
        return self.patience is not None and self.waited >= self.patience

    def saw(self, loss: float) -> bool:
        """Take note of an evaluation; whether its loss is the lowest so far."""
        counts = self.lowest - loss > self.min_delta
        self.waited = 0 if counts else self.waited + 1
        lower = loss < self.lowest
        self.lowest = loss if lower else self.lowest
        return lower

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON."""
        return {"lowest": None if math.isinf(self.lowest) else self.lowest, "waited": self.waited}

    def set_state(self, state: dict[str, Any]) -> None:
        """Bring it back to where `get_state` was asked."""
        self.lowest = math.inf if state["lowest"] is None else state["lowest"]
        self.waited = state["waited"]
