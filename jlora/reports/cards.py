"""Cards: a prompt as people read it, and what was answered to it, side by side. Knows nothing of HTML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

from jlora.data.speakers import Turn

# Words and other characters, with the space behind them; writing without spaces goes character by character.
_WORDS = re.compile("(?:[^\\W\u2e80-\u9fff]+|\\S)\\s*|\\s+")
# Longer texts are not compared word by word, nor those that have less than this share of their words in common.
MOST_WORDS, LEAST_ALIKE = 500, 0.5


class Part(NamedTuple):
    """Some words of a text."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Cell:
    """A text, and who wrote it.

    Attributes:
      note: such as its scores.
      cut: it goes on, but was cut at the most tokens.
      wanted: it is the row's own. apart: of many, it is not one of those to be compared.
    """

    name: str
    parts: Sequence[Part]
    note: str = ""
    cut: bool = False
    wanted: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Card:
    """A prompt with its answers. `kind`: by which a page hides it."""

    name: str
    turns: Sequence[Turn]
    cells: Sequence[Cell]
    kind: str = ""


def whole(text: Any) -> list[Part]:
    """A text of which nothing is marked."""
    return [Part("" if text is None else str(text), False)]


def marked(text: Any, other: Any) -> list[Part]:
    """A text with the words marked that another does not have there, if the two have most in common."""
    words, others = _WORDS.findall(str(text)), _WORDS.findall(str(other))
    if not words or max(len(words), len(others)) > MOST_WORDS:
        return whole(text)
    bare, bare_others = ([word.strip() for word in each] for each in (words, others))
    differs = [True] * len(words)
    for start, _, length in SequenceMatcher(None, bare, bare_others, autojunk=False).get_matching_blocks():
        differs[start : start + length] = [False] * length
    if sum(differs) > (1 - LEAST_ALIKE) * len(words):
        return whole(text)
    runs = groupby(zip(words, differs, strict=True), lambda word: word[1])
    return [Part("".join(word for word, _ in run), mark) for mark, run in runs]


def turns_of(sample: dict[str, Any]) -> list[Turn]:
    """The prompt of a sample of a run, whatever its file says; one turn without a role where it names none."""
    told = sample.get("turns")
    if isinstance(told, list) and told and all(isinstance(each, list) and len(each) == 2 for each in told):
        return [Turn(str(role), str(text)) for role, text in told]
    return [Turn("", str(sample.get("prompt") or ""))]


def sample_cell(name: str, sample: dict[str, Any], key: str, other: Any = None) -> Cell:
    """One of a sample's texts, by its key; words that another text does not have are marked."""
    text, cut = sample.get(key), sample.get("cut")
    parts = whole(text) if text is None or other is None else marked(text, other)
    return Cell(name, parts, cut=isinstance(cut, list) and key in cut, wanted=key == "wanted")
