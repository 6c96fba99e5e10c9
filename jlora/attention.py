"""Attention over packed rows: one signature, one reference, and the kernels that take its place.

`cudnn` runs on GPUs, `splash` on TPUs; neither ever holds the scores. Both ask more of a row than the
reference does: queries and keys are the same tokens, and those of a segment stand together in the order of
their positions. Rows of `jlora.data` are so; the steps of decoding are not.

Knows nothing of projections, rotary embedding or caches.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jlora.errors import ConfigError
from jlora.sharding import partition_spec

MAX_SPLASH_BLOCK = 512


class Attention(Protocol):
    """What every implementation takes; a query sees the keys of its own segment up to its position."""

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        q_segments: Int[Array, "B T"],
        kv_segments: Int[Array, "B S"],
        q_positions: Int[Array, "B T"],
        kv_positions: Int[Array, "B S"],
    ) -> Float[Array, "B T N H"]: ...


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped queries, scores and softmax in float32.

    Matches `eager_attention_forward` of transformers' Llama. Positions restart in every segment, so
    "same segment, no later position" is causality within it; padding is segment 0 and sees itself only.
    """
    num_groups = q.shape[2] // k.shape[2]
    q_grouped = q.reshape(*q.shape[:2], k.shape[2], num_groups, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", q_grouped, k, preferred_element_type=jnp.float32)
    visible = (q_segments[:, :, None] == kv_segments[:, None, :]) & (
        kv_positions[:, None, :] <= q_positions[:, :, None]
    )
    scores = jnp.where(visible[:, None, None], scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _per_device(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, segments: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """`kernel` of each device's own rows and heads: no partitioner can look into it.

    Raises:
      ConfigError: the heads do not divide over the mesh in force.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, segments)
    for name, heads in (("attention", q.shape[2]), ("key/value", k.shape[2])):
        if heads % mesh.shape["tensor"]:
            raise ConfigError(
                f"mesh.tensor={mesh.shape['tensor']} does not divide the {heads} {name} heads; "
                f"set it to a divisor of {heads}, or model.attention=reference"
            )
    by_head = partition_spec(("act_batch", None, "act_heads", None))
    by_kv_head = partition_spec(("act_batch", None, "act_kv_heads", None))
    by_row = PartitionSpec(by_head[0])
    specs = (by_head, by_kv_head, by_kv_head, by_row)
    # Only the kernels' types are in the way of check_vma: they do not say over which axes their outputs vary.
    return jax.shard_map(kernel, in_specs=specs, out_specs=by_head, check_vma=False)(q, k, v, segments)


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
) -> Float[Array, "B T N H"]:
    """Flash attention in Pallas for TPUs, with segment ids. Grouped queries as they are."""
    del kv_segments, q_positions, kv_positions  # the same tokens, in order
    return _per_device(partial(_splash_rows, interpret=False), q, k, v, q_segments)


def _splash_rows(q: Array, k: Array, v: Array, segments: Array, interpret: bool) -> Array:
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
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([masks.CausalMask((length, length))] * num_heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        by_head = (jnp.moveaxis(x, 1, 0) for x in (q * head_dim**-0.5, k, v))
        return jnp.moveaxis(kernel(*by_head, segment_ids=kernels.SegmentIds(segments, segments)), 0, 1)

    return jax.vmap(row)(q, k, v, segments).astype(q.dtype)


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    q_segments: Int[Array, "B T"],
    kv_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    kv_positions: Int[Array, "B S"],
) -> Float[Array, "B T N H"]:
    """Flash attention of cuDNN for GPUs, with the segments as a mask of [B T S].

    Not with cuDNN's own packed layout, which wants a fixed number of segments in a row: it runs from Hopper
    on only, and its backward pass takes a float32 workspace of as many times [B N T H] (4 GiB for 64 segments
    of 32 heads at 4096 tokens), which no compiled peak shows.
    """
    del kv_segments, q_positions, kv_positions  # the same tokens, in order
    return _per_device(_cudnn_rows, q, k, v, q_segments)


def _cudnn_rows(q: Array, k: Array, v: Array, segments: Array) -> Array:
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")


def choose(name: str, device: jax.Device, head_dim: int, length: int, dtype: jnp.dtype) -> tuple[str, Attention]:
    """The implementation for a config's `model.attention`, and its name for the log.

    Args:
      device: one of those that the run is for, here or absent.

    Raises:
      ConfigError: the implementation asked for by name does not run there, or not on these shapes.
    """
    platform, is_gpu = device.platform, device.platform in ("gpu", "cuda")
    wanted = "cudnn" if is_gpu else "splash" if platform == "tpu" else "reference"
    asked = wanted if name == "auto" else name
    if asked == "reference":
        return "reference", reference
    if asked == "cudnn":
        needs = {
            "a GPU": is_gpu,
            "model.dtype bfloat16 or float16": dtype in (jnp.bfloat16, jnp.float16),
            "a head dim that is a multiple of 8 and at most 128": head_dim % 8 == 0 and head_dim <= 128,
            "a length that is a multiple of 64": length % 64 == 0,
        }
        kernel: Attention = cudnn
    else:
        needs = {
            "a TPU": platform == "tpu",
            "a head dim of 64 or a multiple of 128": head_dim == 64 or head_dim % 128 == 0,
            "a length that is a multiple of 128": length % 128 == 0,
        }
        kernel = splash
    lacking = [need for need, met in needs.items() if not met]
    if not lacking:
        return asked, kernel
    here = f"{platform}, {jnp.dtype(dtype).name}, head dim {head_dim}, length {length}"
    if name == "auto":
        return f"reference, because {asked} needs {' and '.join(lacking)} (here {here})", reference
    working = " or ".join(dict.fromkeys(["auto", *([wanted] if wanted != asked else []), "reference"]))
    raise ConfigError(
        f"model.attention={asked} needs {' and '.join(lacking)} (here {here}); set model.attention to {working}"
    )
