"""Rows -> tokenised examples: validation, truncation, and the data of a run. Knows nothing of batches or devices."""

import hashlib

import numpy as np

from jlora.config import Config, DataSection
from jlora.data.dataset import Dataset, hold_out
from jlora.errors import DataError
from jlora.prompts import BadRow, Example, encode_pair, encode_row
from jlora.rows import Row, read_rows
from jlora.tokens import Tokenizer


def tokenize(source: str, tokenizer: Tokenizer, cfg: DataSection) -> Dataset:
    """Read and tokenise all rows; cut what is longer than `max_length` at its end, or split it if it is plain text.

    A row that can not be trained on (malformed, no response, no trained token within the length) ends
    the run or is dropped and counted by reason, as `on_bad_row` says.

    Raises:
      DataError: a bad row (file and line), or no row left.
    """
    dataset = Dataset(examples=[], read=0)
    first_bad: str | None = None
    digest = hashlib.sha256()
    for row in read_rows(source, cfg.split):
        dataset.read += 1
        try:
            examples, truncated = fit(encode_whole(row, tokenizer, cfg), cfg)
        except BadRow as bad:
            dataset.dropped[bad.reason] += 1
            first_bad = first_bad or f"{row.where}: {bad.message}"
            continue
        dataset.truncated += truncated
        dataset.examples += examples
        dataset.places += [row.where] * len(examples)
        for example in examples:
            digest.update(example.ids.tobytes() + example.trained.tobytes() + b"|")
    num_bad = sum(dataset.dropped.values())
    if first_bad and cfg.on_bad_row == "error":
        others = f" ({num_bad - 1} more bad rows)" if num_bad > 1 else ""
        raise DataError(f"{first_bad}{others}; mend it, or drop such rows (data.on_bad_row=skip, or --on-bad-row skip)")
    if not dataset.examples:
        why = f"; all {num_bad} rows were dropped, the first at {first_bad}" if first_bad else ""
        raise DataError(f"{source}: holds no usable row{why}")
    dataset.digest = digest.hexdigest()
    return dataset


def split(example: Example, length: int) -> list[Example]:
    """A sequence in pieces of at most `length` tokens, each beginning with the last token of the one before it.

    So every token is trained once, as in the whole: a piece's first token is predicted from nothing.
    """
    starts = range(0, max(1, len(example.ids) - 1), length - 1)
    return [Example(example.ids[i : i + length], example.trained[i : i + length]) for i in starts]


def encode_whole(row: Row, tokenizer: Tokenizer, cfg: DataSection) -> list[Example]:
    """The sequences of a row before anything is cut off: one, or the two of a pair.

    Raises:
      BadRow: it can not be used.
    """
    if isinstance(row.value, BadRow):
        raise row.value
    if not isinstance(row.value, dict):
        raise BadRow("wrong_type", f"a row must be a JSON object, not {type(row.value).__name__}")
    if cfg.format == "preference":
        return [*encode_pair(tokenizer, row.value)]
    return [encode_row(tokenizer, row.value, format=cfg.format, prompt=cfg.prompt, train_on=cfg.train_on)]


def fit(sequences: list[Example], cfg: DataSection) -> tuple[list[Example], bool]:
    """The examples of a row's sequences, none too long, and whether something was cut off.

    Raises:
      BadRow: no trained token is left, or both answers of a pair are equal.
    """
    limit = cfg.longest
    if cfg.format == "text" and cfg.split_long:
        return split(sequences[0], limit), False
    truncated = any(len(sequence.ids) > limit for sequence in sequences)
    cut = [Example(sequence.ids[:limit], sequence.trained[:limit]) for sequence in sequences]
    if not all(sequence.trained[1:].any() for sequence in cut):  # the first token is predicted from nothing
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
    ids, trained = np.concatenate([chosen.ids, rejected.ids]), np.concatenate([chosen.trained, rejected.trained])
    return [Example(ids, trained, len(chosen.ids))], truncated


def read_data(cfg: Config, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows where the config has some."""
    train_data = tokenize(cfg.data.train, tokenizer, cfg.data)
    match cfg.data.eval:
        case None:
            return train_data, None
        case float(fraction):
            return hold_out(train_data, fraction, cfg.training.seed)
        case source:
            return train_data, tokenize(source, tokenizer, cfg.data)
