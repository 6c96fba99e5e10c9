"""Products of several weights with one input, which lies over `mesh.tensor` by its tokens: q, k and v; gate and up.

Each device of `mesh.context` has tokens of its own, which stay there: only those of its `tensor` group are gathered.

Left to XLA's partitioner, every product gathers the input for itself, and in the backward pass every gradient is
scattered by itself. Here all have it from one gather, and their gradients are added before one scatter. Only the base's
products are made so: an adapter's go on taking each device's own tokens, which is less work.
"""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jlora.model.adapter import base_product
from jlora.model.quant import Weight, in_turn, map_axes
from jlora.model.sharding import CONTEXT, RULES, partition_spec

TENSOR = "tensor"


def products(
    equation: str, x: Float[Array, "B T D"], weights: list[Weight], axes: list[tuple[str, ...]]
) -> list[Float[Array, "B T *outputs"]]:
    """`einsum(equation, x, weight)` of each weight, in the dtype of `x`.

    Args:
      axes: the logical axes of each weight.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else mesh.shape[TENSOR]
    if devices == 1 or x.shape[1] % (mesh.shape[CONTEXT] * devices):
        return _each(equation, x, weights)

    def local(x: Array, *weights: Weight) -> tuple[Array, ...]:
        return tuple(_each(equation, jax.lax.all_gather(x, TENSOR, axis=1, tiled=True), list(weights)))

    held = [
        map_axes(lambda _, axes: _spec(axes[1:]), weight, ("layers", *dims))
        for weight, dims in zip(weights, axes, strict=True)
    ]
    outputs = tuple(PartitionSpec(None, CONTEXT, *_spec(dims[1:])) for dims in axes)
    tokens, names = partition_spec((None, "act_seq")), {CONTEXT, TENSOR}
    mapped = jax.shard_map(local, in_specs=(tokens, *held), out_specs=outputs, axis_names=names, check_vma=False)
    return list(mapped(x, *weights))


def _each(equation: str, x: Array, weights: list[Weight]) -> list[Array]:
    found = []
    for weight in weights:
        y, x = in_turn(weight, base_product(equation, x, weight), x)
        found.append(y)
    return found


def _spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Where dims of a weight with these logical axes are cut over `tensor`."""
    return PartitionSpec(*(TENSOR if axis and RULES[axis] == TENSOR else None for axis in axes))
