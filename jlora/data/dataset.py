"""Tokenised rows, wherever they are kept: of several sources, in the order of an epoch, and rows held out of them.

A mixture's epoch has as many sequences as its sources have together, each source its weight's share of them. A source
is gone through in an order of its own, again and again, and an epoch goes on where the one before it stopped: none of
its rows comes again before all of them came, and over time shares are exact. grain's `mix` draws the next element from
one iterator after another; here rows are packed by an epoch's order of indices, which are made at once.
Knows nothing of formats, packing or devices.
"""

import hashlib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from jlora.config import DataSource
from jlora.data.prompts import Example
from jlora.errors import DataError

T = TypeVar("T")


class View(Sequence[T], Generic[T]):
    """A sequence whose items are made when they are asked for; a slice is a list of them."""

    @abstractmethod
    def one(self, index: int) -> T:
        """The item at an index of 0 to len - 1."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.one(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.one(int(index) % len(self))


class Picked(View[T]):
    """Some items of another sequence, in the order of `indices`, int [n]."""

    def __init__(self, whole: Sequence[T], indices: np.ndarray):
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def one(self, index: int) -> T:
        return self.whole[int(self.indices[index])]


class Chained(View[T]):
    """Several sequences, one behind the other."""

    def __init__(self, parts: list[Sequence[T]]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def one(self, index: int) -> T:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number][index - int(self._ends[number]) + len(self.parts[number])]


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each example, int32 [n], without reading the tokens where they are stored."""
    match examples:
        case Picked(whole=whole, indices=indices):
            return lengths_of(whole)[indices]
        case Chained(parts=parts):
            return np.concatenate([lengths_of(part) for part in parts])
    stored = getattr(examples, "lengths", None)  # of `jlora.data.store.StoredExamples`
    return np.fromiter((len(example.ids) for example in examples), np.int32) if stored is None else stored


@dataclass(frozen=True)
class FromSource:
    """One source of a mixture.

    Attributes:
      weight: its share of an epoch is that of the weights' sum; None takes every example once.
      examples: how many of the dataset's are its; they stand behind those of the parts before.
      read, truncated, dropped: as in `Dataset`.
    """

    path: str
    weight: float | None
    examples: int
    read: int
    truncated: int
    dropped: dict[str, int]


@dataclass
class Dataset:
    """Tokenised examples, none longer than the configured length.

    Attributes:
      examples: in file order; a long text is several.
      read, truncated: rows read, and rows cut at the end.
      dropped: reason -> rows dropped.
      places: where each example stands, such as `train.jsonl:12`.
      digest: SHA-256 of all token ids and trained flags; of a mixture, of those of its sources and the weights.
      parts: the sources of a mixture, else none.
      renamed: (name in the rows, column of the format) -> rows where that name was read for the column.
      unused: column known elsewhere -> rows that have something in it, which is not read.
    """

    examples: Sequence[Example]
    read: int
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    places: Sequence[str] = field(default_factory=list)
    digest: str = ""
    parts: tuple[FromSource, ...] = ()
    renamed: Counter[tuple[str, str]] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [n]."""
        return lengths_of(self.examples)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a random fraction of the examples (at least one, and one stays) for evaluation.

    Raises:
      DataError: there is but one example, or none is left of a source.
    """
    total = len(dataset.examples)
    if total < 2:
        raise DataError("data.eval is a fraction, but there is only one usable row to split")
    order = np.random.default_rng([seed, 1]).permutation(total)
    num_held = min(total - 1, max(1, round(total * fraction)))
    held = np.zeros(total, bool)
    held[order[:num_held]] = True

    def some(which: np.ndarray) -> dict[str, Any]:
        return {"examples": Picked(dataset.examples, which), "places": Picked(dataset.places, which)}

    parts, start = [], 0
    for part in dataset.parts:
        left = int((~held[start : start + part.examples]).sum())
        if not left:
            raise DataError(f"data.eval={fraction} leaves no row of {part.path} to train on; hold fewer out")
        parts.append(replace(part, examples=left))
        start += part.examples
    train = replace(dataset, parts=tuple(parts), **some(np.flatnonzero(~held)))
    return train, Dataset(read=num_held, digest=dataset.digest, **some(np.flatnonzero(held)))


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
