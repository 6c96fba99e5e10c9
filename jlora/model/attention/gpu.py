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

from jlora.model.attention.interface import over_rows
from jlora.runtime import private_jax

# cuDNN takes a mask as a bias, so a mask of [T S] is held twice. Up to the first length that is little beside a
# layer's activations; longer rows have masks of so many queries at a time.
MAX_MASKED_LENGTH = 8192
QUERY_BLOCK = 4096
KEY_STEP = 64


@over_rows
def cudnn(q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None) -> Array:
    """Over rows of any number of segments; the mask of a long one exists for `QUERY_BLOCK` queries at a time."""
    assert softcap is None, "cuDNN has none through JAX"
    length = q.shape[1]
    block = length if length <= MAX_MASKED_LENGTH else QUERY_BLOCK
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = 0 if window is None else max(0, start - window + 1) // KEY_STEP * KEY_STEP
        run = partial(_query_block, start=start, stop=stop, first=first, window=window)
        out = jax.checkpoint(run, policy=_is_kernel)(q, k, v, segments)
        # One block after another, backward too: else all their gradients of keys and values wait to be added up.
        k, v, out = jax.lax.optimization_barrier((k, v, out))
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1)


@over_rows
def cudnn_one_segment(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None
) -> Array:
    """Over rows that hold one segment from their start, and padding behind it: causality is all the mask.

    What padding sees is not what it sees in the reference; no token before it ever looks at it.
    """
    assert softcap is None, "cuDNN has none through JAX"
    local = None if window is None or window >= q.shape[1] else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")


def _is_kernel(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """Backward keeps what cuDNN's forward call gives; slices and masks are made again."""
    return primitive.name == private_jax.CUDNN_FORWARD


def _query_block(
    q: Array, k: Array, v: Array, segments: Array, start: int, stop: int, first: int, window: int | None
) -> Array:
    """Queries [start, stop) over the keys [first, stop), the earliest that any of them sees."""
    queries, keys = jnp.arange(start, stop)[None, :, None], jnp.arange(first, stop)[None, None]
    mask = segments[:, start:stop, None] == segments[:, None, first:stop]
    if window is not None:
        mask &= keys > queries - window
    is_causal = start == first  # cuDNN lets the first query see the first key
    if not is_causal:
        mask &= keys <= queries
    with private_jax.no_mask_gradient():
        return jax.nn.dot_product_attention(
            q[:, start:stop],
            k[:, first:stop],
            v[:, first:stop],
            mask=mask[:, None],
            is_causal=is_causal,
            implementation="cudnn",
        )
