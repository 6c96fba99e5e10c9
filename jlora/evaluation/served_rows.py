"""A run's held-out rows as a server is asked for them. Knows nothing of servers or models."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jlora.config import Config, DataSection
from jlora.data.dataset import hold_out
from jlora.data.encoding import encode_whole, read_train
from jlora.data.formats import rows_of
from jlora.data.prompts import Asked, ask, lay_out, reference_answer
from jlora.data.row import BadRow, Row
from jlora.data.speakers import Turn, turns
from jlora.data.tokens import Tokenizer
from jlora.errors import DataError

# Rows among which the longest is looked for: what a server's context cuts shows on it.
LOOKED_AT = 256


@dataclass(frozen=True)
class Answered:
    """A row's own answer after its prompt, as far as the token that ends it.

    Attributes:
      ids: of `text` with what stands before it, int [n]. counted: whether predicting each is trained, bool [n].
    """

    text: str
    ids: list[int]
    counted: np.ndarray


@dataclass(frozen=True)
class ServedRow:
    """A row to ask a server for.

    Attributes:
      where: such as held_out.jsonl:3.
      shown: its prompt for people. reference: the answer that the row gives; None where it gives none.
      answered: None of pairs, and where the row ends with no token that ends an answer.
    """

    where: str
    asked: Asked
    shown: list[Turn]
    reference: str | None
    answered: Answered | None


def held_out_rows(cfg: Config, tokenizer: Tokenizer, stops: list[int], most: int) -> tuple[list[ServedRow], bool]:
    """The first rows that a run held out, and the longest of some more; whether they are held out, or trained on.

    Args:
      tokenizer: that writes the day of the run, where its template writes one. stops: ids that end an answer.

    Raises:
      DataError: the rows are gone, or none is as long as the run trained.
    """
    found: list[tuple[int, ServedRow]] = []
    for row in _rows(cfg, tokenizer):
        try:
            found.append(_served(row, tokenizer, cfg.data, stops))
        except BadRow:  # or cut in training; others remain
            continue
        if len(found) == LOOKED_AT:
            break
    if not found:
        raise DataError(f"{cfg.output_dir}: no held-out row can be asked for; are the rows of the run still there?")
    longest = max(range(len(found)), key=lambda i: found[i][0])
    chosen = sorted({*range(min(most, len(found))), longest})
    if len(chosen) > most:  # in place of the last of the first
        chosen.remove(most - 1 if most > 1 else 0)
    return [found[i][1] for i in chosen], cfg.data.eval is not None


def _rows(cfg: Config, tokenizer: Tokenizer) -> Iterator[Row]:
    data = cfg.data
    if isinstance(data.eval, str):
        yield from rows_of(data.eval, data.held_out)
        return
    places: set[str] | None = None
    if isinstance(data.eval, float):
        places = set(hold_out(read_train(data, tokenizer), data.eval, cfg.training.seed)[1].places)
    for source in data.sources:
        yield from (row for row in rows_of(source.path, data) if places is None or row.where in places)


def _served(row: Row, tokenizer: Tokenizer, data: DataSection, stops: list[int]) -> tuple[int, ServedRow]:
    """The tokens of a row, and how it is asked for.

    Raises:
      BadRow: it cannot be trained on, or was cut.
    """
    whole = encode_whole(row, tokenizer, data)
    length = max(len(sequence.ids) for sequence in whole)
    if length > data.longest:
        raise BadRow("too_long", "it was cut in training")
    form = {"format": data.format, "prompt": data.prompt}
    asked = ask(tokenizer, row.value, **form)
    try:
        reference = reference_answer(row.value, format=data.format)
    except BadRow:
        reference = None
    answered = None
    if data.format != "preference":
        text = lay_out(tokenizer, row.value, counted=data.counted, **form).text
        answered = _answered(text, whole[0].ids.tolist(), whole[0].trained, tokenizer, stops)
    shown = turns(tokenizer, asked.ids) or [Turn("", asked.text)]
    return length, ServedRow(row.where, asked, shown, reference, answered)


def _answered(
    text: str, ids: list[int], trained: np.ndarray, tokenizer: Tokenizer, stops: list[int]
) -> Answered | None:
    """The row without the token that ends it, if the rest of its text has the rest of its ids."""
    ends = [i for i, token in enumerate(ids) if token in stops and trained[i]]
    if not ends:
        return None
    name = tokenizer.backend.name(ids[ends[-1]])
    at = text.rfind(name)
    text = text[:at] if at > 0 else text
    again, kept = tokenizer.encode(text), ids[: ends[-1]]
    if again not in (kept, kept[1:] if kept[:1] == [tokenizer.bos_id] else None):
        return None
    return Answered(text, kept, np.asarray(trained[: len(kept)]))


def sent(text: str, tokenizer: Tokenizer) -> str:
    """A text as a server is to get it: without the BOS that the server adds, as the tokenizer does."""
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if tokenizer.add_bos and bos else text


def on_day(cfg: Config, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as the run had it, whose chat template may write a day."""
    return tokenizer if cfg.data.date is None else tokenizer.on(cfg.data.date)
