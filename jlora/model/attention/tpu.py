"""Splash attention, JAX's Pallas kernel for TPUs."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jlora.model.attention.context import CHUNKS, answered, answered_by, gathered, to_answering, to_holding
from jlora.model.attention.interface import ATTENTION_OUTPUT, over_rows
from jlora.model.sharding import CONTEXT, context_size

MAX_SPLASH_BLOCK = 512


def _splash(q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None) -> Array:
    """Flash attention in Pallas for TPUs, with segment ids. Grouped queries as they are.

    Blocks that no query of a window sees are not computed.
    """
    return _splash_rows(q, k, v, segments, window, softcap, interpret=False)


def _splash_rows(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None = None, *, interpret: bool
) -> Array:
    """The kernel over the rows of one device; `interpret` runs it anywhere, slowly."""
    length, num_heads = q.shape[1:3]
    kernel = _kernel(num_heads, length, math.gcd(length, MAX_SPLASH_BLOCK), 1, window, softcap, interpret)
    return _run(kernel, q, k, v, segments, segments)


def _splash_over_context(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None = None, *, interpret: bool
) -> Array:
    """As `_splash_rows`, of a device's part of the rows, with the keys and values of all.

    Of the blocks that the kernel would compute each device is given those of its own queries.
    """
    devices, num_heads, chunk = context_size(), q.shape[2], q.shape[1] // CHUNKS
    block = math.gcd(chunk, MAX_SPLASH_BLOCK)
    kernel = _own_part(_kernel(num_heads, segments.shape[1], block, devices, window, softcap, interpret))
    chunks = segments.reshape(len(segments), CHUNKS * devices, chunk)
    q_segments = chunks[:, answered(1)].reshape(len(segments), -1)

    def run(q: Array, k: Array, v: Array) -> Array:
        k, v = gathered(k, v, axis=1)
        return _run(kernel, to_answering(q), k, v, q_segments, segments)

    # No layer's keys and values wait for the backward pass whole on every device.
    kept = jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT)
    return to_holding(jax.checkpoint(run, policy=kept)(q, k, v))


splash = over_rows(_splash, partial(_splash_over_context, interpret=False))


def _kernel(
    num_heads: int, length: int, block: int, devices: int, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    """The kernel of whole rows, whose queries lie over so many devices as they are answered."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    blocks = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask: Any = masks.CausalMask((length, length))
    if window is not None and window < length:
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    if devices > 1:
        chunks = np.arange(length, dtype=np.int32).reshape(CHUNKS * devices, -1)
        mask.q_sequence = chunks[answered_by(devices)].reshape(-1)
    return kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * num_heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=devices,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _own_part(kernel: Any) -> Any:
    """A device's share of what the kernel knows of its mask, as its own specification of shards says."""
    devices = context_size()
    row = NamedSharding(AbstractMesh((devices,), (CONTEXT,)), PartitionSpec(None, CONTEXT))

    def share(array: Array, spec: PartitionSpec) -> Array:
        if CONTEXT not in spec:
            return array
        axis = tuple(spec).index(CONTEXT)
        size = array.shape[axis] // devices
        return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(CONTEXT) * size, size, axis)

    return jax.tree.map(share, kernel, kernel.manual_sharding_spec(row))


def _run(kernel: Any, q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    def row(q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array) -> Array:
        by_head = (jnp.moveaxis(x, 1, 0) for x in (q * q.shape[-1] ** -0.5, k, v))
        return jnp.moveaxis(kernel(*by_head, segment_ids=kernels.SegmentIds(q_segments, kv_segments)), 0, 1)

    return jax.vmap(row)(q, k, v, q_segments, kv_segments).astype(q.dtype)
