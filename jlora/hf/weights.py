"""A model's weights by rows of their tensors, on the host: as stored, quantised, trained, or with an adapter merged in.

Whoever reads a few rows at a time holds a few rows: models are merged and proved that memory does not hold.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jlora.hf.names import Entry, tensor_name, to_hf
from jlora.hf.source import Source
from jlora.model.adapter import Adapter, Lora, Saved
from jlora.model.config import ModelConfig
from jlora.model.llama import Decoder
from jlora.model.quant import BLOCK, CHANNEL_TYPES, Quantized, dequantize, encode, finish

# Weights of a block of rows, unless a head has more.
BLOCK_WEIGHTS = 2**20


@runtime_checkable
class Weights(Protocol):
    """Some model's weights."""

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of one tensor in the file's layout, as a new float32 array; a vector is one row.

        Where the rows of q_proj and k_proj begin and end, heads must, too.
        """
        ...


def blocks(cfg: ModelConfig, entry: Entry) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in blocks of whole heads, each [start, stop)."""
    height = entry.hf_shape[0] if len(entry.hf_shape) == 2 else 1
    heads = max(1, BLOCK_WEIGHTS // (cfg.head_dim * entry.hf_shape[-1]))
    for start in range(0, height, heads * cfg.head_dim):
        yield start, min(start + heads * cfg.head_dim, height)


class Stored:
    """The weights as a base on disk has them."""

    def __init__(self, source: Source):
        self._source = source
        self._embedding = tensor_name(source.model.names, "embed_tokens", None)

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """See `Weights`. A head that was tied is the embedding."""
        stored = name if name in self._source.shapes else self._embedding
        return np.array(self._source.part(stored, (start, stop), (0, entry.hf_shape[-1])), np.float32)


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


class Trained:
    """The weights of a decoder on this host, stacked over layers and not quantised."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder

    def rows(self, name: str, entry: Entry, start: int, stop: int) -> np.ndarray:
        """See `Weights`."""
        owner = self._decoder if entry.layer is None else self._decoder.layers
        leaf = np.asarray(getattr(owner, entry.leaf).get_value())
        return np.array(
            _rows(to_hf(entry, leaf if entry.layer is None else leaf[entry.layer]), start, stop), np.float32
        )


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
            own = part.weight if entry.layer is None else part.weight[entry.layer]
            return np.array(_rows(to_hf(entry, np.asarray(own)), start, stop), np.float32)
        merged = self._weights.rows(name, entry, start, stop)
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


def _rows(tensor: np.ndarray, start: int, stop: int) -> np.ndarray:
    return (tensor if tensor.ndim == 2 else tensor[None])[start:stop]


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
