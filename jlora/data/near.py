"""Held-out sequences that are nearly training ones, by MinHash over groups of three tokens.

`datasketch` hashes one sequence at a time in Python. Here a thousand are hashed at once, and training sequences, of
which there may be millions, are looked at once and not kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.data.checks import Check
from jlora.data.dataset import Dataset
from jlora.data.prompts import Example
from jlora.files.text import counted

# Tokens of a group; rows are shorter than the documents of which five are usual.
GROUP = 3
# Two sequences are nearly the same from this share of their groups on.
ALIKE = 0.6
# A group in more of the training sequences than this share, and these, is a template's, a prompt's or a language's.
COMMON, FEW, SAMPLE = 0.005, 3, 2000
# With fewer groups of its own a sequence is too short to tell; of a longer one than this its beginning is compared.
FEWEST, LONGEST = 8, 1024
# Hashes are compared band by band (of some band all are equal in 98 of 100 pairs at ALIKE), then all together.
BANDS, IN_BAND = 30, 4
# Sequences hashed at once; of a band, held-out ones that a training one is compared with; bits of a table's index.
AT_ONCE, MOST, BITS = 1024, 16, 25
# Pairs that are shown, and tokens of each around the place where the two part.
SHOWN, BEFORE, BEHIND = 5, 12, 48

_RANDOM = np.random.default_rng(0)
_MIX = _RANDOM.integers(2**63, size=GROUP, dtype=np.uint64) * 2 + 1
_FACTORS = (_RANDOM.integers(2**31, size=BANDS * IN_BAND, dtype=np.uint32) * 2 + 1).astype(np.uint32)


class Near(NamedTuple):
    """A held-out sequence, a training one that it nearly is, and about what share of their groups both have."""

    held: int
    trained: int
    share: float


class _Groups(NamedTuple):
    """The distinct groups of some sequences: uint32 [n], and whose each is, ascending, int64 [n]."""

    groups: np.ndarray
    owners: np.ndarray

    def where(self, kept: np.ndarray) -> "_Groups":
        """Those for which a bool [n] is true."""
        return _Groups(self.groups[kept], self.owners[kept])


def near_copies(train: Sequence[Example], held: Sequence[Example], exact: np.ndarray) -> list[Near]:
    """Held-out sequences that are nearly a training one, each with the first found, in order.

    Training sequences are read once, some at a time. What grows is an index of the held-out ones, some 0.4 KB each.

    Args:
      exact: bool [held], those that are left out, because they are in `train` as they are.
    """
    common = _table(_common(train))
    wanted = np.flatnonzero(~exact)
    index = _Index([_own(_groups(held, some), common) for some in _chunks(wanted)])
    found: dict[int, Near] = {}
    for some in _chunks(np.arange(len(train))) if index.size else ():
        rows = _own(_groups(train, some), common)
        for near in index.alike(rows):
            found.setdefault(near.held, near)
    return [found[number] for number in sorted(found)]


def _chunks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), AT_ONCE):
        yield numbers[start : start + AT_ONCE]


def _groups(examples: Sequence[Example], numbers: np.ndarray) -> _Groups:
    """The groups of the examples of some numbers, ascending int64."""
    rows = [examples[int(number)].ids[:LONGEST] for number in numbers]
    lengths = np.array([len(row) for row in rows])
    tokens = np.concatenate([*rows, np.zeros(GROUP - 1, np.int32)]).astype(np.uint64)
    whole = len(tokens) - GROUP + 1
    mixed = np.zeros(whole, np.uint64)
    for place, factor in enumerate(_MIX):
        mixed += tokens[place : place + whole] * factor
        mixed ^= mixed >> np.uint64(29)
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(whole)  # of the row, from each token on
    owners = np.repeat(np.arange(len(rows), dtype=np.uint64), lengths)
    keys = np.unique((owners << np.uint64(32) | mixed >> np.uint64(32))[left >= GROUP])
    return _Groups(keys.astype(np.uint32), numbers[(keys >> np.uint64(32)).astype(np.int64)])


def _common(train: Sequence[Example]) -> np.ndarray:
    """The groups that many training sequences have, by some of these, uint32 [n]."""
    numbers = np.unique(np.linspace(0, len(train) - 1, min(SAMPLE, len(train))).astype(np.int64))
    groups, counts = np.unique(
        np.concatenate([_groups(train, some).groups for some in _chunks(numbers)]), return_counts=True
    )
    return groups[counts > max(FEW, COMMON * len(numbers))]


def _table(groups: np.ndarray) -> np.ndarray:
    """Whether a group may be among some, bool by its first bits."""
    table = np.zeros(2**BITS, bool)
    table[groups >> (32 - BITS)] = True
    return table


def _own(rows: _Groups, common: np.ndarray) -> _Groups:
    """Groups that are not common, of the sequences that have enough of them."""
    rows = rows.where(~common[rows.groups >> (32 - BITS)])
    _, which, counts = np.unique(rows.owners, return_inverse=True, return_counts=True)
    return rows.where((counts >= FEWEST)[which])


def _hashes(rows: _Groups) -> tuple[np.ndarray, np.ndarray]:
    """The sequences, int64 [n], and the least of their groups under each hash, uint32 [BANDS * IN_BAND, n]."""
    owners, starts = np.unique(rows.owners, return_index=True)
    if not len(owners):
        return owners, np.zeros((len(_FACTORS), 0), np.uint32)
    return owners, np.stack([np.minimum.reduceat(rows.groups * factor, starts) for factor in _FACTORS])


def _bands(hashes: np.ndarray) -> np.ndarray:
    """One number for all hashes of a band, uint64 [BANDS, n]."""
    keys = np.zeros((BANDS, hashes.shape[1]), np.uint64)
    for place in range(IN_BAND):
        keys = keys * _MIX[0] + hashes[place::IN_BAND]
        keys ^= keys >> np.uint64(31)
    return keys


class _Index:
    """The held-out sequences, to be found by their bands.

    Attributes:
      size: how many there are.
    """

    def __init__(self, chunks: list[_Groups]):
        hashed = [_hashes(rows) for rows in chunks]
        empty = np.zeros(0, np.int64), np.zeros((len(_FACTORS), 0), np.uint32)
        self._numbers = np.concatenate([empty[0], *(numbers for numbers, _ in hashed)])
        self.size = len(self._numbers)
        # The last bits of a hash tell it from another.
        self._hashes = np.concatenate([empty[1].astype(np.uint8), *(each.astype(np.uint8) for _, each in hashed)], 1)
        keys = np.concatenate([_bands(each) for _, each in [empty, *hashed]], 1)
        self._order = np.argsort(keys, axis=1).astype(np.int32)
        self._keys = np.take_along_axis(keys, self._order, 1)
        self._table = _table(np.concatenate([np.zeros(0, np.uint32), *(rows.groups for rows in chunks)]))

    def alike(self, rows: _Groups) -> Iterator[Near]:
        """The pairs of a held-out sequence and one of these that are nearly the same."""
        _, which, counts = np.unique(rows.owners, return_inverse=True, return_counts=True)
        shared = np.bincount(which, self._table[rows.groups >> (32 - BITS)], len(counts))
        numbers, hashes = _hashes(rows.where((shared >= ALIKE * counts)[which]))
        pairs = []
        for keys, known, order in zip(_bands(hashes), self._keys, self._order, strict=True):
            first, last = np.searchsorted(known, keys, "left"), np.searchsorted(known, keys, "right")
            sizes = np.minimum(last - first, MOST)
            ours = np.repeat(np.arange(len(keys)), sizes)
            places = np.repeat(first - np.cumsum(sizes) + sizes, sizes) + np.arange(len(ours))
            pairs.append(np.stack([ours, order[places]]))
        ours, theirs = np.unique(np.concatenate(pairs, 1), axis=1)
        shares = (hashes.astype(np.uint8)[:, ours] == self._hashes[:, theirs]).mean(0)
        for one, other, share in zip(ours, theirs, shares, strict=True):
            if share >= ALIKE:
                yield Near(int(self._numbers[other]), int(numbers[one]), float(share))


def check_near(
    train_data: Dataset, eval_data: Dataset, exact: np.ndarray, decode: Callable[[np.ndarray], str]
) -> tuple[list[Check], list[dict[str, Any]]]:
    """A warning of held-out sequences that are nearly training ones, and the first such pairs as JSON has them.

    Args:
      exact: as for `near_copies`. decode: token ids to text.
    """
    found = near_copies(train_data.examples, eval_data.examples, exact)
    if not found:
        return [], []
    pairs: list[dict[str, Any]] = []
    for held, trained, share in found[:SHOWN]:
        ids = [eval_data.examples[held].ids, train_data.examples[trained].ids]
        both = min(map(len, ids))
        differ = np.flatnonzero(ids[0][:both] != ids[1][:both])
        place = int(differ[0]) if len(differ) else both
        start, end = max(0, place - BEFORE), place + BEHIND
        texts = ["… " * (start > 0) + decode(each[start:end]).strip() + " …" * (end < len(each)) for each in ids]
        pairs.append({"places": [eval_data.places[held], train_data.places[trained]], "share": share, "texts": texts})
    sentence = (
        f"data.eval: {len(found):,} of {counted(len(exact), 'sequence')} are nearly some of data.train, such as "
        f"{pairs[0]['places'][0]} and {pairs[0]['places'][1]}, so their loss flatters; take them out of one of the two"
    )
    return [Check("near_overlap", "warning", len(found), sentence)], pairs
