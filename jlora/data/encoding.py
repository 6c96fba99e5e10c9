"""Rows -> tokenised examples: validation, truncation, and the data of a run. Knows nothing of batches or devices."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from jlora.config import Config, DataSection
from jlora.data.dataset import Dataset, hold_out, join
from jlora.data.formats import Columns, rows_of
from jlora.data.prompts import Encoded, Example, RowText, encode_pair, encode_texts, lay_out
from jlora.data.row import BadRow, Row
from jlora.data.store import Keep, content_key, stamp, stored
from jlora.data.tokens import Tokenizer
from jlora.errors import DataError

# Rows, or characters of them, that are tokenised at once.
AT_ONCE = 512
CHARACTERS = 2**19
# Bytes of files beyond which it is said that their tokens go into memory.
LARGE = 2**30
# Bad rows that a sentence tells, each with its place.
MOST_BAD = 10


def tokenize(source: str, tokenizer: Tokenizer, cfg: DataSection) -> Dataset:
    """Read and tokenise all rows; cut what is longer than `max_length` at its end, or split it if it is plain text.

    A row that cannot be trained on (malformed, no response, no trained token within the length) ends
    the run or is dropped and counted by reason, as `on_bad_row` says. With `cache_dir` the examples are kept there and
    stay on the disk; what is there already is not tokenised again.

    Raises:
      DataError: a bad row (file and line), or no row left.
    """
    if cfg.date is not None:
        tokenizer = tokenizer.on(cfg.date)
    if cfg.cache_dir is not None:
        before = stamp(source, cfg.split)

        def make(keep: Keep) -> Dataset:
            facts = _read_all(source, tokenizer, cfg, keep)
            if stamp(source, cfg.split) != before:
                raise DataError(f"{source}: changed while it was read; start again once it is whole")
            return facts

        return stored(Path(cfg.cache_dir), content_key(source, tokenizer, cfg), tokenizer.vocab_size, make)
    size = sum(size for _, size, _ in stamp(source, cfg.split))
    if size > LARGE:
        print(
            f"warning: {source}: the tokens of {size / 1e9:.1f} GB of rows are held in memory; "
            "data.cache_dir=FOLDER keeps them on the disk",
            file=sys.stderr,
        )
    examples: list[Example] = []
    places: list[str] = []

    def keep(some: list[Example], where: list[str]) -> None:
        examples.extend(some)
        places.extend(where)

    return replace(_read_all(source, tokenizer, cfg, keep), examples=examples, places=places)


def _read_all(source: str, tokenizer: Tokenizer, cfg: DataSection, keep: Keep) -> Dataset:
    """Hand all examples with their places over to `keep`, some at a time; the dataset returned has the rest."""
    columns = Columns(cfg.format, cfg.columns)
    facts = Dataset(examples=[], read=0, renamed=columns.renamed, unused=columns.unused)
    bad_rows: dict[str, list[str]] = {}  # what is wrong -> where
    empty = True
    digest = hashlib.sha256()
    for group in _grouped(rows_of(source, cfg, columns), tokenizer, cfg):
        examples: list[Example] = []
        places: list[str] = []
        for row, found in group:
            facts.read += 1
            try:
                if isinstance(found, BadRow):
                    raise found
                some, truncated = fit(found, cfg)
            except BadRow as bad:
                facts.dropped[bad.reason] += 1
                if facts.dropped.total() <= MOST_BAD:
                    bad_rows.setdefault(bad.message, []).append(row.where)
                continue
            facts.truncated += truncated
            examples += some
            places += [row.where] * len(some)
            for example in some:
                digest.update(example.digested())
        if examples and not (bad_rows and cfg.on_bad_row == "error"):  # else the rest is read for its bad rows alone
            keep(examples, places)
        empty = empty and not examples
    num_bad = facts.dropped.total()
    told = "; ".join(f"{', '.join(places)}: {message}" for message, places in bad_rows.items())
    told += f"; {num_bad - MOST_BAD:,} more bad rows" if num_bad > MOST_BAD else ""
    if empty:
        raise DataError(f"{source}: holds no usable row" + f"; all {num_bad:,} are bad: {told}" * (num_bad > 0))
    if bad_rows and cfg.on_bad_row == "error":
        raise DataError(f"{told}; fix {'them' if num_bad > 1 else 'it'}, or drop such rows (data.on_bad_row=skip)")
    facts.digest = digest.hexdigest()
    return facts


def split(example: Example, length: int) -> list[Example]:
    """A sequence in pieces of at most `length` tokens, each beginning with the last token of the one before it.

    So every token is trained once, as in the whole: a piece's first token is predicted from nothing.
    """
    starts = range(0, max(1, len(example.ids) - 1), length - 1)
    return [example.part(slice(i, i + length)) for i in starts]


def encode_whole(row: Row, tokenizer: Tokenizer, cfg: DataSection) -> list[Example]:
    """The sequences of a row before anything is cut off: one, or the two of a pair.

    Raises:
      BadRow: it cannot be used.
    """
    ((_, found),) = _encode([(row, _lay_out(row, tokenizer, cfg))], tokenizer)
    if isinstance(found, BadRow):
        raise found
    return found


def _grouped(rows: Iterator[Row], tokenizer: Tokenizer, cfg: DataSection) -> Iterator[list[tuple[Row, Encoded]]]:
    """Rows with their sequences, as many together as are tokenised at once."""
    waiting: list[tuple[Row, RowText | Encoded]] = []
    characters = 0
    for row in rows:
        laid = _lay_out(row, tokenizer, cfg)
        waiting.append((row, laid))
        characters += len(laid.text) if isinstance(laid, RowText) else 0
        if len(waiting) == AT_ONCE or characters > CHARACTERS:
            yield _encode(waiting, tokenizer)
            waiting, characters = [], 0
    if waiting:
        yield _encode(waiting, tokenizer)


def _lay_out(row: Row, tokenizer: Tokenizer, cfg: DataSection) -> RowText | Encoded:
    if isinstance(row.value, BadRow):
        return row.value
    try:
        if cfg.format == "preference":
            return [*encode_pair(tokenizer, row.value)]
        return lay_out(tokenizer, row.value, format=cfg.format, prompt=cfg.prompt, counted=cfg.counted)
    except BadRow as bad:
        return bad


def _encode(waiting: list[tuple[Row, RowText | Encoded]], tokenizer: Tokenizer) -> list[tuple[Row, Encoded]]:
    encoded = iter(encode_texts(tokenizer, [laid for _, laid in waiting if isinstance(laid, RowText)]))
    return [(row, next(encoded) if isinstance(laid, RowText) else laid) for row, laid in waiting]


def fit(sequences: list[Example], cfg: DataSection) -> tuple[list[Example], bool]:
    """The examples of a row's sequences, none too long, and whether something was cut off.

    Raises:
      BadRow: no trained token is left, or both answers of a pair are equal.
    """
    limit = cfg.longest
    if cfg.format == "text" and cfg.split_long:
        return split(sequences[0], limit), False
    truncated = any(len(sequence.ids) > limit for sequence in sequences)
    cut = [sequence.part(slice(limit)) for sequence in sequences]
    if not all(sequence.weights[1:].any() for sequence in cut):  # the first token is predicted from nothing
        if truncated:
            raise BadRow(
                "prompt_too_long",
                f"the prompt alone fills {'half of ' * (limit < cfg.max_length)}data.max_length={cfg.max_length} "
                "tokens, so no token would be trained",
            )
        raise BadRow("no_trained_token", "no token of the row would be trained")
    if len(cut) == 1:
        return cut, truncated
    chosen, rejected = cut
    if np.array_equal(chosen.ids, rejected.ids):
        raise BadRow("equal_answers", f"cut at {limit} tokens (half of data.max_length), both answers are equal")
    ids, weights = np.concatenate([chosen.ids, rejected.ids]), np.concatenate([chosen.weights, rejected.weights])
    return [Example(ids, weights, len(chosen.ids))], truncated


def read_train(cfg: DataSection, tokenizer: Tokenizer) -> Dataset:
    """The rows of `data.train`, held-out ones included where they are a fraction of it."""
    if isinstance(cfg.train, str):
        return tokenize(cfg.train, tokenizer, cfg)
    return join(cfg.train, [tokenize(source.path, tokenizer, cfg) for source in cfg.train])


def read_data(cfg: Config, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows where the config has some."""
    train_data = read_train(cfg.data, tokenizer)
    match cfg.data.eval:
        case None:
            return train_data, None
        case float(fraction):
            return hold_out(train_data, fraction, cfg.training.seed)
        case source:
            return train_data, tokenize(source, tokenizer, cfg.data.held_out)
