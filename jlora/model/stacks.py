"""How a computation goes through the layers of a decoder, whose weights lie in one stack or in several.

A stack of many layers is run by scan: a small program, soon compiled, which copies each layer's weights out of their
stack before it multiplies with them, and what is kept for the backward pass into stacks of its own. A stack of one
layer is run as it is: nothing is copied. One stack for each layer is the unrolled model.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jlora.model.block import Block

# A layer's number: an array in the scan over layers, so that what differs between them is chosen by it.
Layer = Int[Array, ""] | int
Carry = TypeVar("Carry")


def over_layers(
    layer: Callable[..., Carry],
    carry: Carry,
    stacks: Sequence[Block],
    own: tuple[Any, ...],
    start: int = 0,
    wrap: Callable[[Callable[..., Carry]], Callable[..., Carry]] = lambda layer: layer,
) -> Carry:
    """`carry` after all layers of the stacks: layer(its number, carry, its block, *its share of `own`) -> carry.

    Args:
      own: trees of arrays with a leading dim of all these layers.
      start: number of the first layer.
      wrap: what rematerialises a layer.
    """
    for stack, share in zip(stacks, cut(own, stacks), strict=True):
        if stack.size == 1:
            block, *alone = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), (stack, *share))
            carry = wrap(partial(layer, start))(carry, block, *alone)
        else:
            numbers = jnp.arange(start, start + stack.size, dtype=jnp.int32)
            carry, _ = jax.lax.scan(partial(_turn, wrap(layer)), carry, (numbers, stack, *share))
        start += stack.size
    return carry


def _turn(layer: Callable[..., Carry], carry: Carry, scanned: tuple[Any, ...]) -> tuple[Carry, None]:
    number, *rest = scanned
    return layer(number, carry, *rest), None


def cut(tree: Any, stacks: Sequence[Block]) -> list[Any]:
    """Arrays with a leading dim of all layers -> each stack's share of them."""
    sizes = [stack.size for stack in stacks]
    if len(sizes) == 1:
        return [tree]
    leaves, structure = jax.tree.flatten(tree)
    # Not slices: the gradient of these is one concatenation.
    parts = [jax.lax.split(leaf, sizes) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[number] for part in parts]) for number in range(len(sizes))]


def split_at(stacks: Sequence[Block], layer: int) -> tuple[Sequence[Block], Sequence[Block]]:
    """The stacks that lie wholly below a layer, and the others."""
    number, end = 0, 0
    while end + stacks[number].size <= layer:
        end += stacks[number].size
        number += 1
    return stacks[:number], stacks[number:]
