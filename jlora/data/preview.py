"""The first rows of the data token by token, as the model gets them. Knows nothing of terminals or pages."""

import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from jlora.config import DataSection
from jlora.data.characters import characters
from jlora.data.encoding import encode_whole, fit
from jlora.data.formats import rows_of
from jlora.data.parts import Kind, parts_of
from jlora.data.prompts import Example, RowText, encode_texts
from jlora.data.row import BadRow, Row
from jlora.data.tokens import Tokenizer
from jlora.files.text import clean

# Tokens of a sequence that are shown, half of them from its start; of what is cut off, so many.
SHOWN = 2048
SHOWN_CUT = 64

Mark = Literal["context", "trained", "cut", "gap"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Piece(NamedTuple):
    """A token; a `gap` stands for tokens left out, and its text says how many.

    Attributes:
      kind: of a chat, whether it is of tools or of reasoning. weight: of its loss.
    """

    id: int
    text: str
    part: Mark
    special: bool
    kind: Kind = ""
    weight: float = 0.0


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
                [
                    _pieces(tokenizer, each, _kinds(tokenizer, row, cfg, len(each.ids)), len(some.ids))
                    for each, some in zip(sequences, kept, strict=True)
                ],
                tokens,
                sum(int(each.trained.sum()) for each in kept),
                sum(len(each.ids) for each in sequences) - tokens,
            )
        )
    return shown


def _kinds(tokenizer: Tokenizer, row: Row, cfg: DataSection, length: int) -> list[Kind]:
    """The kind of each of so many tokens of a row; none where it is not a chat of one sequence."""
    plain: list[Kind] = [""] * length
    if cfg.format not in ("messages", "sharegpt"):
        return plain
    text, parts = parts_of(tokenizer, row.value, cfg.format, cfg.reasoning)
    (found,) = encode_texts(tokenizer, [RowText(text, [(*part[:2], KINDS.index(part[2])) for part in parts], None)])
    if isinstance(found, BadRow):  # there are no such parts
        return plain
    first: Kind = next((kind for start, _, kind in parts if start == 0), "")  # no loss counts a first token
    return [first, *(KINDS[int(number)] for number in found[0].weights[1:])]


def _pieces(tokenizer: Tokenizer, example: Example, kinds: list[Kind], limit: int) -> list[Piece]:
    """Pieces of a sequence, of which the model gets `limit` tokens, and no more than there are."""
    ids, trained = example.ids, example.trained

    def part(first: int, last: int) -> list[Piece]:
        found = zip(range(first, last), characters(tokenizer, ids[first:last]), strict=True)
        return [
            Piece(
                int(ids[i]), clean(text.replace("\r", "")),
                "cut" if i >= limit else "trained" if trained[i] else "context", special,
                kinds[i], float(example.weights[i]),
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
