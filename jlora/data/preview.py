"""The first rows of the data token by token, as the model gets them. Knows nothing of terminals or pages."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jlora.config import DataSection
from jlora.data.characters import characters
from jlora.data.encoding import encode_whole, fit
from jlora.data.formats import rows_of
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer
from jlora.files.text import clean

# Tokens of a sequence that are shown, half of them from its start; of what is cut off, so many.
SHOWN = 2048
SHOWN_CUT = 64

Mark = Literal["context", "trained", "cut", "gap"]


class Piece(NamedTuple):
    """A token; a `gap` stands for tokens left out, and its text says how many."""

    id: int
    text: str
    part: Mark
    special: bool


@dataclass(frozen=True)
class Shown:
    """A row: its sequences (chosen and rejected of a pair) as pieces, or why it is none.

    Attributes:
      tokens, trained: of all that the model gets. cut: tokens cut off at the end; of a text that is split, 0.
    """

    where: str
    sequences: list[list[Piece]]
    tokens: int = 0
    trained: int = 0
    cut: int = 0
    bad: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The row as JSON values."""
        return {
            "where": self.where, "tokens": self.tokens, "trained": self.trained, "cut": self.cut, "bad": self.bad,
            "sequences": [[piece._asdict() for piece in sequence] for sequence in self.sequences],
        }  # fmt: skip


def show_rows(source: str, count: int, tokenizer: Tokenizer, cfg: DataSection) -> list[Shown]:
    """The first rows of a file or data set."""
    shown = []
    if cfg.date is not None:
        tokenizer = tokenizer.on(cfg.date)
    for row in itertools.islice(rows_of(source, cfg), count):
        try:
            sequences = encode_whole(row, tokenizer, cfg)
            fit(sequences, cfg)
        except BadRow as bad:
            shown.append(Shown(row.where, [], bad=bad.message))
            continue
        splits = cfg.format == "text" and cfg.split_long
        kept = sequences if splits else [each.part(slice(cfg.longest)) for each in sequences]
        tokens = sum(len(each.ids) for each in kept)
        shown.append(
            Shown(
                row.where,
                [_pieces(tokenizer, *each[:2], len(some.ids)) for each, some in zip(sequences, kept, strict=True)],
                tokens,
                sum(int(each.trained.sum()) for each in kept),
                sum(len(each.ids) for each in sequences) - tokens,
            )
        )
    return shown


def _pieces(tokenizer: Tokenizer, ids: np.ndarray, trained: np.ndarray, limit: int) -> list[Piece]:
    """Pieces of a sequence, of which the model gets `limit` tokens, and no more than there are."""

    def part(first: int, last: int) -> list[Piece]:
        found = zip(range(first, last), characters(tokenizer, ids[first:last]), strict=True)
        return [
            Piece(
                int(ids[i]), clean(text.replace("\r", "")),
                "cut" if i >= limit else "trained" if trained[i] else "context", special,
            )
            for i, (text, special) in found
        ]  # fmt: skip

    def gap(count: int) -> list[Piece]:
        return [Piece(-1, f"{count:,} more tokens", "gap", False)] if count > 0 else []

    if limit > SHOWN:
        pieces = part(0, SHOWN // 2) + gap(limit - SHOWN) + part(limit - SHOWN // 2, limit)
    else:
        pieces = part(0, limit)
    last = min(len(ids), limit + SHOWN_CUT)
    return pieces + part(limit, last) + gap(len(ids) - last)
