"""The tokenizer that a GGUF file's metadata describes, by llama.cpp's reading of it (llama-vocab.cpp)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from jlora.files.sandbox import panics
from jlora.hf.gguf_header import FOLDER, Header, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What llama.cpp assumes of SentencePiece vocabularies where the file is silent.
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}

# Letters of a SentencePiece piece, each of whose ways to cut it is looked at.
MAX_PIECE = 1024


class _Pre(NamedTuple):
    """What a `tokenizer.ggml.pre` name stands for: the splits, applied in order, and BPE's switches."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False  # where the file has no tokenizer.ggml.add_bos_token
    nfc: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# From llama-vocab.cpp. "smollm" is Digits(individual_digits=True) and then ByteLevel in SmolLM's
# tokenizer.json. NFC is in Qwen2's: llama.cpp leaves it out, but Qwen2 was trained with it.
PRE_TOKENIZERS = {
    "smollm": _Pre((r"\p{N}", _GPT2)),
    "gpt-2": _Pre((_GPT2,)),
    "qwen2": _Pre((_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True),
    "dbrx": _Pre((_LLAMA3,)),  # Phi-4's
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
} | dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Pre((_LLAMA3,), ignore_merges=True, add_bos=True))


def token_id(header: Header, name: str) -> int | None:
    """The id of a special token: bos, eos, unknown or padding; None where there is none."""
    spm = header.get("tokenizer.ggml.model", str, None) == "llama"
    return header.get(f"tokenizer.ggml.{name}_token_id", int, _SPM_IDS.get(name) if spm else None)


class Vocabulary:
    """The vocabulary of a file."""

    def __init__(self, header: Header, rows: int, max_length: int):
        """Takes the header of a model with an embedding of `rows`, of texts of `max_length` tokens."""
        self._header, self._rows, self._max_length = header, rows, max_length

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that tokenizer.ggml.* describes, with its special tokens and chat template.

        `tokenizer.ggml.model` "gpt2" is byte-level BPE, "llama" is SentencePiece BPE. The latter follows
        transformers' `LlamaTokenizer`, so that the same model gives the same ids from a folder: a space
        goes before the first text only, and only if it does not begin with one (llama.cpp puts one
        before every text that follows a special token).
        Raises `ModelError` for another model, an unknown pre-tokenizer, or a missing or bad key.
        """
        from transformers import PreTrainedTokenizerFast  # slow to import, and only needed here

        model = self._header.get("tokenizer.ggml.model", str)
        if model not in ("gpt2", "llama"):
            raise self._header.refuse(f'has a tokenizer of model "{model}", not "gpt2" or "llama"', FOLDER)
        # An empty one is named as llama.cpp names it.
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self._header.several("tokenizer.ggml.tokens", str))]
        types = self._header.several("tokenizer.ggml.token_type", int)
        rows = self._rows
        if len(types) != len(tokens) or len(tokens) > rows:
            counts = f"{len(tokens)} tokens, {len(types)} token types, {rows} embeddings"
            raise self._header.refuse(f"has counts that do not fit together ({counts})")
        if len(set(tokens)) < len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            raise self._header.refuse(f"has the token {shown(twice)} twice")
        special: dict[str, str | None] = {}
        for name in ("bos", "eos", "unknown", "padding"):
            number = token_id(self._header, name)
            if number is not None and not 0 <= number < len(tokens):
                raise self._header.refuse(f"has the {name} token {number} but {len(tokens)} tokens")
            special[name] = None if number is None else tokens[number]
        build = self._byte_level if model == "gpt2" else self._sentencepiece
        backend, add_bos = build(tokens, types, special["unknown"])
        add_bos = self._header.get("tokenizer.ggml.add_bos_token", bool, add_bos)
        for name in ("eos", "bos") if add_bos else ("eos",):
            if special[name] is None:
                self._header.get(f"tokenizer.ggml.{name}_token_id", int)  # raises: it is not there
        # Both kinds are matched whole in the text before BPE; only control tokens are special.
        kinds = (TokenType.CONTROL, TokenType.USER_DEFINED)
        added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in kinds]
        backend.add_tokens([AddedToken(t, normalized=False, special=k == TokenType.CONTROL) for t, k in added])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token=special["bos"],
            eos_token=special["eos"],
            unk_token=special["unknown"],
            pad_token=special["padding"],
            add_bos_token=add_bos,
            add_eos_token=self._header.get("tokenizer.ggml.add_eos_token", bool, False),
            chat_template=self._header.get("tokenizer.chat_template", str, None),
            model_max_length=self._max_length,
            clean_up_tokenization_spaces=False,
        )

    def _byte_level(self, tokens: list[str], types: list[int], unk: str | None) -> tuple[Tokenizer, bool]:
        name = self._header.get("tokenizer.ggml.pre", str)
        if name not in PRE_TOKENIZERS:
            raise self._header.refuse(f'has the pre-tokenizer "{name}", not one of {", ".join(PRE_TOKENIZERS)}', FOLDER)
        if self._header.get("tokenizer.ggml.add_space_prefix", bool, False):
            # llama.cpp ignores it, transformers does not: no reading of it is the right one.
            raise self._header.refuse("sets tokenizer.ggml.add_space_prefix for byte-level BPE", FOLDER)
        pre = PRE_TOKENIZERS[name]
        merges = [m.partition(" ")[::2] for m in self._header.several("tokenizer.ggml.merges", str)]
        # No unk_token: a byte without a token is left out, as in transformers.
        backend = self._bpe(tokens, merges, ignore_merges=pre.ignore_merges)
        if pre.nfc:
            backend.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in pre.splits]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        backend.decoder = decoders.ByteLevel()
        return backend, pre.add_bos

    def _sentencepiece(self, tokens: list[str], types: list[int], unk: str | None) -> tuple[Tokenizer, bool]:
        # SentencePiece joins the neighbours that make the piece of the best score. As BPE merges, that
        # is every way to cut every piece in two, best piece first; ties are ordered as in transformers.
        # Control, byte and user-defined tokens are never made by a join, nor part of one.
        scores = self._header.several("tokenizer.ggml.scores", float)
        if len(scores) != len(tokens):
            counts = f"{len(tokens)} tokens, {len(scores)} scores"
            raise self._header.refuse(f"has counts that do not fit together ({counts})")
        kept = zip(tokens, scores, types, strict=True)
        score = {token: value for token, value, kind in kept if kind == TokenType.NORMAL}
        if (longest := max(map(len, score), default=0)) > MAX_PIECE:
            raise self._header.refuse(f"has a token of {longest} letters, more than the {MAX_PIECE} that are read")
        cuts = [
            (piece[:i], piece[i:])
            for piece in score
            for i in range(1, len(piece))
            if piece[:i] in score and piece[i:] in score
        ]
        cuts.sort(key=lambda cut: (score[cut[0] + cut[1]], len(cut[0]), len(cut[1])), reverse=True)
        backend = self._bpe(tokens, cuts, unk_token=unk, fuse_unk=True, byte_fallback=True)
        prefix = self._header.get("tokenizer.ggml.add_space_prefix", bool, True)
        scheme = "first" if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", left=1)] if prefix else steps)
        return backend, True

    def _bpe(self, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
        try:
            with panics():
                return Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges, **options))
        except Exception as error:  # tokenizers raises nothing narrower
            raise self._header.refuse(f"has a vocabulary that makes no tokenizer ({error})") from error
