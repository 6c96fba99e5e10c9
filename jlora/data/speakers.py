"""A prompt's tokens as the turns of a conversation, for people. Knows nothing of pages."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jlora.data.tokens import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "model", "tool", "ipython")
# Tokens that begin a turn and do not name its role as it is.
OPENING = {"[INST]": "user", "[SYSTEM_PROMPT]": "system"}
# What Stanford's prompts write above their parts.
_HEADING = re.compile(r"^### (Instruction|Input|Response):[ \n]*", re.MULTILINE)


class Turn(NamedTuple):
    """What one speaker says; the role is empty where the prompt names none."""

    role: str
    text: str


def turns(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[Turn]:
    """The turns of a prompt, int [n], told by its special tokens and by Stanford's headings; empty ones are left out.

    A role is a special token's own name (`<|user|>`), or the line after one (`<|im_start|>user`).
    """
    found: list[Turn] = []
    for special, text in _pieces(tokenizer, ids):
        first, _, rest = text.partition("\n")
        role = OPENING.get(special, re.sub(r"\W", "", special))
        if role in ROLES:
            found.append(Turn(role, text))
        elif special and first.strip() in ROLES:
            found.append(Turn(first.strip(), rest))
        elif found and found[-1].role and not found[-1].text:  # a token between a role and its text
            found[-1] = Turn(found[-1].role, text)
        else:
            found += _headed(text)
    return [Turn(role, text.strip()) for role, text in found if text.strip()]


def _pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> Iterator[tuple[str, str]]:
    """Each special token with the text behind it; the text at the beginning has none before it."""
    specials, special, start = tokenizer.backend.specials(), "", 0
    for at, token in enumerate(ids):
        if int(token) in specials:
            yield special, tokenizer.decode(ids[start:at])
            special, start = specials[int(token)], at + 1
    yield special, tokenizer.decode(ids[start:])


def _headed(text: str) -> list[Turn]:
    before, *parts = _HEADING.split(text)
    return [Turn("", before), *(Turn(*part) for part in zip(parts[::2], parts[1::2], strict=True))]
