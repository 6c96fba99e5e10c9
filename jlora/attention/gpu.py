"""cuDNN's flash attention, for GPUs."""

import jax
from jaxtyping import Array, Float, Int

from jlora.attention.interface import per_device


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Flash attention of cuDNN for GPUs, with the segments as a mask of [B T S].

    Not with cuDNN's own packed layout, which wants a fixed number of segments in a row: it runs from Hopper
    on only, and its backward pass takes a float32 workspace of as many times [B N T H] (4 GiB for 64 segments
    of 32 heads at 4096 tokens), which no compiled peak shows.
    """
    del kv_segments, q_positions, kv_positions  # the same tokens, in order
    return per_device(_cudnn_rows, q, k, v, q_segments)


def _cudnn_rows(q: Array, k: Array, v: Array, segments: Array) -> Array:
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
