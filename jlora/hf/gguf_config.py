"""What the metadata of a GGUF file says of a model, as its config.json would say it.

Where the file leaves something open, llama.cpp's reading of it is followed (`load_hparams` of llama-model.cpp). What
would change the numbers and is not understood is refused, never ignored.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType

from jlora.hf.families import FAMILIES, Family
from jlora.hf.gguf_header import FOLDER, Header, shown
from jlora.hf.gguf_tokenizer import token_id
from jlora.model.rope import Llama3Rope, Rope, rope_frequencies


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp keeps a family of models.

    Attributes:
      arch: of the `gguf` package, which knows the names of its tensors.
      model_type: of config.json.
      neighbours: rows of queries and keys are in the order in which neighbours are turned, not the halves of a head.
      largest: layers of the size whose scores are divided by the root of width / heads, and not of head_dim.
    """

    arch: MODEL_ARCH
    model_type: str
    neighbours: bool = False
    largest: int | None = None


ARCHITECTURES = {
    "llama": Architecture(MODEL_ARCH.LLAMA, "llama", neighbours=True),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, "qwen2"),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, "qwen3"),
    "gpt2": Architecture(MODEL_ARCH.GPT2, "gpt2"),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, "gemma2", largest=46),
    "gemma3": Architecture(MODEL_ARCH.GEMMA3, "gemma3_text", largest=62),
    "phi3": Architecture(MODEL_ARCH.PHI3, "phi3"),
}

# Keys of an architecture that are read below, or that do not change what the model computes.
_USED = frozenset({
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout",
})  # fmt: skip
# Any other is accepted only at the value that switches it off: this one, or else 0.
_OFF = {"attention.causal": True, "rope.scaling.attn_factor": 1.0}
# What llama.cpp assumes where the file is silent.
_ROPE_THETA = 10000.0

_DTYPES = {GGMLQuantizationType.BF16: "bfloat16", GGMLQuantizationType.F16: "float16"}
# Divisors of frequencies, within a context and beyond it.
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# Those of Llama 3, and what they follow from: files keep the divisors, and config.json the rest.
_FREQS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def architecture_of(header: Header) -> Architecture:
    """The architecture that a file names.

    Raises:
      ModelError: it is not read.
    """
    name = header.get("general.architecture", str)
    if name not in ARCHITECTURES:
        *others, last = (f'"{known}"' for known in ARCHITECTURES)
        raise header.refuse(
            f'has the architecture "{name}"', f"use a model of architecture {', '.join(others)} or {last}"
        )
    return ARCHITECTURES[name]


def config_of(header: Header) -> tuple[dict[str, Any], set[str]]:
    """The equivalent of config.json, and the tensors that it was read from.

    `torch_dtype` is the embedding's type in the file, and float32 if that is a quantised one.

    Raises:
      ModelError: an architecture or a key that is not read, or a value that makes no sense.
    """
    metadata = _Metadata(header)
    return metadata.config(), metadata.read


class _Metadata:
    """The keys of one architecture."""

    def __init__(self, header: Header):
        self._header = header
        self._architecture = architecture_of(header)
        self._prefix = header.get("general.architecture", str) + "."
        self._family: Family = FAMILIES[self._architecture.model_type]
        self.read: set[str] = set()

    def config(self) -> dict[str, Any]:
        """See `config_of`."""
        family, header = self._family, self._header
        epsilon = f"attention.layer_norm_{'' if family.layer_norm else 'rms_'}epsilon"
        self._check_unread({epsilon} | self._own_keys())
        hidden, heads = self._int("embedding_length"), self._int("attention.head_count")
        kv_heads, even = self._int("attention.head_count_kv", heads), hidden // heads
        head_dim = self._int("attention.key_length", even)
        self._require("attention.value_length", head_dim, head_dim)
        if family.learned_positions:
            self._require("attention.key_length", even, even)
            self._require("attention.head_count_kv", heads, heads)
        layers, num_tensors = self._int("block_count"), len(header.tensors)
        if layers > max(1000, num_tensors):  # before a table of so many layers is made
            raise header.refuse(f"says {layers} layers but has {num_tensors} tensors")
        embedding = header.tensors.get("token_embd.weight")
        if embedding is None:
            raise header.refuse("has no tensor token_embd.weight")
        config: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self._architecture.model_type,
            "hidden_size": hidden,
            "intermediate_size": self._int("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "rms_norm_eps": self._real(epsilon),
            "max_position_embeddings": self._int("context_length"),
            "vocab_size": embedding.shape[0] if embedding.shape else 0,
            "tie_word_embeddings": "output.weight" not in header.tensors,
            "bos_token_id": token_id(header, "bos"),
            "eos_token_id": token_id(header, "eos"),
            "pad_token_id": token_id(header, "padding"),
            "hidden_act": family.activation,
            **dict.fromkeys(family.bias_keys, False),
            "torch_dtype": _DTYPES.get(embedding.type, "float32"),
        }
        if not family.learned_positions:
            config |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
            config |= self._rope(head_dim, config["max_position_embeddings"])
        config |= self._attention(even if layers == self._architecture.largest else head_dim)
        return {dict(family.keys).get(key, key): value for key, value in config.items()}

    def _own_keys(self) -> set[str]:
        """The keys that are read of this family, and not of all."""
        family = self._family
        found = {
            "attention.sliding_window": family.windowed and not family.switch,
            "attention.sliding_window_pattern": family.full_every_key is not None,
            "rope.freq_base_swa": family.local_theta is not None,
            "final_logit_softcapping": family.soft_caps,
            "attn_logit_softcapping": family.attention_softcap is not None,
            "rope.scaling.attn_factor": self._is_long_rope(),
        }
        return {key for key, read in found.items() if read}

    def _check_unread(self, own: set[str]) -> None:
        for key, value in self._header.values.items():
            short = key.removeprefix(self._prefix)
            several = isinstance(value, list | np.ndarray)
            if short != key and short not in _USED | own and (several or value != _OFF.get(short, 0)):
                raise self._header.refuse(f"sets {key} to {shown(value)}, which is not supported", FOLDER)

    def _rope(self, head_dim: int, positions: int) -> dict[str, Any]:
        """How heads are turned."""
        family = self._family
        found: dict[str, Any] = {"rope_theta": self._real("rope.freq_base", _ROPE_THETA)}
        if family.partial_rotary:
            found["partial_rotary_factor"] = self._int("rope.dimension_count", head_dim) / head_dim
        else:
            self._require("rope.dimension_count", head_dim, head_dim)
        if family.local_theta is not None:
            found["rope_local_base_freq"] = self._real("rope.freq_base_swa", family.local_theta)
        # As llama.cpp: a factor without a type is linear, and no factor, or 0, is 1.
        factor = self._real("rope.scaling.factor", self._real("rope.scale_linear", 0.0)) or 1.0
        kind = self._header.get(f"{self._prefix}rope.scaling.type", str, "linear")
        if self._is_long_rope():
            return found | self._long_rope(positions)
        if kind not in ("none", "linear"):
            raise self._header.refuse(
                f'sets {self._prefix}rope.scaling.type to "{kind}", which is not supported', FOLDER
            )
        scaling = None if kind == "none" or factor == 1.0 else {"rope_type": "linear", "factor": factor}
        if _FREQS in self._header.tensors and scaling is None and self._architecture.neighbours:
            scaling = self._llama3(Rope(found["rope_theta"], head_dim, None))
        return found | {"rope_scaling": scaling}

    def _is_long_rope(self) -> bool:
        return self._family.partial_rotary and {_SHORT, _LONG} <= self._header.tensors.keys()

    def _long_rope(self, positions: int) -> dict[str, Any]:
        """LongRoPE, as the config.json of Phi-3 has it: without an attention factor that follows from the rest."""
        original = self._int("rope.scaling.original_context_length")
        scaling: dict[str, Any] = {"type": "longrope"}
        scaling |= {"short_factor": self._divisors(_SHORT), "long_factor": self._divisors(_LONG)}
        factor, growth = self._real("rope.scaling.attn_factor", 1.0), positions / original
        suggested = math.sqrt(1 + math.log(growth) / math.log(max(original, 2))) if growth > 1 else 1.0
        if np.float32(factor) != np.float32(suggested):
            scaling["attention_factor"] = factor
        return {"rope_scaling": scaling, "original_max_position_embeddings": original}

    def _llama3(self, plain: Rope) -> dict[str, Any]:
        """Llama 3's scaling, where it is what the divisors follow from."""
        found = np.array(self._divisors(_FREQS))
        scaling: dict[str, Any] = {"factor": float(found.max(initial=1.0))} | _LLAMA3
        fits = found.shape == (plain.dim // 2,) and math.isfinite(scaling["factor"])
        if fits:
            stretched = rope_frequencies(replace(plain, scaling=Llama3Rope(**scaling)))
            fits = np.allclose(found * stretched, rope_frequencies(plain), rtol=1e-5, atol=0.0)
        if not fits:
            raise self._header.refuse(f"has {_FREQS}, of other values than Llama 3's scaling gives", FOLDER)
        return {"rope_type": "llama3"} | scaling

    def _divisors(self, name: str) -> list[float]:
        """The values of a vector of float32; marked as read."""
        tensor = self._header.tensors[name]
        if tensor.type != GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            raise self._header.refuse(f"has {name} of {tensor.type.name} and shape {tensor.shape}, not a vector of F32")
        self.read.add(name)
        values = np.memmap(tensor.file, "<f4", "r", tensor.offset, tensor.shape)
        return [shortest(value) for value in values.tolist()]

    def _attention(self, scalar: int) -> dict[str, Any]:
        """Windows, soft caps and the scale of scores.

        Args:
          scalar: what scores are divided by the root of.
        """
        family, found = self._family, dict[str, Any]()
        if family.switch:
            found["use_sliding_window"] = False
        elif family.windowed:
            # Of layers whose pattern is a key, a window that is not there is none.
            usual = 0 if family.full_every_key else family.sliding_window or 0
            found["sliding_window"] = self._header.get(f"{self._prefix}attention.sliding_window", int, usual) or None
        if family.full_every_key is not None:
            every = self._int("attention.sliding_window_pattern", family.full_every or 1)
            found[family.full_every_key] = every if found["sliding_window"] else 1
        if family.scaled_queries:
            found["query_pre_attn_scalar"] = scalar
        caps = {"final_logit_softcapping": family.logits_softcap, "attn_logit_softcapping": family.attention_softcap}
        read = self._own_keys()
        return found | {key: self._real(key, cap or 0.0) or None for key, cap in caps.items() if key in read}

    def _require(self, key: str, default: int, size: int) -> None:
        """A size that must be another one's, where the file has it."""
        if (value := self._int(key, default)) != size:
            raise self._header.refuse(f"sets {self._prefix}{key} to {value} where heads have size {size}", FOLDER)

    def _int(self, key: str, *default: int) -> int:
        value = self._header.get(f"{self._prefix}{key}", int, *default)
        if value < 1:
            raise self._header.refuse(f"sets {self._prefix}{key} to {value}, not to one positive number", FOLDER)
        return value

    def _real(self, key: str, *default: float) -> float:
        return shortest(self._header.get(f"{self._prefix}{key}", float, *default))


def shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
