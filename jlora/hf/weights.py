"""A model's weights by rows of their tensors, on the host: as stored, quantised, trained, or with an adapter merged in;
and full Hugging Face checkpoints written from them.

Whoever reads a few rows at a time holds a few rows: models are merged and proved that memory does not hold.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from jlora.errors import ModelError
from jlora.files.atomic import write_json
from jlora.hf.families import FAMILIES, WRAPPED_IN
from jlora.hf.names import Entry, name_table, tensor_name, to_hf
from jlora.hf.source import FLOATS, Source
from jlora.model.adapter import Adapter, Lora, Rows, Saved
from jlora.model.config import ModelConfig
from jlora.model.llama import Decoder
from jlora.model.quant import BLOCK, CHANNEL_TYPES, Quantized, dequantize, encode, finish

# Weights of a block of rows, unless a head has more.
BLOCK_WEIGHTS = 2**20

SHARD_BYTES = 5 * 10**9
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def blocks(cfg: ModelConfig, entry: Entry) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in blocks of whole heads, each [start, stop)."""
    height = entry.hf_shape[0] if len(entry.hf_shape) == 2 else 1
    heads = max(1, BLOCK_WEIGHTS // (cfg.head_dim * entry.hf_shape[-1]))
    for start in range(0, height, heads * cfg.head_dim):
        yield start, min(start + heads * cfg.head_dim, height)


@runtime_checkable
class Weights(Protocol):
    """A model's weights, of which some rows are asked for at a time."""

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of one tensor in the file's layout, as a new float32 array; a vector is one row.

        Where the rows of q_proj and k_proj begin and end, heads must, too. A head that was tied is the embedding.
        """


@dataclass(frozen=True)
class Stored:
    """The weights as a base on disk has them."""

    source: Source

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """See `Weights`."""
        stored = name if name in self.source.shapes else tensor_name(self.source.model.names, "embed_tokens", None)
        return np.array(self.source.part(stored, (start, stop), (0, entry.hf_shape[-1])), np.float32)


class Dequantized:
    """The weights of a base that `jlora.hf.load` would quantise: to the same codes, and dequantised; one tensor's codes
    are held at a time."""

    def __init__(self, source: Source, cfg: ModelConfig, kind: str):
        self._source, self._stored, self._cfg, self._kind = source, Stored(source), cfg, kind
        self._name, self._codes = "", Quantized(None, None, None, None, kind, ())

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """See `Weights`."""
        if not entry.transposed:
            return self._stored.rows(name, entry, start, stop)
        if name != self._name:
            self._codes = self._quantize(name, entry)
            self._name = name
        cut = jax.tree.map(lambda x: x[..., start:stop] if x.ndim else x, self._codes)
        return np.array(dequantize(jax.tree.map(jnp.asarray, cut), jnp.dtype("float32")).T)

    def _quantize(self, name: str, entry: Entry) -> Quantized:
        """The tensor's codes and scales, their outputs as one dim, on the host."""
        if (stored := self._source.stored_codes(name, self._kind)) is not None:
            outputs, inputs = entry.hf_shape
            codes = stored.nf4_codes((0, outputs), (0, inputs // 2)).T.reshape(-1, BLOCK // 2, outputs)
            return Quantized(codes, *stored.nf4_scales(), self._kind, (inputs,))
        parts: list[np.ndarray] = []
        for start, stop in blocks(self._cfg, entry):
            found = _encode(self._stored.rows(name, entry, start, stop).T, self._kind)
            if not parts:
                parts = [np.empty((*part.shape[:-1], entry.hf_shape[0]), part.dtype) for part in found]
            for whole, part in zip(parts, found, strict=True):
                whole[..., start:stop] = part
        leaf = Quantized(None, parts[1], None, None, self._kind, (entry.hf_shape[1],))
        if self._kind not in CHANNEL_TYPES:
            leaf = jax.tree.map(np.asarray, _finish(leaf))
        return Quantized(parts[0], leaf.scales, leaf.second, leaf.offset, self._kind, leaf.inputs)


_encode = jax.jit(encode, static_argnums=1)
_finish = jax.jit(finish)


@dataclass(frozen=True)
class Trained:
    """The weights of a decoder on this host, stacked over layers and not quantised."""

    decoder: Decoder

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """See `Weights`."""
        owner = self.decoder if entry.layer is None else self.decoder.layers
        return _rows(entry, np.asarray(getattr(owner, entry.leaf).get_value()), start, stop)


class Merged:
    """Other weights with an adapter's share added, W + scale * B A, or the adapter's own in their place.

    With DoRA, every output's row of the sum is brought to its magnitude.
    """

    def __init__(self, weights: Weights, adapter: Adapter):
        self._weights = weights
        self._adapter: Adapter = jax.tree.map(np.asarray, adapter)

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """See `Weights`."""
        part = self._adapter.get(entry.leaf)
        if isinstance(part, Saved):
            return _rows(entry, np.asarray(part.weight), start, stop)
        merged = self._weights.rows(name, entry, start, stop)
        if isinstance(part, Rows):
            ids = np.array(part.ids)
            inside = (ids >= start) & (ids < stop)
            merged[ids[inside] - start] = np.asarray(part.weight)[inside]
            return merged
        lora = None if part is None or entry.layer is None else at_layer(part, entry.layer)
        if lora is None:
            return merged

        def product(a: Any, b: Any) -> np.ndarray:
            rank = b.shape[0]
            return b.reshape(rank, -1)[:, start:stop].T @ a.reshape(-1, rank).T

        delta = product(lora.lora_a, lora.lora_b)
        if lora.initial is not None:
            delta -= product(*lora.initial)
        delta *= np.float32(lora.scale)
        merged += delta
        if lora.magnitude is not None:
            norms = np.linalg.norm(merged, axis=1, keepdims=True)
            merged *= lora.magnitude.reshape(-1, 1)[start:stop] / norms
        return merged


def at_layer(lora: Lora, layer: int) -> Lora | None:
    """One layer's adapter out of a stacked one; None where the layer has none."""
    if lora.ranks is not None and not lora.ranks[layer]:
        return None
    return replace(jax.tree.map(lambda array: array[layer], lora), dropout=0.0, ranks=None)


def _rows(entry: Entry, leaf: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows of one tensor out of its leaf, which is stacked over layers where it has any."""
    tensor = to_hf(entry, leaf if entry.layer is None else leaf[entry.layer])
    return np.array((tensor if tensor.ndim == 2 else tensor[None])[start:stop], np.float32)


def leaf(weights: Weights, cfg: ModelConfig, name: str, entry: Entry) -> jax.Array:
    """One tensor of a layer whole, in the model's layout, float32; the host holds it once."""
    if not entry.transposed:
        return jnp.asarray(weights.rows(name, entry, 0, 1).reshape(entry.shape))
    turned = _aligned(entry.hf_shape[::-1])
    for start, stop in blocks(cfg, entry):
        turned[:, start:stop] = weights.rows(name, entry, start, stop).T
    return jax.device_put(turned.reshape(entry.shape), may_alias=True)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that XLA for CPUs takes without a copy."""
    size, boundary = 4 * math.prod(shape), 64
    buffer = np.empty(size + boundary, np.uint8)
    first = -buffer.ctypes.data % boundary
    return buffer[first : first + size].view(np.float32).reshape(shape)


def untied(cfg: ModelConfig, config: dict[str, Any], adapter: Adapter) -> tuple[ModelConfig, dict[str, Any]]:
    """Shape and config.json of the merged model: an adapter that has the embedding or the head in full unties them."""
    if not cfg.tie_word_embeddings or not any(
        isinstance(adapter.get(leaf), Saved) for leaf in ("embed_tokens", "lm_head")
    ):
        return cfg, config
    return replace(cfg, tie_word_embeddings=False), config | {"tie_word_embeddings": False}


def stored_bytes(cfg: ModelConfig, dtype: str) -> int:
    """Bytes of all tensors of a checkpoint in `dtype`."""
    return sum(math.prod(entry.hf_shape) for entry in name_table(cfg).values()) * np.dtype(DTYPES[dtype]).itemsize


def save_checkpoint(
    folder: Path,
    cfg: ModelConfig,
    weights: Weights,
    config: dict[str, Any],
    dtype: str,
    add_files: Callable[[Path], None],
) -> None:
    """Write config.json, sharded safetensors and what `add_files` puts beside them.

    A text model that was taken out of another is written as one of its own.

    Args:
      dtype: bfloat16, float16 or float32, of the tensors written.

    Raises:
      ModelError: a tensor is not finite in `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architecture, names = FAMILIES[config["model_type"]].architecture, FAMILIES[config["model_type"]].names
    table, width = name_table(replace(cfg, names=names)), np.dtype(DTYPES[dtype]).itemsize
    found = dict(zip(table, name_table(cfg), strict=True))  # where the weights are read
    sizes = {name: math.prod(entry.hf_shape) * width for name, entry in table.items()}
    pattern = "model{suffix}.safetensors"
    shards = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=pattern, max_shard_size=SHARD_BYTES
    )
    for file, shard in shards.filename_to_tensors.items():
        with (folder / file).open("wb") as out:
            out.write(header({name: table[name].file_shape for name in shard}, dtype))
            for name in shard:
                entry = table[name]
                pieces: Iterable[np.ndarray] = (weights.rows(found[name], entry, *rows) for rows in blocks(cfg, entry))
                if entry.input_first:  # whole, since its rows are the columns of all pieces
                    pieces = [np.concatenate(list(pieces)).T]
                for piece in pieces:
                    with np.errstate(over="ignore"):
                        rows = piece.astype(DTYPES[dtype])
                    if not np.isfinite(rows).all():
                        raise ModelError(
                            f"{folder}: tensor {name} does not fit {dtype}; export with --dtype bfloat16 or float32"
                        )
                    out.write(np.ascontiguousarray(rows).view(np.uint8).data)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    gone = ("torch_dtype", "dtype", WRAPPED_IN, "quantization_config")
    config = {key: value for key, value in config.items() if key not in gone}
    config |= {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", config)
    add_files(folder)


def header(shapes: dict[str, tuple[int, ...]], dtype: str, **metadata: str) -> bytes:
    """What a safetensors file begins with: the tensors lie behind it in this order, of one dtype.

    The same bytes every time, while the library writes metadata in an order of chance.
    """
    stored = next(name for name, known in FLOATS.items() if known == DTYPES[dtype])
    tensors: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * FLOATS[stored].itemsize
        tensors[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
