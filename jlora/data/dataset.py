"""Tokenised rows, and rows held out of them. Knows nothing of formats, packing or devices."""

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from jlora.errors import DataError
from jlora.prompts import Example


@dataclass
class Dataset:
    """Tokenised examples, none longer than the configured length.

    Attributes:
      examples: in file order; a long text is several.
      read, truncated: rows read, and rows cut at the end.
      dropped: reason -> rows dropped.
      places: where each example stands, such as `train.jsonl:12`.
      digest: SHA-256 of all token ids and trained flags.
    """

    examples: list[Example]
    read: int
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)
    digest: str = ""


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a random fraction of the examples (at least one, and one stays) for evaluation."""
    total = len(dataset.examples)
    if total < 2:
        raise DataError("data.eval is a fraction, but there is only one usable row to split")
    order = np.random.default_rng([seed, 1]).permutation(total)
    num_held = min(total - 1, max(1, round(total * fraction)))
    held = set(order[:num_held].tolist())
    both = list(zip(dataset.examples, dataset.places, strict=True))
    kept, kept_places = zip(*(pair for i, pair in enumerate(both) if i not in held), strict=True)
    out, out_places = zip(*(pair for i, pair in enumerate(both) if i in held), strict=True)
    train = replace(dataset, examples=list(kept), places=list(kept_places))
    return train, Dataset(list(out), len(out), places=list(out_places), digest=dataset.digest)
