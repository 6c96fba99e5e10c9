"""Ids of the strings that servers show for tokens. Knows nothing of servers or models."""

import re
from collections.abc import Sequence

from jlora.data.tokens import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # what SentencePiece writes for it


class Pieces:
    """Every token of a tokenizer by its bytes."""

    def __init__(self, tokenizer: Tokenizer):
        backend = tokenizer.backend
        special = {i: name for name, i in backend.added.items()}
        names = {i: backend.name(i) for i in backend.ids_from(0)}
        spaced = any(_SPACE in name for i, name in names.items() if i not in special)
        self._tokenizer = tokenizer
        self._ids: dict[bytes, int] = {}
        of_bytes: dict[bytes, int] = {}
        for i, name in names.items():
            if i in special:
                self._ids.setdefault(name.encode("utf-8", "replace"), i)
            elif spaced and (found := _BYTE.fullmatch(name)):
                of_bytes[bytes([int(found[1], 16)])] = i
            elif (raw := _spaced(name) if spaced else _of_byte_level(name)) is not None:
                self._ids.setdefault(raw, i)
        self._ids = of_bytes | self._ids  # a piece goes before the byte that it is
        self._raw = {i: raw for raw, i in self._ids.items()}

    def ids_of(self, shown: Sequence[tuple[str, bytes | None, int | None]], before: str) -> list[int | None]:
        """The ids of tokens in a row, each shown as text, as bytes or as its id; None where that tells none.

        A server may cut the space before a first word, and shows a character in several tokens as it likes: then the
        ids are those of the text as a whole, if they are as many.

        Args:
          before: the text that the tokens follow.
        """
        found = [self._id(*each) for each in shown]
        if found and found[0] is None:
            found[0] = self._ids.get(b" " + shown[0][0].encode("utf-8", "replace"))
        if None in found:
            whole = self.ids_of_text("".join(text for text, *_ in shown), before)
            return [*whole] if len(whole) == len(found) else found
        return found

    def _id(self, text: str, raw: bytes | None, token: int | None) -> int | None:
        if token is None:
            return self._ids.get(raw or text.encode("utf-8", "replace"))
        # llama-server shows the tokens that a character is cut into as one, by the id of the last.
        return token if raw is None or self._raw.get(token, raw) == raw else None

    def ids_of_text(self, text: str, before: str) -> list[int]:
        """The ids that a text has behind another, if what is before keeps its own; else none."""
        first, whole = self._tokenizer.encode(before), self._tokenizer.encode(before + text)
        return whole[len(first) :] if whole[: len(first)] == first else []


def _spaced(name: str) -> bytes:
    return name.replace(_SPACE, " ").encode("utf-8", "replace")


def _of_byte_level(name: str) -> bytes | None:
    try:
        return bytes(_BYTES[char] for char in name)
    except KeyError:
        return None


def _byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones for themselves, the others from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level()
