"""A Llama model in a GGUF file, or in the pieces of one, presented as what a Hugging Face folder would give.

Names, shapes, config keys and layouts are Hugging Face's. Where the file leaves something open,
llama.cpp's reading of it is followed: its loader (llama-model.cpp, llama-vocab.cpp) for the metadata
and its converter (convert_hf_to_gguf.py, `LlamaModel`) for the tensors. What would change the numbers
and is not understood is refused, never ignored. The `gguf` package dequantises.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType, TokenType
from gguf.quants import dequantize
from gguf.tensor_mapping import get_tensor_name_map
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from jlora.errors import ModelError
from jlora.files.sandbox import panics
from jlora.files.theirs import open_theirs
from jlora.hf.gguf_header import CONVERT, MAGIC, Header, first_piece, read_header, read_pieces, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from jlora.model.config import ModelConfig

# The "llama." keys that are read below, or that do not change what the model computes.
_USED_KEYS = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout",
})  # fmt: skip
# Any other "llama." key is accepted only at the value that switches it off: this one, or else 0.
_OFF = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}

# What llama.cpp assumes where the file is silent; the ids for SentencePiece vocabularies only.
_ROPE_THETA = 10000.0
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}

# Letters of a SentencePiece piece, each of whose ways to cut it is looked at.
MAX_PIECE = 1024

_DTYPES = {GGMLQuantizationType.BF16: "bfloat16", GGMLQuantizationType.F16: "float16"}

_FOLDER = "use the model's Hugging Face folder"


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
_PRE = {
    "smollm": _Pre((r"\p{N}", _GPT2)),
    "gpt-2": _Pre((_GPT2,)),
    "qwen2": _Pre((_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True),
    "default": _Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
} | dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Pre((_LLAMA3,), ignore_merges=True, add_bos=True))


class GGUFFile:
    """One open GGUF file; of a model in pieces, all of them, by the path of any.

    The constructor raises `ModelError` for whatever is wrong with the configuration or the tensors, so
    that `read` cannot fail later; the vocabulary is checked by `tokenizer`.

    Attributes:
        path: the file, or the first piece.
        config: the equivalent of config.json. `torch_dtype` is the embedding's type in the file, and
            float32 if that is a quantised one. `rope_scaling` is None or of type "linear".
        shapes: Hugging Face tensor name -> shape, as in the model's state dict; linear weights are
            (out, in). "lm_head.weight" is there only if the embeddings are not tied.
        dtypes: Hugging Face tensor name -> name of its type in the file, such as "Q4_1".
        sizes: Hugging Face tensor name -> bytes in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = first_piece(path)
        self._header = self._open()
        self._tensors = self._header.tensors
        arch = self._header.get("general.architecture", str)
        if arch != "llama":
            raise self._error(f'has the architecture "{arch}"', 'use a model of architecture "llama"')
        self.config = self._read_config()
        self.shapes, self._gguf_names = self._map_tensors()
        tensors = {name: self._tensors[stored] for name, stored in self._gguf_names.items()}
        self.dtypes = {name: tensor.type.name for name, tensor in tensors.items()}
        self.sizes = {name: tensor.size for name, tensor in tensors.items()}

    @cached_property
    def model(self) -> ModelConfig:
        """Shape and numerics."""
        from jlora.hf.architecture import parse_config  # needs JAX, and nothing else here does

        return parse_config(self.config, str(self.path))

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` (a key of `shapes`; KeyError if not) as a new float32 array of that shape.

        q_proj and k_proj come in the layout of transformers' `LlamaForCausalLM` (rotation of the two
        halves of a head), which undoes the converter's `LlamaModel.permute` (rotation of neighbours).
        """
        shape = self.shapes[name]
        weight = self.part(name, (0, shape[0] if len(shape) == 2 else 1), (0, shape[-1])).reshape(shape)
        # A float32 tensor is still a read-only view of the mapped file here.
        return weight if weight.flags.writeable else np.array(weight)

    def part(self, name: str, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
        """Rows and columns, each [start, stop), of tensor `name` in float32; a vector is one row.

        Reads and dequantises only the quantisation blocks that they lie in. Rows of q_proj and k_proj must be
        whole heads. The file is mapped anew each time, so that what was read is let go with the array.
        """
        tensor = self._tensors[self._gguf_names[name]]
        per_block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        first, last = columns[0] // per_block, -(-columns[1] // per_block)
        start, stop = (row * tensor.row_bytes for row in rows)
        mapped = self.stored(name, start, stop).reshape(-1, tensor.row_bytes)
        weight = dequantize(mapped[:, first * block_bytes : last * block_bytes], tensor.type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            half = self.config["head_dim"] // 2
            weight = weight.reshape(-1, half, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        return weight[:, columns[0] - first * per_block : columns[1] - first * per_block]

    def stored(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of tensor `name` as the file has them, uint8; a read-only view of the mapped file."""
        tensor = self._tensors[self._gguf_names[name]]
        offset = tensor.offset + start
        try:
            return np.memmap(tensor.file, np.uint8, "r", offset, (stop - start,))
        except (OSError, ValueError) as error:
            raise self._error(f"changed while it was being read ({error})", "run again") from None

    has_codes = False  # as safetensors have them

    def stored_codes(self, name: str, kind: str | None) -> None:
        """None: no kind of GGUF has the codes of one of ours."""

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
            raise self._error(f'has a tokenizer of model "{model}", not "gpt2" or "llama"', _FOLDER)
        # An empty one is named as llama.cpp names it.
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self._header.several("tokenizer.ggml.tokens", str))]
        types = self._header.several("tokenizer.ggml.token_type", int)
        rows = self.config["vocab_size"]
        if len(types) != len(tokens) or len(tokens) > rows:
            counts = f"{len(tokens)} tokens, {len(types)} token types, {rows} embeddings"
            raise self._error(f"has counts that do not fit together ({counts})", CONVERT)
        if len(set(tokens)) < len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            raise self._error(f"has the token {shown(twice)} twice", CONVERT)
        special: dict[str, str | None] = {}
        for name in ("bos", "eos", "unknown", "padding"):
            token_id = self._token_id(name)
            if token_id is not None and not 0 <= token_id < len(tokens):
                raise self._error(f"has the {name} token {token_id} but {len(tokens)} tokens", CONVERT)
            special[name] = None if token_id is None else tokens[token_id]
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
            model_max_length=self.config["max_position_embeddings"],
            clean_up_tokenization_spaces=False,
        )

    def _byte_level(self, tokens: list[str], types: list[int], unk: str | None) -> tuple[Tokenizer, bool]:
        name = self._header.get("tokenizer.ggml.pre", str)
        if name not in _PRE:
            raise self._error(f'has the pre-tokenizer "{name}", not one of {", ".join(_PRE)}', _FOLDER)
        if self._header.get("tokenizer.ggml.add_space_prefix", bool, False):
            # llama.cpp ignores it, transformers does not: no reading of it is the right one.
            raise self._error("sets tokenizer.ggml.add_space_prefix for byte-level BPE", _FOLDER)
        pre = _PRE[name]
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
            raise self._error(f"has counts that do not fit together ({counts})", CONVERT)
        kept = zip(tokens, scores, types, strict=True)
        score = {token: value for token, value, kind in kept if kind == TokenType.NORMAL}
        if (longest := max(map(len, score), default=0)) > MAX_PIECE:
            raise self._error(f"has a token of {longest} letters, more than the {MAX_PIECE} that are read", CONVERT)
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
            raise self._error(f"has a vocabulary that makes no tokenizer ({error})", CONVERT) from error

    def _open(self) -> Header:
        try:
            with open_theirs(self.path) as file:
                magic = file.read(len(MAGIC))
        except OSError as error:
            raise self._error(f"cannot be opened ({error.strerror})", "check the path") from error
        if magic != MAGIC:
            raise self._error("is not a GGUF file", "give a GGUF file or a Hugging Face folder")
        try:
            header = read_header(self.path)
            return read_pieces(header) if header.get("split.count", int, 1) > 1 else header
        except (OSError, ValueError) as error:
            raise self._error(f"is truncated or damaged ({error})", "download or convert it again") from error

    def _read_config(self) -> dict[str, Any]:
        for key, value in self._header.values.items():
            short = key.removeprefix("llama.")
            several = isinstance(value, list | np.ndarray)
            if short != key and short not in _USED_KEYS and (several or value != _OFF.get(short, 0)):
                raise self._error(f"sets {key} to {shown(value)}, which is not supported", _FOLDER)
        hidden, heads = self._int("embedding_length"), self._int("attention.head_count")
        head_dim = self._int("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            size = self._int(key, head_dim)
            if size != head_dim:
                raise self._error(f"sets llama.{key} to {size} where heads have size {head_dim}", _FOLDER)
        # As llama.cpp: a factor without a type is linear, and no factor, or 0, is 1.
        scaling = self._header.get("llama.rope.scaling.type", str, "linear")
        older = self._header.get("llama.rope.scale_linear", float, 0.0)
        factor = self._header.get("llama.rope.scaling.factor", float, older) or 1.0
        if scaling not in ("none", "linear"):
            raise self._error(f'sets llama.rope.scaling.type to "{scaling}", which is not supported', _FOLDER)
        linear = {"rope_type": "linear", "factor": _shortest(factor)}
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise self._error("has no tensor token_embd.weight", CONVERT)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": self._int("feed_forward_length"),
            "num_hidden_layers": self._int("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._int("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": _shortest(self._header.get("llama.attention.layer_norm_rms_epsilon", float)),
            "rope_theta": _shortest(self._header.get("llama.rope.freq_base", float, _ROPE_THETA)),
            "rope_scaling": None if scaling == "none" or factor == 1.0 else linear,
            "max_position_embeddings": self._int("context_length"),
            "vocab_size": embedding.shape[0] if embedding.shape else 0,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": self._token_id("eos"),
            "pad_token_id": self._token_id("padding"),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": _DTYPES.get(embedding.type, "float32"),
        }

    def _map_tensors(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """`shapes`, and the GGUF name for each, after checking that the file has exactly these."""
        c = self.config
        d, ffn, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
        if layers > max(1000, len(self._tensors)):  # before a table of so many layers is made
            raise self._error(f"says {layers} layers but has {len(self._tensors)} tensors", CONVERT)
        q, kv = (c[key] * c["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q), "mlp.gate_proj": (ffn, d), "mlp.up_proj": (ffn, d),
            "mlp.down_proj": (d, ffn), "input_layernorm": (d,), "post_attention_layernorm": (d,),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,),
        }  # fmt: skip
        if not c["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (c["vocab_size"], d)
        shapes |= {f"model.layers.{i}.{k}.weight": shape for i in range(layers) for k, shape in layer.items()}
        table = get_tensor_name_map(MODEL_ARCH.LLAMA, layers)
        names = {name: table.get_name(name, (".weight",)) or name for name in shapes}
        for name, shape in shapes.items():
            tensor = self._tensors.get(names[name])
            if tensor is None:
                raise self._error(f"has no tensor {names[name]}", CONVERT)
            if tensor.shape != shape:
                raise self._error(f"has {names[name]} of shape {tensor.shape}, not {shape}", CONVERT)
        # rope_freqs.weight (the rotary scaling of Llama 3.1), biases, experts, scales of a new type.
        for name in sorted(self._tensors.keys() - names.values()):
            raise self._error(f"has the tensor {name}, which is not supported", _FOLDER)
        for tensor in {t.type: t for t in self._tensors.values()}.values():
            try:
                dequantize(np.zeros(GGML_QUANT_SIZES[tensor.type][1], np.uint8), tensor.type)
            except NotImplementedError as error:
                what = f"has {tensor.name} in the type {tensor.type.name}, which cannot be dequantised"
                raise self._error(what, "use a file of another type, such as Q8_0 or F16") from error
        return shapes, names

    def _int(self, key: str, *default: int) -> int:
        value = self._header.get(f"llama.{key}", int, *default)
        if value < 1:
            raise self._error(f"sets llama.{key} to {value}, not to one positive number", _FOLDER)
        return value

    def _token_id(self, name: str) -> int | None:
        spm = self._header.get("tokenizer.ggml.model", str, None) == "llama"
        return self._header.get(f"tokenizer.ggml.{name}_token_id", int, _SPM_IDS.get(name) if spm else None)

    def _error(self, what: str, do: str) -> ModelError:
        return ModelError(f"{self.path} {what}; {do}.")


def _shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
