"""A model written as a GGUF file, for llama.cpp, Ollama and LM Studio: the inverse of `gguf`, which reads it back.

Names, metadata and layouts are those of llama.cpp's converter (convert_hf_to_gguf.py); the `gguf` package quantises and
writes. A file is only written if it says the same model, field by field, as the one that it is made of: what GGUF has
no words for is refused.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize
from gguf.tensor_mapping import get_tensor_name_map

from jlora.errors import ConfigError, ModelError
from jlora.hf.families import FAMILIES
from jlora.hf.gguf import GGUFFile
from jlora.hf.gguf_config import ARCHITECTURES, Architecture
from jlora.hf.gguf_header import ALIGNMENT
from jlora.hf.names import Entry, name_table
from jlora.hf.weights import Weights, blocks
from jlora.model.config import ModelConfig
from jlora.model.rope import LinearRope, Llama3Rope, LongRope, Rope, rope_frequencies

# What the `gguf` package can make, the largest first. k-quants and i-quants are made by llama.cpp's own llama-quantize.
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
# In which embedding and head are kept where the projections have fewer bits, as llama-quantize keeps them in more.
OF_TABLES = "Q8_0"

# Whose heads are together as wide as the model, for llama.cpp.
AS_WIDE = ("qwen2", "phi3")

CONVERTER = "write it with --merge, and convert that by llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Rounded:
    """Other weights as a GGUF file of a kind holds them."""

    weights: Weights
    kind: str

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """See `jlora.hf.weights.Weights`."""
        kind = kind_of(entry, self.kind)
        return dequantize(quantize(self.weights.rows(name, entry, start, stop), kind), kind)


def kind_of(entry: Entry, kind: str) -> GGMLQuantizationType:
    """The type of one tensor in a file of a kind: vectors and learned positions stay whole, as in llama.cpp's files."""
    if len(entry.hf_shape) == 1 or entry.leaf == "embed_positions":
        return GGMLQuantizationType.F32
    if not entry.transposed and KINDS.index(kind) > KINDS.index(OF_TABLES):
        kind = OF_TABLES
    found = GGMLQuantizationType[kind]
    return found if entry.hf_shape[-1] % GGML_QUANT_SIZES[found][0] == 0 else GGMLQuantizationType.F16


def architecture_for(cfg: ModelConfig, config: dict[str, Any], where: str) -> tuple[str, Architecture]:
    """llama.cpp's name for a model, and how it keeps such models.

    Raises:
      ModelError: there is none.
    """
    family = "llama" if config["model_type"] == "mistral" else config["model_type"]
    for name, found in ARCHITECTURES.items():
        if found.model_type == family:
            if name in AS_WIDE and cfg.head_dim * cfg.num_attention_heads != cfg.hidden_size:
                raise ModelError(f"{where}: llama.cpp loads {name} only with hidden_size = heads x head_dim")
            return name, found
    raise ModelError(f"{where}: a model of type {config['model_type']} is not written as GGUF; {CONVERTER}")


def write_gguf(
    file: Path, cfg: ModelConfig, config: dict[str, Any], weights: Weights, keys: dict[str, Any], kind: str
) -> None:
    """Write a model; one tensor is in memory at a time.

    Args:
      config: the model's config.json. keys: of the file beside the architecture's; see `jlora.hf.gguf_vocabulary`.
      kind: of `KINDS`, that of the projections.

    Raises:
      ModelError: GGUF, as we read it, does not say this model; or a weight is not finite in `kind`.
      ConfigError: no room on the disk.
    """
    name, architecture = architecture_for(cfg, config, str(file))
    extra = divisors(cfg)
    values = metadata(cfg, config, name) | {"general.file_type": int(_file_type(kind))} | keys
    own = replace(cfg, names=FAMILIES[architecture.model_type].names)
    table, found = name_table(own), dict(zip(name_table(own), name_table(cfg), strict=True))
    names = get_tensor_name_map(architecture.arch, cfg.num_hidden_layers)
    stored = {each: names.get_name(each, (".weight", ".bias")) or each for each in table}
    writer = GGUFWriter(file, name)
    try:
        for key, value in values.items():
            _add(writer, key, value)
        for each, vector in extra.items():
            writer.add_tensor_info(each, vector.shape, vector.dtype, vector.nbytes)
        for each, entry in table.items():
            held = kind_of(entry, kind)
            writer.add_tensor_info(stored[each], entry.hf_shape, np.dtype("f4"), _bytes(entry, held), held)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for vector in extra.values():
            writer.write_tensor_data(vector)
        size = sum(_bytes(entry, kind_of(entry, kind)) + ALIGNMENT for entry in table.values())
        _require_said(file, cfg, size)
        for each, entry in table.items():
            pieces = _pieces(cfg, weights, found[each], entry, architecture, kind_of(entry, kind))
            whole = np.concatenate([piece.reshape(-1).view(np.uint8) for piece in pieces])
            writer.write_tensor_data(whole)
        for stream in writer.fout or ():
            stream.truncate()  # the rest of the hole
    except _NotFinite as error:
        raise ModelError(f"{file}: tensor {error} does not fit {kind}; write another kind, such as BF16") from None
    finally:
        writer.close()


class _NotFinite(Exception):
    pass


def _pieces(
    cfg: ModelConfig,
    weights: Weights,
    name: str,
    entry: Entry,
    architecture: Architecture,
    kind: GGMLQuantizationType,
) -> Iterator[np.ndarray]:
    """A tensor's rows as the file has them, some heads at a time."""
    for start, stop in blocks(cfg, entry):
        rows = weights.rows(name, entry, start, stop)
        rows = turned(cfg, architecture, entry.leaf, rows)
        if cfg.norm_offset and name.endswith("norm.weight"):
            rows = rows + np.float32(1)
        with np.errstate(over="ignore"):
            made = quantize(np.ascontiguousarray(rows, np.float32), kind)
            if not np.isfinite(dequantize(made, kind)).all():
                raise _NotFinite(name)
        yield made


def turned(cfg: ModelConfig, architecture: Architecture, leaf: str, rows: np.ndarray) -> np.ndarray:
    """Rows of whole heads in the file's order: of queries and keys, neighbours may be turned together, not halves."""
    if not architecture.neighbours or leaf.removesuffix("_bias") not in ("q_proj", "k_proj"):
        return rows
    heads = rows.reshape(-1, 2, cfg.head_dim // 2, 1 if leaf.endswith("_bias") else rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def metadata(cfg: ModelConfig, config: dict[str, Any], arch: str) -> dict[str, Any]:
    """The keys of a model's architecture, as the converter writes them."""
    positions = cfg.learned_positions or config["max_position_embeddings"]
    norm = f"attention.layer_norm_{'' if cfg.layer_norm else 'rms_'}epsilon"
    found: dict[str, Any] = {
        "vocab_size": cfg.vocab_size,
        "context_length": positions,
        "embedding_length": cfg.hidden_size,
        "block_count": cfg.num_hidden_layers,
        "feed_forward_length": cfg.intermediate_size,
        "attention.head_count": cfg.num_attention_heads,
        norm: float(cfg.norm_eps),
    }
    if cfg.learned_positions is None:
        found["attention.head_count_kv"] = cfg.num_key_value_heads
        if cfg.head_dim * cfg.num_attention_heads != cfg.hidden_size or cfg.num_key_value_heads == 1:
            found |= dict.fromkeys(("attention.key_length", "attention.value_length"), cfg.head_dim)
    if cfg.ropes:
        found |= _rope(cfg, positions)
    if any(cfg.windows):
        found["attention.sliding_window"] = next(filter(None, cfg.windows))
        if arch == "gemma3":
            found["attention.sliding_window_pattern"] = 1 + list(cfg.windows).index(None)
    caps = {"attn_logit_softcapping": cfg.attention_softcap, "final_logit_softcapping": cfg.logits_softcap}
    found |= {key: float(cap) for key, cap in caps.items() if cap is not None}
    return {f"{arch}.{key}": value for key, value in found.items()} | {
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.alignment": ALIGNMENT,
    }


def _full(cfg: ModelConfig) -> Rope:
    """How the layers without a window are turned; of a model without such, all."""
    by_layer = cfg.ropes if len(cfg.ropes) > 1 else cfg.ropes * len(cfg.windows)
    windows = cfg.windows if len(cfg.windows) > 1 else cfg.windows * len(by_layer)
    return next((rope for rope, window in zip(by_layer, windows, strict=True) if window is None), by_layer[0])


def _rope(cfg: ModelConfig, positions: int) -> dict[str, Any]:
    rope = _full(cfg)
    found: dict[str, Any] = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.dim}
    others = [other for other in cfg.ropes if other != rope]
    if others:
        found["rope.freq_base_swa"] = float(others[0].theta)
    match rope.scaling:
        case LinearRope():
            found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.scaling.factor)}
        case LongRope():
            found["rope.scaling.original_context_length"] = rope.scaling.original_max_position_embeddings
            found["rope.scaling.attn_factor"] = float(rope.scaling.attention_factor)
    return found


def divisors(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors that the frequencies of a rope are divided by, [dim / 2] float32."""
    if not cfg.ropes:
        return {}
    rope = _full(cfg)
    match rope.scaling:
        case Llama3Rope():
            plain = rope_frequencies(replace(rope, scaling=None))
            return {"rope_freqs.weight": (plain / rope_frequencies(rope)).astype(np.float32)}
        case LongRope():
            factors = {"long": rope.scaling.long_factor, "short": rope.scaling.short_factor}
            return {f"rope_factors_{name}.weight": np.array(each, np.float32) for name, each in factors.items()}
    return {}


def _require_said(file: Path, cfg: ModelConfig, size: int) -> None:
    """What a file says is the model that it is made of; seen before its `size` bytes of weights are written.

    Raises:
      ModelError: naming the field that GGUF, or llama.cpp, has no words for. ConfigError: no room for the weights.
    """
    free = shutil.disk_usage(file.parent).free
    if size > free:
        raise ConfigError(
            f"{file}: takes {size / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; make room, or name a file "
            "on another disk"
        )
    os.truncate(file, file.stat().st_size + size)  # as a hole
    try:
        found = GGUFFile(file).model
    except ModelError as error:
        raise ModelError(f"{str(error).rstrip('.')}; or {CONVERTER}") from None
    for field in dataclasses.fields(cfg):
        ours, theirs = getattr(cfg, field.name), getattr(found, field.name)
        if field.name != "names" and _spread(ours, cfg) != _spread(theirs, cfg) and not _close(ours, theirs):
            raise ModelError(f"{file}: GGUF has no words for {field.name}={ours!r:.200} of this model; {CONVERTER}")


def _spread(value: Any, cfg: ModelConfig) -> Any:
    """One value of all layers as one of each."""
    return value * cfg.num_hidden_layers if isinstance(value, tuple) and len(value) == 1 else value


def _close(ours: Any, theirs: Any) -> bool:
    return isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-6)


def _bytes(entry: Entry, kind: GGMLQuantizationType) -> int:
    per_block, size = GGML_QUANT_SIZES[kind]
    return math.prod(entry.hf_shape) // per_block * size


def _file_type(kind: str) -> LlamaFileType:
    return LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """A key of the type that llama.cpp reads it by."""
    if isinstance(value, list):
        return writer.add_array(key, value)
    adds: dict[type, Callable[[str, Any], None]] = {bool: writer.add_bool, int: writer.add_uint32}
    adds |= {float: writer.add_float32, str: writer.add_string}
    adds[type(value)](key, value)
