"""The libraries behind a `jlora.data.tokens.Tokenizer`, as one interface."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jlora.errors import ModelError, UserError
from jlora.files.sandbox import panics

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as FastTokenizer


@contextmanager
def named(what: str) -> Iterator[None]:
    """Errors of the `tokenizers` library, which raises bare Exception, and panics, as a ModelError that begins so."""
    try:
        with panics():
            yield
    except UserError:
        raise
    except Exception as error:
        raise ModelError(
            f"the tokenizer {what} ({' '.join(str(error).split())}); get its files again, or set another"
        ) from error


@dataclass(frozen=True)
class Fast:
    """A tokenizer of the `tokenizers` library."""

    tokenizer: "FastTokenizer"

    def encode(self, text: str) -> list[int]:
        with named("fails on a text"):
            return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        with named("fails on a text"):
            found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # on all cores, without offsets
        return [encoding.ids for encoding in found]

    def decode(self, ids: list[int]) -> str:
        with named("fails on tokens"):
            return self.tokenizer.decode(ids, skip_special_tokens=True)

    def specials(self) -> dict[int, str]:
        return {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def added(self) -> dict[str, int]:
        return {token.content: i for i, token in self.tokenizer.get_added_tokens_decoder().items()}

    def name(self, token: int) -> str:
        return self.tokenizer.id_to_token(token) or ""

    def id_of(self, text: str) -> int | None:
        return self.tokenizer.token_to_id(text)

    def ids_from(self, first: int) -> list[int]:
        return sorted(i for i in self.tokenizer.get_vocab(with_added_tokens=True).values() if i >= first)


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model, with the strings that stand for one token each split out of the text first.

    Attributes:
      processor: for a text's beginning, and for decoding. within: for what follows one of the strings.
      added: the strings.
    """

    processor: "SentencePieceProcessor"
    within: "SentencePieceProcessor"
    added: dict[str, int]

    def encode(self, text: str) -> list[int]:
        # Longest first, because an alternation takes the first match and the longest one is wanted.
        pattern = "|".join(map(re.escape, sorted(self.added, key=len, reverse=True)))
        first, *rest = re.split(f"({pattern})", text)
        ids: list[int] = self.processor.encode(first)
        for chunk in rest:
            ids += [self.added[chunk]] if chunk in self.added else self.within.encode(chunk)
        return ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        # A model may have more embeddings than there are pieces; an id without a piece decodes to nothing.
        skipped, size = set(self.added.values()), self.processor.vocab_size()
        return self.processor.decode([i for i in ids if i < size and i not in skipped])

    def specials(self) -> dict[int, str]:
        return {i: content for content, i in self.added.items()}

    def name(self, token: int) -> str:
        return self.specials()[token] if token in self.added.values() else self.processor.id_to_piece(token)

    def id_of(self, text: str) -> int | None:
        found = self.added.get(text, self.processor.piece_to_id(text))  # of a string that is no piece: the id of <unk>
        return found if self.name(found) == text else None

    def ids_from(self, first: int) -> list[int]:
        return sorted({*self.added.values(), *range(self.processor.vocab_size())} - {*range(first)})
