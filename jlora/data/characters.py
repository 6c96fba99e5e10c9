"""Which token shows which characters: each whole, once, at its last token. Knows nothing of pages."""

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from jlora.data.tokens import Tokenizer

# Tokens before one that decide how it reads, and the most that one character is looked for in.
CONTEXT, LONGEST = 8, 16
_CUT = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to
_JOINER = "\N{ZERO WIDTH JOINER}"


def characters(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[tuple[str, bool]]:
    """What each of `ids` ([n] integers) shows of the text, and whether it is a special token, which is written out.

    What a reader takes for one character may be several of Unicode (a letter with its signs, a flag, a family of
    emoji), and each of those several tokens.
    """
    specials, found, start = tokenizer.backend.specials(), [], 0
    for at, token in enumerate([*ids, None]):
        if token is None or int(token) in specials:
            found += [(text, False) for text in _together(list(_texts(tokenizer, ids[start:at])))]
            found += [] if token is None else [(specials[int(token)], True)]
            start = at + 1
    return found


def _texts(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> Iterator[str]:
    """What each token adds to a text without special tokens; of a character of several, the last one has it all."""
    first, whole, shown = 0, 0, ""  # decoded from `first` on, up to `whole` there is no part of a character
    for at in range(len(ids)):
        text = tokenizer.decode(ids[first : at + 1])
        if text.endswith(_CUT) and at + 1 < len(ids) and at - whole < LONGEST:
            yield ""
            continue
        yield text[len(shown) :] if text.startswith(shown) else text
        shown = text
        if at - first > CONTEXT:  # from a place between characters, lest the first bytes be a part of one
            first, shown = whole, tokenizer.decode(ids[whole : at + 1])
        whole = at + 1


def _together(texts: list[str]) -> list[str]:
    """The same, with a character that goes on in the next token moved there."""
    carried = ""
    for number, text in enumerate(texts):
        after = next(filter(None, texts[number + 1 :]), "")
        if not text:
            continue
        text, carried = carried + text, ""
        if after and _joins(text, after[0]):
            cut = len(text) - 1
            while cut > 0 and _joins(text[:cut], text[cut]):
                cut -= 1
            text, carried = text[:cut], text[cut:]
        texts[number] = text
    return texts


def _joins(before: str, char: str) -> bool:
    """Whether a character of Unicode is one for a reader with what stands before it.

    The rules of Unicode's UAX #29 that matter for tokens: signs that combine, joiners, emoji's modifiers and tags,
    vowels and finals of Korean, and flags, which are pairs of letters.
    """
    if before.endswith(_JOINER) or char == _JOINER or unicodedata.category(char) in ("Mn", "Mc", "Me"):
        return True
    if "\U0001f3fb" <= char <= "\U0001f3ff" or "\U000e0020" <= char <= "\U000e007f" or "\u1160" <= char <= "\u11ff":
        return True
    letters = len(before) - len(before.rstrip("".join(map(chr, range(0x1F1E6, 0x1F200)))))
    return "\U0001f1e6" <= char <= "\U0001f1ff" and letters % 2 == 1
