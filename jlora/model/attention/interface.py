"""What an implementation of attention takes, and how a kernel runs on each device's own rows and heads."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jlora.errors import ConfigError
from jlora.model.sharding import partition_spec

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
