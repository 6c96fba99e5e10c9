"""What an implementation of attention takes, how a kernel runs on each device's own rows, and the reference."""

from collections.abc import Callable
from functools import partial, wraps
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jlora.errors import ConfigError
from jlora.model.layers import capped
from jlora.model.sharding import constrain, context_size, partition_spec

# The checkpoint name of an implementation's output and of what else its backward pass would have to compute again:
# given within the implementation, as only there both are at hand. For `jlora.model.remat`.
ATTENTION_OUTPUT = "attention_output"


class Places(NamedTuple):
    """Where queries and keys stand: the segment of each, 0 for padding, and the position in it.

    For kernels over whole rows both are the same tokens, those of a segment together and in the order of positions.
    """

    q_segments: Int[Array, "B T"]
    kv_segments: Int[Array, "B S"]
    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]


@runtime_checkable
class Attention(Protocol):
    """What every implementation takes; a query sees the keys of its own segment up to its position.

    Of those only the last `window` (itself included), where the model has a sliding window. With a `softcap` c a score
    s is c tanh(s / c); `choose` takes no kernel that cannot have it.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        places: Places,
        window: int | None,
        softcap: float | None = None,
    ) -> Float[Array, "B T N H"]: ...


def per_device(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, segments: Int[Array, "B T"]
) -> Float[Array, "B T N H"]:
    """`kernel` of each device's own rows and heads: no partitioner can look into it.

    Over `mesh.context` q, k and v are a device's own tokens of its rows, and `segments` those of the rows' all.

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
    by_head = partition_spec(("act_batch", "act_tokens", "act_heads", None))
    by_kv_head = partition_spec(("act_batch", "act_tokens", "act_kv_heads", None))
    by_row = PartitionSpec(by_head[0])
    specs = (by_head, by_kv_head, by_kv_head, by_row)
    # Only the kernels' types are in the way of check_vma: they do not say over which axes their outputs vary.
    return jax.shard_map(kernel, in_specs=specs, out_specs=by_head, check_vma=False)(q, k, v, segments)


def over_rows(kernel: Callable[..., Array], over_context: Callable[..., Array]) -> Attention:
    """An implementation from a kernel over a device's own rows: (q, k, v, segments, window, softcap) -> [B T N H].

    Args:
      over_context: the same, where q, k and v are one part of the rows, and the other devices of `mesh.context` have
        the others.
    """

    @wraps(kernel)
    def attention(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        places: Places,
        window: int | None,
        softcap: float | None = None,
    ) -> Float[Array, "B T N H"]:
        run = kernel if context_size() == 1 else over_context
        return per_device(partial(run, window=window, softcap=softcap), q, k, v, places.q_segments)

    return attention


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    places: Places,
    window: int | None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """The reference that every kernel is checked against: softmax attention with all scores in memory, in float32.

    Matches `eager_attention_forward` of transformers' Llama. Positions restart in every segment, so
    "same segment, no later position" is causality within it; padding is segment 0 and sees itself only.
    """
    if context_size() > 1:
        k, v = (constrain(x, "act_batch", None, "act_kv_heads", None) for x in (k, v))
    num_groups = q.shape[2] // k.shape[2]
    q_grouped = q.reshape(*q.shape[:2], k.shape[2], num_groups, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", q_grouped, k, preferred_element_type=jnp.float32)
    position, key_position = places.q_positions[:, :, None], places.kv_positions[:, None, :]
    visible = (places.q_segments[:, :, None] == places.kv_segments[:, None, :]) & (key_position <= position)
    if window is not None:
        visible &= key_position > position - window
    scores = capped(scores * q.shape[-1] ** -0.5, softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape), ATTENTION_OUTPUT)
