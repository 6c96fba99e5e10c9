"""Ways to better answers, each with the same held-out rows: as the base asks for them, by examples, by training.

Owns which rows are held out, trained on and shown as examples, and how a question looks with examples before it. Knows
nothing of models or of how a strategy is run.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jlora.config import Config, DataSection
from jlora.data import encoding
from jlora.data.dataset import Dataset, hold_out
from jlora.data.formats import rows_of
from jlora.data.prompts import (
    Example,
    encode_prompt,
    encode_row,
    reference_answer,
    shots_separator,
    shown_prompt,
    with_shots,
)
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer
from jlora.errors import DataError
from jlora.inference.answers import Question

Fields = dict[str, Any]


@dataclass(frozen=True)
class Strategy:
    """One way: an adapter trained on so many `rows`, so many `shots` in the prompt, or neither."""

    shots: int = 0
    rows: int = 0

    @property
    def key(self) -> str:
        """A name for files."""
        return f"rows-{self.rows}" if self.rows else f"shots-{self.shots}" if self.shots else "bare"

    @property
    def short(self) -> str:
        """A name for axes."""
        return f"{self.rows:,}" if self.rows else f"{self.shots} ex." if self.shots else "bare"

    @property
    def name(self) -> str:
        """A name for people."""
        if self.rows:
            return f"trained on {self.rows:,} rows"
        examples = "example" if self.shots == 1 else "examples"
        return f"{self.shots} {examples} in the prompt" if self.shots else "bare instruction"


@dataclass(frozen=True)
class Rows:
    """The task: rows to learn from, in the order in which they are taken, and rows to judge by.

    Attributes:
      left_out: training rows that equal a held-out row.
    """

    train: list[Fields]
    heldout: list[Fields]
    left_out: int

    def text(self, rows: list[Fields]) -> str:
        """Rows as JSONL."""
        return "".join(_line(row) + "\n" for row in rows)


def _line(row: Fields) -> str:
    return json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)


def choose(shots: list[int], rows: list[int], available: int) -> list[Strategy]:
    """The strategies in order of effort; of more rows than there are, all that there are."""
    sizes = sorted({min(count, available) for count in rows})
    return [Strategy(), *(Strategy(shots=n) for n in sorted({*shots})), *(Strategy(rows=n) for n in sizes)]


def split_rows(cfg: Config, tokenizers: list[Tokenizer], most: int) -> Rows:
    """Rows that every base can use, drawn by the config's seed: at most `most` held out, the others to learn from.

    Fewer training rows are the first of more, so that the runs differ in nothing but how many they have.

    Raises:
      DataError: a bad row, or too few are left.
    """
    seed, source = cfg.training.seed, cfg.data.train
    assert isinstance(source, str), "checked by the command"
    train = _usable(source, tokenizers, cfg.data)
    if isinstance(cfg.data.eval, str):
        heldout = _usable(cfg.data.eval, tokenizers, cfg.data.held_out)
    else:
        assert cfg.data.eval is not None, "checked by the command"
        train, heldout = hold_out(train, cfg.data.eval, seed)
    learn = _drawn(source, train, cfg.data, [seed, 2])
    judged, section = (cfg.data.eval, cfg.data.held_out) if isinstance(cfg.data.eval, str) else (source, cfg.data)
    judge = _drawn(judged, heldout, section, [seed, 3])[:most]
    known = {_line(row) for row in judge}
    kept = [row for row in learn if _line(row) not in known]
    if not kept:
        raise DataError(f"{source}: every training row is among the held-out ones; set another data.eval")
    return Rows(kept, judge, len(learn) - len(kept))


def _usable(source: str, tokenizers: list[Tokenizer], section: DataSection) -> Dataset:
    """The rows that all tokenizers can train on, as the first one's data set."""
    read = [encoding.tokenize(source, tokenizer, section) for tokenizer in tokenizers]
    common = set.intersection(*(set(one.places) for one in read))
    if not common:
        raise DataError(f"{source}: holds no row that all bases can use")
    pairs = [(e, p) for e, p in zip(read[0].examples, read[0].places, strict=True) if p in common]
    return replace(read[0], examples=[e for e, _ in pairs], places=[p for _, p in pairs])


def _drawn(source: str, chosen: Dataset, section: DataSection, seed: list[int]) -> list[Fields]:
    """The chosen rows themselves, shuffled."""
    places = set(chosen.places)
    rows = [row.value for row in rows_of(source, section) if row.where in places]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


@dataclass(frozen=True)
class Asked:
    """Held-out rows as one strategy asks them of one tokenizer.

    Attributes:
      questions: for answers.
      dataset: for the loss of the rows' own answers; the same tokens count in every strategy.
      until: with what an answer ends that goes on to write further examples.
      shots: examples in the prompt, the mean over questions: as many as the base's positions have room for.
    """

    questions: list[Question]
    dataset: Dataset
    until: tuple[str, ...]
    shots: float


def ask(rows: list[Fields], shots: list[Fields], section: DataSection, tokenizer: Tokenizer, room: int | None) -> Asked:
    """Rows with worked examples before them, or bare where there are none.

    Args:
      room: most tokens of a prompt.

    Raises:
      DataError: a held-out row has no answer of its own.
    """
    style: dict[str, str] = {"format": section.format, "prompt": section.prompt}
    questions, examples, used = [], [], []
    for number, row in enumerate(rows, 1):
        try:
            ids, count = _fitting(row, shots, style, tokenizer, room)
            reference = reference_answer(row, format=section.format)
            questions.append(Question(shown_prompt(row, format=section.format), ids, reference))
            examples.append(_scored(row, shots[:count], section, tokenizer))
        except BadRow as bad:
            raise DataError(f"held-out row {number}: {bad.message}; leave such rows out") from None
        used.append(count)
    dataset = Dataset(examples, len(examples), places=[f"held-out row {n + 1}" for n in range(len(rows))])
    separator = shots_separator(shots, **style) if shots else None
    return Asked(questions, dataset, (separator,) if separator else (), sum(used) / len(used))


def _fitting(
    row: Fields, shots: list[Fields], style: dict[str, str], tokenizer: Tokenizer, room: int | None
) -> tuple[list[int], int]:
    """The prompt with as many of the examples as there is room for, and how many those are."""
    for count in range(len(shots), 0, -1):
        asked, format = with_shots(row, shots[:count], **style, answered=False)
        ids = encode_prompt(tokenizer, asked, format=format, prompt=style["prompt"])
        if room is None or len(ids) <= room:
            return ids, count
    return encode_prompt(tokenizer, row, **style), 0


def _scored(row: Fields, shots: list[Fields], section: DataSection, tokenizer: Tokenizer) -> Example:
    """The row's answer after its examples; of it just the tokens count that count, and fit, without them."""
    counted = section.model_copy(update={"train_on": "response"}).counted
    style: dict[str, Any] = {"prompt": section.prompt, "counted": counted}
    bare = encode_row(tokenizer, row, format=section.format, **style)
    limit = section.max_length
    if not shots:
        return bare.part(slice(limit))
    asked, format = with_shots(row, shots, format=section.format, prompt=section.prompt, answered=True)
    whole = encode_row(tokenizer, asked, format=format, **style)
    own = np.flatnonzero(whole.trained)[-int(bare.trained.sum()) :][: int(bare.trained[:limit].sum())]
    trained = np.zeros(len(whole.ids), bool)
    trained[own] = True
    return Example(whole.ids[: own[-1] + 1], trained[: own[-1] + 1])
