"""Which device of `mesh.context` answers which queries of a row, and how they get there and back.

Of n devices each holds one part of every row, in order: the queries stay there, or go to one other device and come
back, and keys and values are gathered. Under causality the queries at the end of a row see all of it, and those at its
start next to nothing, so a device that answered its own part would have up to 2 n - 1 times the work of another, and
all would wait for the last. So the row is cut into 2 n chunks, and device i, which holds chunks 2 i and 2 i + 1,
answers i and 2 n - 1 - i: as many pairs of a query and a key as every other device has (of a row of one segment; rows
of short segments, and narrow windows, have about the same work everywhere). Only attention moves tokens: all else, and
so what is drawn for dropout, has each token where it stands in its row.

Runs on each device (`jax.shard_map`); knows nothing of kernels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jlora.model.sharding import CONTEXT, context_size

# A device holds two chunks of a row.
CHUNKS = 2


def to_answering(x: Shaped[Array, "B T *dims"]) -> Shaped[Array, "B T *dims"]:
    """A device's own part of the rows -> the two chunks that it answers, the earlier one first; T is of a device.

    T must be even: `jlora.model.divisibility` asks for it.
    """
    there = _answering()
    first, second = jnp.split(x, 2, axis=1)
    # Of chunks 2 i, as of chunks 2 i + 1, each device answers one. A line for each: see `gathered`.
    first = _sent(first, list(enumerate(there[0])))
    second = _sent(second, list(enumerate(there[1])))
    return _in_order(first, second)


def to_holding(x: Shaped[Array, "B T *dims"]) -> Shaped[Array, "B T *dims"]:
    """The inverse of `to_answering`."""
    there = _answering()
    first, second = jnp.split(_in_order(*jnp.split(x, 2, axis=1)), 2, axis=1)
    first = _sent(first, [(of, i) for i, of in enumerate(there[0])])
    second = _sent(second, [(of, i) for i, of in enumerate(there[1])])
    return jnp.concatenate([first, second], axis=1)


def gathered(
    k: Shaped[Array, "*part"], v: Shaped[Array, "*part"], axis: int
) -> tuple[Shaped[Array, "*whole"], Shaped[Array, "*whole"]]:
    """Keys and values of whole rows from a device's own part of them, cut at `axis`.

    In lines of their own: all collectives of a `shard_map` have one channel, and by where they come from the planner
    tells two of them from one that the compiler wrote down twice.
    """
    k = jax.lax.all_gather(k, CONTEXT, axis=axis, tiled=True)
    v = jax.lax.all_gather(v, CONTEXT, axis=axis, tiled=True)
    return k, v


def answered(blocks: int) -> Int[Array, " {2*blocks}"]:
    """Numbers, ascending, of the blocks of a row that this device answers, of which a chunk has so many."""
    device, within = jax.lax.axis_index(CONTEXT), jnp.arange(blocks, dtype=jnp.int32)
    last = CHUNKS * context_size() - 1
    return jnp.concatenate([device * blocks + within, (last - device) * blocks + within])


def answered_by(devices: int) -> list[int]:
    """Numbers of the chunks of a row, device by device, as `answered` has them."""
    return [chunk for device in range(devices) for chunk in (device, CHUNKS * devices - 1 - device)]


def _answering() -> tuple[list[int], list[int]]:
    """Of each device: who answers its first chunk, and its second."""
    last = CHUNKS * context_size() - 1
    answers = [min(chunk, last - chunk) for chunk in range(last + 1)]
    return answers[::2], answers[1::2]


def _sent(x: Array, pairs: list[tuple[int, int]]) -> Array:
    return jax.lax.ppermute(x, CONTEXT, pairs)


def _in_order(first: Array, second: Array) -> Array:
    """Even devices get the earlier of their chunks as somebody's first one, odd ones as somebody's second."""
    is_odd = jax.lax.axis_index(CONTEXT) % 2 == 1
    return jnp.concatenate([jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)], axis=1)
