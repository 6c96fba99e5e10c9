"""cuDNN's flash attention, for GPUs: over packed rows, or over rows of one segment each.

Not with cuDNN's own packed layout: it wants a fixed number of segments in a row, runs from Hopper on only, is told
the wrong places of grouped keys by JAX before 0.11.1, and its backward pass takes a float32 workspace of as many times
[B N T H] as there are segments (4 GiB for 64 segments of 32 heads at 4096 tokens), which no compiled peak shows.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jaxtyping import Array

from jlora.model.attention.context import CHUNKS, answered_by, gathered, to_answering, to_holding
from jlora.model.attention.interface import over_rows
from jlora.model.sharding import CONTEXT, context_size
from jlora.runtime import private_jax

# cuDNN takes a mask as a bias, so a mask of [T S] is held twice. Up to the first length that is little beside a
# layer's activations; longer rows have masks of so many queries at a time.
MAX_MASKED_LENGTH = 8192
QUERY_BLOCK = 4096
KEY_STEP = 64


def _cudnn(q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None) -> Array:
    """Over rows of any number of segments; the mask of a long one exists for `QUERY_BLOCK` queries at a time."""
    assert softcap is None, "cuDNN has none through JAX"
    return _from(0, q, k, v, segments, window)


def _from(begin: int, q: Array, k: Array, v: Array, segments: Array, window: int | None) -> Array:
    """Queries that follow each other in their rows from `begin` on, over the keys of whole rows."""
    end = begin + q.shape[1]
    block = q.shape[1] if k.shape[1] <= MAX_MASKED_LENGTH else QUERY_BLOCK
    outputs = []
    for start in range(begin, end, block):
        stop = min(start + block, end)
        first = 0 if window is None else max(0, start - window + 1) // KEY_STEP * KEY_STEP
        run = partial(_query_block, begin=begin, start=start, stop=stop, first=first, window=window)
        out = jax.checkpoint(run, policy=_is_kernel)(q, k, v, segments)
        # One block after another, backward too: else all their gradients of keys and values wait to be added up.
        k, v, out = jax.lax.optimization_barrier((k, v, out))
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1)


def _cudnn_over_context(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None
) -> Array:
    """As `_cudnn`, of a device's part of the rows, with the keys and values of all.

    A call of cuDNN has the number of its keys from the program, which is the same on all devices: it has a branch for
    each of them, with the keys that its queries see.
    """
    assert softcap is None, "cuDNN has none through JAX"
    devices, chunk = context_size(), q.shape[1] // CHUNKS
    chunks = answered_by(devices)

    def branch(device: int, q: Array, k: Array, v: Array) -> Array:
        numbers = chunks[CHUNKS * device : CHUNKS * (device + 1)]
        parts = zip(numbers, jnp.split(q, CHUNKS, axis=1), strict=True)
        return jnp.concatenate([_from(number * chunk, part, k, v, segments, window) for number, part in parts], axis=1)

    def run(q: Array, k: Array, v: Array) -> Array:
        k, v = gathered(k, v, axis=1)
        branches = [partial(branch, device) for device in range(devices)]
        return jax.lax.switch(jax.lax.axis_index(CONTEXT), branches, to_answering(q), k, v)

    # No layer's keys and values wait for the backward pass whole on every device.
    return to_holding(jax.checkpoint(run, policy=_is_kernel)(q, k, v))


def _cudnn_one_segment(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None
) -> Array:
    """Over rows that hold one segment from their start, and padding behind it: causality is all the mask.

    What padding sees is not what it sees in the reference; no token before it ever looks at it.
    """
    assert softcap is None, "cuDNN has none through JAX"
    local = None if window is None or window >= q.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")


cudnn = over_rows(_cudnn, _cudnn_over_context)
cudnn_one_segment = over_rows(_cudnn_one_segment, _cudnn_over_context)


def _is_kernel(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """Backward keeps what cuDNN's forward call gives; slices and masks are made again."""
    return primitive.name == private_jax.CUDNN_FORWARD


def _query_block(
    q: Array, k: Array, v: Array, segments: Array, begin: int, start: int, stop: int, first: int, window: int | None
) -> Array:
    """Queries [start, stop), of those from `begin` on, over the keys [first, stop), the first that any of them sees."""
    queries, keys = jnp.arange(start, stop)[None, :, None], jnp.arange(first, stop)[None, None]
    mask = segments[:, start:stop, None] == segments[:, None, first:stop]
    if window is not None:
        mask &= keys > queries - window
    is_causal = start == first  # cuDNN lets the first query see the first key
    if not is_causal:
        mask &= keys <= queries
    with private_jax.no_mask_gradient():
        return jax.nn.dot_product_attention(
            q[:, start - begin : stop - begin],
            k[:, first:stop],
            v[:, first:stop],
            mask=mask[:, None],
            is_causal=is_causal,
            implementation="cudnn",
        )
