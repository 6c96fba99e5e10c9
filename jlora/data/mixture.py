"""Several sources as one set of rows, and how many rows of each an epoch has.

A mixture's epoch has as many sequences as its sources have together, each source its weight's share of them. A source
is gone through in an order of its own, again and again, and an epoch goes on where the one before it stopped: none of
its rows comes again before all of them came, and over time shares are exact. grain's `mix` draws the next element from
one iterator after another; here rows are packed by an epoch's order of indices, which are made at once.
"""

import hashlib
import json
from collections import Counter

import numpy as np

from jlora.config import DataSource
from jlora.data.dataset import Chained, Dataset, FromSource


def join(sources: list[DataSource], datasets: list[Dataset]) -> Dataset:
    """The rows of all sources."""
    parts = tuple(
        FromSource(source.path, source.weight, len(rows.examples), rows.read, rows.truncated, dict(rows.dropped))
        for source, rows in zip(sources, datasets, strict=True)
    )
    identity = [[rows.digest, source.weight] for source, rows in zip(sources, datasets, strict=True)]
    return Dataset(
        Chained([rows.examples for rows in datasets]),
        sum(rows.read for rows in datasets),
        sum(rows.truncated for rows in datasets),
        sum((rows.dropped for rows in datasets), Counter()),
        Chained([rows.places for rows in datasets]),
        hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        parts,
        sum((rows.renamed for rows in datasets), Counter()),
        sum((rows.unused for rows in datasets), Counter()),
    )


def drawn(parts: tuple[FromSource, ...], epoch: int) -> list[tuple[int, int]]:
    """From where to where an epoch goes in each source's endless order of rows."""
    total = sum(part.examples for part in parts)
    weights = [part.examples if part.weight is None else part.weight for part in parts]
    shares = [weight / sum(weights) * total for weight in weights]
    return [(round(epoch * share), round((epoch + 1) * share)) for share in shares]


def epoch_order(dataset: Dataset, epoch: int, seed: int) -> np.ndarray:
    """The examples of an epoch in their order, int64 [n]; it depends on the seed and the epoch alone."""
    indices = np.arange(len(dataset.examples))
    if any(part.weight is not None for part in dataset.parts):
        found, start = [], 0
        for number, (part, (first, last)) in enumerate(zip(dataset.parts, drawn(dataset.parts, epoch), strict=True)):
            size = part.examples
            for again in range(first // size, -(-last // size)):  # each time through the source has its own order
                order = np.random.default_rng([seed, 2, number, again]).permutation(size)
                found.append(start + order[max(first - again * size, 0) : last - again * size])
            start += size
        indices = np.concatenate(found)
    return np.random.default_rng([seed, epoch]).permutation(indices)
