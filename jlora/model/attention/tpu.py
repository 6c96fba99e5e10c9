"""Splash attention, JAX's Pallas kernel for TPUs."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jlora.model.attention.interface import ATTENTION_OUTPUT, over_rows

MAX_SPLASH_BLOCK = 512


@over_rows
def splash(q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None) -> Array:
    """Flash attention in Pallas for TPUs, with segment ids. Grouped queries as they are.

    Blocks that no query of a window sees are not computed.
    """
    return _splash_rows(q, k, v, segments, window, softcap, interpret=False)


def _splash_rows(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None = None, *, interpret: bool
) -> Array:
    """The kernel over the rows of one device; `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, num_heads, head_dim = q.shape[1:]
    block = math.gcd(length, MAX_SPLASH_BLOCK)
    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask: masks.Mask = masks.CausalMask((length, length))
    if window is not None and window < length:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * num_heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        by_head = (jnp.moveaxis(x, 1, 0) for x in (q * head_dim**-0.5, k, v))
        return jnp.moveaxis(kernel(*by_head, segment_ids=kernels.SegmentIds(segments, segments)), 0, 1)

    return jax.vmap(row)(q, k, v, segments).astype(q.dtype)
