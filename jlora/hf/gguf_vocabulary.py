"""A tokenizer as the metadata of a GGUF file, the inverse of `gguf_tokenizer`, by which it is read back and compared.

llama.cpp names how a text is cut before BPE, and has no other word for it. So each name that is known is tried, until
one cuts the probes as the tokenizer itself does.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from jlora.data.backends import Fast, SentencePiece
from jlora.data.tokens import Tokenizer, from_fast
from jlora.errors import ModelError
from jlora.hf.gguf_header import Header
from jlora.hf.gguf_tokenizer import PRE_TOKENIZERS, Vocabulary
from jlora.hf.gguf_writer import CONVERTER

# What tokenizers cut differently: contractions, digits, runs of spaces and lines, code, scripts without spaces, marks.
PROBES = (
    "Hello world, it's 12:45 and they'll pay $1,234.56 for the 3rd one!",
    "IT'S  two   spaces,\ttabs\n\nand\r\n lines \n",
    "def f(x):\n    return x**2 + 10_000  # naïve café",
    "日本語のテキスト と 中文字符，한국어 ١٢٣ हिन्दी 😀👍🏽 ﬁ e\u0301",
    "trailing ",
    "",
)


def vocabulary_of(
    tokenizer: Tokenizer, header: Header | None, rows: int, stops: list[int], where: str
) -> dict[str, Any]:
    """The `tokenizer.` keys of a file, read back.

    Args:
      header: of the GGUF file that the tokenizer came from, whose own keys are kept; None where it came from a folder.
      rows: of the embedding, each of which llama.cpp wants a token for. stops: ids that end an answer.

    Raises:
      ModelError: a kind of tokenizer that llama.cpp does not have, or does not cut texts the same way.
    """
    wanted = [tokenizer.encode(text) for text in PROBES]
    for keys in [_kept(header)] if header else _candidates(tokenizer, rows, where):
        found = keys | {
            "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
            "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        }
        if tokenizer.bos_id is not None:
            found["tokenizer.ggml.bos_token_id"] = tokenizer.bos_id
        if tokenizer.chat_template is not None:
            found["tokenizer.chat_template"] = tokenizer.chat_template
        if others := [stop for stop in stops if stop != tokenizer.eos_id]:
            found["tokenizer.ggml.eot_token_id"] = others[0]
        read = _read(found, rows, where)
        ours = (tokenizer.bos_id if tokenizer.add_bos else None, tokenizer.eos_id, tokenizer.add_bos)
        theirs = (read.bos_id if read.add_bos else None, read.eos_id, read.add_bos)
        if [read.encode(text) for text in PROBES] == wanted and theirs == ours:
            return found
    raise ModelError(f"{where}: llama.cpp has no way that jlora knows to cut texts as this tokenizer does; {CONVERTER}")


def _read(keys: dict[str, Any], rows: int, where: str) -> Tokenizer:
    """The tokenizer that the keys describe."""
    header = Header(Path(where), {key: _as_stored(value) for key, value in keys.items()}, {})
    hf = Vocabulary(header, rows, 1 << 20).tokenizer()
    return from_fast(hf, hf.backend_tokenizer.to_str().encode(), (), where)


def _as_stored(value: Any) -> Any:
    if isinstance(value, list):
        return [each.encode("utf-8") for each in value] if value and isinstance(value[0], str) else np.array(value)
    return value.encode("utf-8") if isinstance(value, str) else value


def _kept(header: Header) -> dict[str, Any]:
    """The keys of a file that is there."""
    found: dict[str, Any] = {}
    for key, value in header.values.items():
        if key.startswith("tokenizer."):
            if isinstance(value, list):
                value = [each.decode("utf-8") for each in value]
            found[key] = value.decode("utf-8") if isinstance(value, bytes) else value
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}


def _candidates(tokenizer: Tokenizer, rows: int, where: str) -> Iterator[dict[str, Any]]:
    """The keys by each way that llama.cpp may cut texts."""
    if not isinstance(tokenizer.backend, Fast):
        yield from _of_pieces(tokenizer.backend, rows)
        return
    tree = json.loads(tokenizer.backend.tokenizer.to_str())
    model = tree["model"]
    if model["type"] != "BPE":
        raise ModelError(f"{where}: a tokenizer of model {model['type']} is not written as GGUF, only BPE; {CONVERTER}")
    added = {token["id"]: token for token in tree["added_tokens"]}
    tokens = {number: token for token, number in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    unknown = model.get("unk_token")

    def kind(number: int) -> int:
        token = tokens.get(number)
        if token is None:
            return TokenType.UNUSED
        if number in added and token != unknown:
            return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
        if token == unknown:
            return TokenType.UNKNOWN
        return TokenType.BYTE if model.get("byte_fallback") and _is_byte(token) else TokenType.NORMAL

    kinds = [int(kind(number)) for number in range(rows)]
    common = {
        "tokenizer.ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(rows)],
        "tokenizer.ggml.token_type": kinds,
    }
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        # SentencePiece joins the neighbours whose piece has the best score: the one that is joined first here.
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault(pair.replace(" ", ""), rank)
        last = len(merges)
        scores = [-float(ranks.get(tokens[i], last)) if kinds[i] == TokenType.NORMAL else 0.0 for i in range(rows)]
        if unknown is not None:
            common["tokenizer.ggml.unknown_token_id"] = model["vocab"][unknown]
        for prefix in (True, False):
            yield common | {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.scores": scores,
                "tokenizer.ggml.add_space_prefix": prefix,
            }
        return
    if not merges:
        raise ModelError(f"{where}: a tokenizer without merges is not written as GGUF, for llama.cpp reads none")
    for pre in PRE_TOKENIZERS:
        yield common | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def _of_pieces(backend: SentencePiece, rows: int) -> Iterator[dict[str, Any]]:
    """The keys of a SentencePiece model."""
    processor, added = backend.processor, backend.added
    names, size = {i: token for token, i in added.items()}, processor.vocab_size()

    def kind(number: int) -> int:
        if number >= size or processor.is_unused(number):
            return TokenType.CONTROL if number in names else TokenType.UNUSED
        if processor.is_unknown(number):
            return TokenType.UNKNOWN
        if processor.is_byte(number):
            return TokenType.BYTE
        return TokenType.CONTROL if processor.is_control(number) or number in names else TokenType.NORMAL

    for prefix in (True, False):
        yield {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [
                names.get(i, processor.id_to_piece(i) if i < size else f"[PAD{i}]") for i in range(rows)
            ],
            "tokenizer.ggml.token_type": [int(kind(i)) for i in range(rows)],
            "tokenizer.ggml.scores": [processor.get_score(i) if i < size else 0.0 for i in range(rows)],
            "tokenizer.ggml.unknown_token_id": processor.unk_id(),
            "tokenizer.ggml.add_space_prefix": prefix,
        }


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
