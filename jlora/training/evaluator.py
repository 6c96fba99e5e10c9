"""The loss of held-out rows, during training and after it, and whether it still falls."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jlora.config import DataSection
from jlora.data import packing
from jlora.data.dataset import Dataset
from jlora.data.packing import Epochs
from jlora.model.adapter import Adapter
from jlora.model.llama import Decoder
from jlora.model.sharding import local_rows, place_rows
from jlora.training.step import Forward, make_eval_step


class Evaluator:
    """The objective of any base and adapter on one set of rows."""

    def __init__(self, dataset: Dataset, cfg: DataSection, batch_size: int, forward: Forward, mesh: jax.sharding.Mesh):
        self._batch_size, self._mesh = batch_size, mesh
        self._epochs = Epochs(dataset, cfg, batch_size, seed=None)
        self._step = make_eval_step(forward)
        self._pairs = forward.objective.name != "sft"

    def mean_loss(self, base: Decoder, adapter: Adapter) -> tuple[float, int]:
        """Mean loss, over trained tokens by weight in nats or over pairs, and their number."""
        figures = self.measure(base, adapter)
        return figures["loss"], figures["pairs" if self._pairs else "tokens"]

    def measure(
        self,
        base: Decoder,
        adapter: Adapter,
        reference: Adapter | None = None,
        on_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """{"loss", "perplexity", "tokens"} over trained tokens; of an objective on pairs {"loss", "pairs"} and rewards.

        With `Forward.token_accuracy` also {"token_accuracy"}, the share of trained tokens that are the likeliest.

        Args:
          reference: as for `jlora.training.step.Forward.loss`.
          on_batch: called after every batch.
        """
        totals: dict[str, float] = {}
        rows, last = local_rows(self._mesh, self._batch_size), self._epochs.num_batches(1)
        for batch in packing.batches(self._epochs, self._batch_size, rows, last=last):
            on_devices = {name: place_rows(array, self._mesh) for name, array in batch.items()}
            loss, count, sums = self._step(base, adapter, reference, on_devices)
            for name, value in {"loss": loss, "count": count, **sums}.items():
                totals[name] = totals.get(name, 0.0) + value.item()
            on_batch()
        number, tokens = totals.pop("count"), totals.pop("tokens")
        means = {name: value / number for name, value in totals.items()}
        if self._pairs:
            return means | {"pairs": int(number)}
        perplexity = math.exp(means["loss"]) if means["loss"] < 700.0 else math.inf  # which does not fit a float
        return means | {"perplexity": perplexity, "tokens": int(tokens)}


def describe_figures(figures: dict[str, Any]) -> str:
    """What `Evaluator.measure` found, in a line."""
    if "pairs" in figures:
        right = figures["rewards/accuracies"]
        return f"loss {figures['loss']:.4f}, {right:.1%} of {figures['pairs']} pairs the right way round"
    right = f", {figures['token_accuracy']:.1%} right" if "token_accuracy" in figures else ""
    return f"loss {figures['loss']:.4f}, perplexity {figures['perplexity']:.3f}{right} over {figures['tokens']} tokens"


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
