"""Many prompts answered greedily, in batches of few shapes: what evaluation and the effort report ask of a model."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice

from jlora.config import DataSection
from jlora.data.formats import rows_of
from jlora.data.prompts import encode_prompt, reference_answer, shown_prompt
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer
from jlora.errors import DataError
from jlora.inference.generate import LENGTH_STEP, generate
from jlora.inference.model import Adapted


@dataclass(frozen=True)
class Question:
    """A prompt with the answer that its row gives.

    Attributes:
      shown: the prompt for people.
      ids: the tokens that generation starts from.
      reference: the row's own answer.
    """

    shown: str
    ids: list[int]
    reference: str


@dataclass(frozen=True)
class Answers:
    """What a model said to each prompt, in their order.

    Attributes:
      texts, tokens: the answers, and how many tokens each has, without the one that ends it.
      ended: whether each came to its end, or is cut at the most tokens.
      seconds: it took to answer all; compilation is left out where it was asked to be.
    """

    texts: list[str]
    tokens: list[int]
    ended: list[bool]
    seconds: float


def read_questions(source: str, section: DataSection, tokenizer: Tokenizer, most: int) -> list[Question]:
    """The first `most` rows as prompts with their references.

    Raises:
      DataError: no row can be used, or one cannot, unless `on_bad_row` says to skip those.
    """
    questions: list[Question] = []
    for row in rows_of(source, section):
        if len(questions) == most:
            break
        try:
            if isinstance(row.value, BadRow):
                raise row.value
            ids = encode_prompt(tokenizer, row.value, format=section.format, prompt=section.prompt)
            shown = shown_prompt(row.value, format=section.format)
            questions.append(Question(shown, ids, reference_answer(row.value, format=section.format)))
        except BadRow as bad:
            if section.on_bad_row == "error":
                raise DataError(f"{row.where}: {bad.message}; fix it, or drop such rows (skip them)") from None
    if not questions:
        raise DataError(f"{source}: holds no row with a prompt and an answer")
    return questions


def width_of(length: int) -> int:
    """What a prompt is padded to: LENGTH_STEP times a power of two, so that few widths are compiled for."""
    return LENGTH_STEP << (-(-length // LENGTH_STEP) - 1).bit_length()


def batches_of_like(lengths: list[int], batch_size: int) -> list[tuple[int, list[int]]]:
    """Sequences of like length together: the width that a batch is padded to, and its members, shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    by_width = [(width, list(members)) for width, members in groupby(order, lambda i: width_of(lengths[i]))]
    return [(width, each[at : at + batch_size]) for width, each in by_width for at in range(0, len(each), batch_size)]


def answer(
    model: Adapted,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    timed: bool = False,
    until: tuple[str, ...] = (),
) -> Answers:
    """Greedy answers.

    Args:
      batch_size: prompts answered together; prompts of like length are, and the last batch is filled up.
      timed: compile, by a few tokens of each shape, before the clock starts.
      until: texts with any of which an answer is over, and that are left out; its tokens count as said.
    """
    batches = batches_of_like([len(ids) for ids in prompts], batch_size)
    decode = model.pretrained.tokenizer.decode

    def grow(width: int, members: list[int]) -> Iterator[list[list[int]]]:
        filled = members + members[:1] * (batch_size - len(members))
        return generate(model, [prompts[i] for i in filled], max_new_tokens=max_new_tokens, width=width)

    def is_over(ids: list[int]) -> bool:
        return any(end in decode(ids) for end in until)

    if timed:
        for width, members in dict(batches).items():
            list(islice(grow(width, members), 2))  # prefill, and the first tokens of decoding
    found: dict[int, list[int]] = {}
    began = time.monotonic()
    for width, members in batches:
        for said in grow(width, members):
            if until and all(is_over(ids) for ids in said if len(ids) == max(map(len, said))):
                break
        found.update(zip(members, said, strict=False))
    seconds = time.monotonic() - began
    ids = [found[i] for i in range(len(prompts))]
    texts = [decode(one) for one in ids]
    cut = [min((text.find(end) for end in until if end in text), default=len(text)) for text in texts]
    ended = [at < len(text) or len(one) < max_new_tokens for text, at, one in zip(texts, cut, ids, strict=True)]
    texts = [text[:at] for text, at in zip(texts, cut, strict=True)]
    return Answers(texts, [len(one) for one in ids], ended, seconds)
