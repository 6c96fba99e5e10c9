"""Examples -> packed rows -> batches, epoch after epoch, with a position that can be saved.

Owns packing and order. Knows nothing of files, formats or devices.
"""

import bisect
import math
import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import grain
import numpy as np

from jlora.config import Config, DataSection
from jlora.data.dataset import Dataset, View, epoch_order
from jlora.data.prompts import Example

# Examples whose lengths are Python's numbers at once, and packed ones that are kept beside those of two epochs.
CHUNK = 2**16
KEPT = 2**25
ENDLESS = 2**40  # batches: epochs follow each other without end; the trainer knows when to stop


class Batch(TypedDict):
    """A batch of packed rows; all int32 [B T] but `weights`, float32 [B T].

    `targets` are the next tokens, and `weights` say how much predicting the target counts in the loss.
    `segments` number the sequences within a row from 1 (0 is padding); `positions` restart in each.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


class Packed(View[list[int]]):
    """The examples of each row: `members`, int32 [n], row after row, of which row r has those from `starts[r]` on."""

    def __init__(self, members: np.ndarray, starts: np.ndarray):
        self.members, self.starts = members.astype(np.int32), starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def one(self, index: int) -> list[int]:
        """Examples of a row."""
        return self.members[self.starts[index] : self.starts[index + 1]].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def filled(self, multiple: int) -> "Packed":
        """With empty rows at the end, so that their number is a multiple."""
        return Packed(self.members, np.pad(self.starts, (0, -len(self) % multiple), mode="edge"))


def pack(lengths: Sequence[int] | np.ndarray, order: np.ndarray, max_length: int, packing: bool) -> Packed:
    """Assign examples to rows of `max_length` tokens, in the given order.

    Each goes into the fullest row that still has room (best fit), so short and long examples mix;
    without packing each has a row of its own.
    """
    if not packing:
        return Packed(order, np.arange(len(order) + 1))
    lengths = np.asarray(lengths)
    shortest = int(lengths.min(initial=max_length))
    row_of, count = np.empty(len(order), np.int32), 0
    by_room: dict[int, deque[int]] = {}  # room left -> rows, of which none is full for all examples
    rooms = 0  # bit r: by_room has r
    for start in range(0, len(order), CHUNK):  # Python's own numbers take up much memory, so few of them at once
        for place, length in enumerate(lengths[order[start : start + CHUNK]].tolist(), start):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                row = by_room[room].popleft()
                if not by_room[room]:
                    del by_room[room]
                    rooms ^= 1 << room
            else:
                row, room, count = count, max_length, count + 1
            row_of[place] = row
            left = room - length
            if left >= shortest:
                by_room.setdefault(left, deque()).append(row)
                rooms |= 1 << left
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))])
    return Packed(order[np.argsort(row_of, kind="stable")], starts)


class Origin(NamedTuple):
    """Where batches begin: before batch number `batch`, at row `row` of epoch `epoch`."""

    batch: int = 0
    epoch: int = 0
    row: int = 0


class Epochs:
    """Packed rows of epoch after epoch, each epoch in an order of its own, by random access.

    The order depends on the seed and the epoch alone. An epoch whose rows do not fill its last batch
    is filled with empty ones, so that every batch has the same shape and no example is dropped.
    """

    def __init__(
        self, dataset: Dataset, cfg: DataSection, batch_size: int, seed: int | None, origin: Origin | None = None
    ):
        """Epochs of a data set's rows.

        Args:
          seed: None keeps file order, for evaluation.
          origin: where this batch size, and these rows, begin: a run may change them on the way.
        """
        self._dataset, self._cfg, self._batch_size, self._seed = dataset, cfg, batch_size, seed
        self.origin = origin or Origin()
        self._lengths = dataset.lengths
        self._starts = [0]
        self._kept: dict[int, Packed] = {}
        self._lock = threading.Lock()

    def rows(self, epoch: int) -> Packed:
        """Example indices of each packed row of an epoch."""
        with self._lock:  # the iterator's threads ask at once, and each epoch is made once
            while len(self._starts) <= epoch + 1:
                rows = self._keep(len(self._starts) - 1)
                self._starts.append(self._starts[-1] + len(rows))
            return self._kept[epoch] if epoch in self._kept else self._keep(epoch)

    def _keep(self, epoch: int) -> Packed:
        """Pack an epoch; of those packed before, the oldest are forgotten where they are large."""
        order = np.arange(len(self._lengths))
        if self._seed is not None:
            order = epoch_order(self._dataset, epoch, self._seed)
        rows = pack(self._lengths, order, self._cfg.max_length, self._cfg.packing).filled(self._batch_size)
        self._kept[epoch] = rows
        while len(self._kept) > 2 and sum(len(each.members) for each in self._kept.values()) > KEPT:
            del self._kept[next(iter(self._kept))]
        return rows

    @property
    def steps_in_epoch(self) -> int:
        """Batches of the first epoch; the others have as many, give or take how rows pack."""
        return self._start(1) // self._batch_size

    def num_batches(self, epochs: float) -> int:
        """Batches in the first `epochs` epochs, those before the origin included; a part of one is rounded up."""
        before = math.ceil(epochs) - 1
        end = self._start(before) + (epochs - before) * (self._start(before + 1) - self._start(before))
        left = (end - self.first_row(self.origin.batch)) / self._batch_size
        return self.origin.batch + max(0, math.ceil(round(left, 6)))

    def first_row(self, batch: int) -> int:
        """The row that a batch begins with, counted from the first of epoch 0; of the origin's batch and later ones."""
        return self._start(self.origin.epoch) + self.origin.row + (batch - self.origin.batch) * self._batch_size

    def place(self, batch: int) -> Origin:
        """A batch as an origin, for another batch size."""
        row = self.first_row(batch)
        epoch = self._epoch_of(row)
        return Origin(batch, epoch, row - self._starts[epoch])

    def epoch_at(self, batch: int) -> float:
        """How many epochs the first `batch` batches are."""
        _, epoch, row = self.place(batch)
        return epoch + row / (self._starts[epoch + 1] - self._starts[epoch])

    def tokens_at(self, batch: int) -> int:
        """How many tokens the rows before a batch hold, from the first of epoch 0 on, padding left out."""
        total, rows_left, epoch = 0, self.first_row(batch), 0
        while rows_left > 0:
            rows = self.rows(epoch)
            members = rows.members[: rows.starts[min(rows_left, len(rows))]]
            total += int(self._lengths[members].sum(dtype=np.int64))
            rows_left, epoch = rows_left - len(rows), epoch + 1
        return total

    def tokens_in(self, batch: int) -> int:
        """How many tokens one batch holds, padding left out."""
        rows = range(self.first_row(batch), self.first_row(batch + 1))
        return sum(int(self._lengths[i]) for row in rows for i in self._members(row))

    def places_in(self, batch: int) -> list[str]:
        """Where the rows of the data stand that are in one batch."""
        rows = range(self.first_row(batch), self.first_row(batch + 1))
        return [self._dataset.places[i] for row in rows for i in self._members(row)]

    def __getitem__(self, index: int) -> Batch:
        return pack_row([self._dataset.examples[i] for i in self._members(index)], self._cfg.max_length)

    def _members(self, index: int) -> list[int]:
        epoch = self._epoch_of(index)
        return self.rows(epoch).one(index - self._starts[epoch])

    def _start(self, epoch: int) -> int:
        """The rows of all epochs before; one that was counted is not packed again, whether it is kept or not."""
        if len(self._starts) <= epoch:
            self.rows(epoch - 1)
        return self._starts[epoch]

    def _epoch_of(self, row: int) -> int:
        while self._starts[-1] <= row:
            self.rows(len(self._starts) - 1)
        return bisect.bisect_right(self._starts, row) - 1


def plan_steps(cfg: Config, train_data: Dataset, origin: Origin | None = None) -> tuple[Epochs, int]:
    """The order of a run's rows, and the steps that it takes to its end."""
    epochs = Epochs(train_data, cfg.data, cfg.training.batch_size, cfg.training.seed, origin)
    return epochs, cfg.training.max_steps or epochs.num_batches(cfg.training.epochs)


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
    for number, (ids, weights, _) in enumerate(sequences, 1):
        end = start + len(ids)
        row["tokens"][start:end] = ids
        row["targets"][start : end - 1] = ids[1:]
        row["weights"][start : end - 1] = weights[1:]
        row["segments"][start:end] = number
        row["positions"][start:end] = np.arange(len(ids))
        start = end
    return row


def batches(
    epochs: Epochs, batch_size: int, rows: np.ndarray | None = None, last: int | None = None
) -> grain.DatasetIterator:
    """Iterator over batches [B T]; `get_state` and `set_state` save and restore its position, counted in batches from
    the origin on.

    Args:
      rows: which rows of a batch are made, ascending; None makes all. The others belong to other processes.
      last: number of batches; None goes on without end.
    """
    wanted = np.arange(batch_size) if rows is None else rows

    def made(index: int) -> Batch:
        batch, row = divmod(index, len(wanted))
        return epochs[epochs.first_row(epochs.origin.batch + batch) + int(wanted[row])]

    source = grain.MapDataset.range((ENDLESS if last is None else last) * len(wanted)).map(made)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * len(wanted))
    return iter(source.batch(len(wanted), drop_remainder=True).to_iter_dataset(options))
