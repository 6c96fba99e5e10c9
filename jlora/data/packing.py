"""Examples -> packed rows -> batches, epoch after epoch, with a position that can be saved.

Owns packing and order. Knows nothing of files, formats or devices.
"""

import threading
from dataclasses import dataclass
from typing import TypedDict

import grain
import numpy as np

from jlora.config import DataSection
from jlora.data.dataset import Dataset
from jlora.prompts import Example


class Batch(TypedDict):
    """A batch of packed rows; all int32 [B T] but `weights`, float32 [B T].

    `targets` are the next tokens, and `weights` is 1 where predicting the target counts in the loss.
    `segments` number the sequences within a row from 1 (0 is padding); `positions` restart in each.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


def pack(lengths: list[int], order: np.ndarray, max_length: int, packing: bool) -> list[list[int]]:
    """Assign examples to rows of `max_length` tokens, in the given order.

    Each goes into the fullest row that still has room (best fit), so short and long examples mix;
    without packing each has a row of its own.
    """
    if not packing:
        return [[int(i)] for i in order]
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room left -> rows
    for i in order.tolist():
        length = lengths[i]
        room = next((r for r in range(length, max_length + 1) if by_room[r]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, max_length
        else:
            row = by_room[room].pop(0)
        rows[row].append(i)
        by_room[room - length].append(row)
    return rows


class Epochs:
    """Packed rows of epoch after epoch, each epoch in an order of its own, by random access.

    The order depends on the seed and the epoch alone. An epoch whose rows do not fill its last batch
    is filled with empty ones, so that every batch has the same shape and no example is dropped.
    """

    def __init__(self, dataset: Dataset, cfg: DataSection, batch_size: int, seed: int | None):
        """Args: seed: None keeps file order, for evaluation."""
        self._dataset, self._cfg, self._batch_size, self._seed = dataset, cfg, batch_size, seed
        self._lengths = [len(example.ids) for example in dataset.examples]
        self._starts = [0]
        self._rows: list[list[list[int]]] = []
        self._lock = threading.Lock()

    def rows(self, epoch: int) -> list[list[int]]:
        """Example indices of each packed row of an epoch."""
        with self._lock:  # the iterator's threads ask at once, and each epoch is made once
            while len(self._rows) <= epoch:
                order = np.arange(len(self._lengths))
                if self._seed is not None:
                    order = np.random.default_rng([self._seed, len(self._rows)]).permutation(order)
                rows = pack(self._lengths, order, self._cfg.max_length, self._cfg.packing)
                rows += [[]] * (-len(rows) % self._batch_size)
                self._rows.append(rows)
                self._starts.append(self._starts[-1] + len(rows))
            return self._rows[epoch]

    def num_batches(self, epochs: int) -> int:
        """Batches in the first `epochs` epochs."""
        self.rows(epochs - 1)
        return self._starts[epochs] // self._batch_size

    def epoch_at(self, batch: int) -> float:
        """How many epochs the first `batch` batches are."""
        row, epoch = batch * self._batch_size, 0
        while self._starts[epoch] + len(self.rows(epoch)) <= row:
            epoch += 1
        return epoch + (row - self._starts[epoch]) / len(self.rows(epoch))

    def tokens_at(self, batch: int) -> int:
        """How many tokens the first `batch` batches hold, padding left out."""
        total, rows_left, epoch = 0, batch * self._batch_size, 0
        while rows_left > 0:
            rows = self.rows(epoch)[:rows_left]
            total += sum(self._lengths[i] for row in rows for i in row)
            rows_left, epoch = rows_left - len(rows), epoch + 1
        return total

    def tokens_in(self, batch: int) -> int:
        """How many tokens one batch holds, padding left out."""
        rows = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        return sum(self._lengths[i] for row in rows for i in self._members(row))

    def places_in(self, batch: int) -> list[str]:
        """Where the rows of the data stand that are in one batch."""
        rows = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        return [self._dataset.places[i] for row in rows for i in self._members(row)]

    def __len__(self) -> int:
        return 2**40  # epochs follow each other without end; the trainer knows when to stop

    def __getitem__(self, index: int) -> Batch:
        return pack_row([self._dataset.examples[i] for i in self._members(index)], self._cfg.max_length)

    def _members(self, index: int) -> list[int]:
        epoch = 0
        while self._starts[epoch] + len(self.rows(epoch)) <= index:
            epoch += 1
        return self.rows(epoch)[index - self._starts[epoch]]


def pack_row(examples: list[Example], length: int) -> Batch:
    """One packed row, arrays of [T]."""
    row = Batch(
        tokens=np.zeros(length, np.int32),
        targets=np.zeros(length, np.int32),
        weights=np.zeros(length, np.float32),
        segments=np.zeros(length, np.int32),
        positions=np.zeros(length, np.int32),
    )
    start = 0
    sequences = [sequence for example in examples for sequence in example.sequences()]
    for number, (ids, trained, _) in enumerate(sequences, 1):
        end = start + len(ids)
        row["tokens"][start:end] = ids
        row["targets"][start : end - 1] = ids[1:]
        row["weights"][start : end - 1] = trained[1:]
        row["segments"][start:end] = number
        row["positions"][start:end] = np.arange(len(ids))
        start = end
    return row


@dataclass(frozen=True)
class _Rows:
    """The rows of each batch that this process needs, one after another."""

    epochs: Epochs
    batch_size: int
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.epochs) // self.batch_size * len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        batch, row = divmod(index, len(self.rows))
        return self.epochs[batch * self.batch_size + int(self.rows[row])]


def batches(
    epochs: Epochs, batch_size: int, rows: np.ndarray | None = None, last: int | None = None
) -> grain.DatasetIterator:
    """Iterator over batches [B T]; `get_state` and `set_state` save and restore its position, counted in batches.

    Args:
      rows: which rows of a batch are made, ascending; None makes all. The others belong to other processes.
      last: number of batches; None goes on without end.
    """
    wanted = np.arange(batch_size) if rows is None else rows
    source = grain.MapDataset.source(_Rows(epochs, batch_size, wanted))
    if last is not None:
        source = source[: last * len(wanted)]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * len(wanted))
    return iter(source.batch(len(wanted), drop_remainder=True).to_iter_dataset(options))
