"""Attention tile by tile in plain XLA, for whatever has no kernel of its own: CPUs, and GPUs that cuDNN refuses.

Why by hand: XLA has no such operation, and `jax.nn.dot_product_attention` holds all scores outside of cuDNN.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jlora.model.attention.context import CHUNKS, answered, gathered, to_answering, to_holding
from jlora.model.attention.interface import ATTENTION_OUTPUT, over_rows
from jlora.model.layers import capped
from jlora.model.sharding import CONTEXT

Limits = tuple[int | None, float | None]  # a window and a soft cap
TILE, FINE = 128, 64  # tokens; with fewer, packed rows have less to visit, and a GPU more kernels to start
HIDDEN = -1e30  # added to a score that is not to be seen


def _blocked(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None, fine: bool
) -> Array:
    """Softmax attention that holds the scores of one pair of tiles, with grouped queries as they are.

    FlashAttention-2 (arXiv:2307.08691, algorithms 1 and 2): a running softmax forward; backward the scores again,
    from the logarithm of their sum. Pairs of tiles in which no query sees a key are not visited: later ones, those
    of other segments, those beyond the window.
    """
    grouped = (*k.shape[:3], q.shape[2] // k.shape[2], q.shape[3])
    # Number of tiles and their length, which may be a little more than the row together.
    count = -(-q.shape[1] // (FINE if fine else TILE))
    size = -(-q.shape[1] // count)
    queries, keys, values = (_tiles(x, count, size) for x in (q.reshape(grouped), k[:, :, :, None], v[:, :, :, None]))
    return _rows(_tiled((window, softcap), queries, keys, values, segments), size, grouped).reshape(q.shape)


def _blocked_over_context(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None, fine: bool
) -> Array:
    """As `_blocked`, of a device's part of the rows, with the keys and values of all.

    Tiles have the largest length that divides a chunk, so that each lies within one.
    """
    grouped, chunk = (*k.shape[:3], q.shape[2] // k.shape[2], q.shape[3]), q.shape[1] // CHUNKS
    size = max(n for n in range(1, (FINE if fine else TILE) + 1) if chunk % n == 0)
    count = q.shape[1] // size
    parts = to_answering(q).reshape(grouped), k[:, :, :, None], v[:, :, :, None]
    queries, keys, values = (_tiles(x, count, size) for x in parts)
    mixed = _tiled_over_context((window, softcap), queries, keys, values, segments, answered(chunk // size))
    return to_holding(_rows(mixed, size, grouped).reshape(q.shape))


blocked = over_rows(partial(_blocked, fine=False), partial(_blocked_over_context, fine=False))
blocked_finely = over_rows(partial(_blocked, fine=True), partial(_blocked_over_context, fine=True))


_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _tiles(x: Float[Array, "B T K G H"], count: int, size: int) -> Float[Array, "I n m H"]:
    """Tiles of tokens; n counts rows and key/value heads, m the group's heads and the tile's tokens.

    Two dims each, as a matrix product has them: with more, XLA transposes operands before it multiplies. Padded
    with zeros at the end.
    """
    batch, length, kv_heads, groups, head_dim = x.shape
    x = jnp.pad(x, [(0, 0), (0, count * size - length), (0, 0), (0, 0), (0, 0)])
    x = jnp.transpose(x.reshape(batch, count, size, kv_heads, groups, head_dim), (1, 0, 3, 4, 2, 5))
    return x.reshape(count, batch * kv_heads, groups * size, head_dim)


def _rows(tiles: Float[Array, "I n m H"], size: int, shape: tuple[int, ...]) -> Float[Array, "B T K G H"]:
    """The inverse of `_tiles`."""
    batch, length, kv_heads, groups, head_dim = shape
    count = len(tiles)
    x = jnp.transpose(tiles.reshape(count, batch, kv_heads, groups, size, head_dim), (1, 0, 4, 2, 3, 5))
    return x.reshape(batch, count * size, kv_heads, groups, head_dim)[:, :length]


def _pairs(window: int | None, segments: Int[Array, "B T"], count: int, size: int) -> tuple[Array, Array, Array]:
    """Segments by tile [I B t]; for each query tile its first key tile; for each key tile the end of its query tiles.

    The first key tile never decreases from one query tile to the next, so the pairs of a key tile are a range too.
    """
    length = segments.shape[1]
    begins = jnp.diff(segments, axis=1, prepend=-1) != 0
    begin = jax.lax.cummax(jnp.where(begins, jnp.arange(length), 0), axis=1)  # of each token's segment
    queries = jnp.arange(count) * size
    first = begin[:, queries].min(axis=0)
    if window is not None:
        first = jnp.maximum(first, queries - window + 1)
    first = first // size
    end = (first[None, :] <= jnp.arange(count)[:, None]).sum(axis=1)
    padded = jnp.pad(segments, [(0, 0), (0, count * size - length)])
    return jnp.moveaxis(padded.reshape(-1, count, size), 1, 0), first, end


def _bias(window: int | None, segments: Int[Array, "I B t"], i: Array, j: Array) -> Float[Array, "B t s"]:
    """What is added to the scores of query tile `i` and key tile `j`: zero, or HIDDEN."""
    size = segments.shape[2]
    ahead = (i - j) * size + jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
    seen = ahead >= 0
    if window is not None:
        seen &= ahead < window
    visible = seen[None] & (segments[i][:, :, None] == segments[j][:, None, :])
    # Behind a barrier, or it is computed again for every head.
    return jax.lax.optimization_barrier(jnp.where(visible, 0.0, HIDDEN).astype(jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(
    limits: Limits,
    queries: Float[Array, "I n m H"],
    keys: Float[Array, "I n t H"],
    values: Float[Array, "I n t H"],
    segments: Int[Array, "B T"],
) -> Float[Array, "I n m H"]:
    return _forward(limits, queries, keys, values, segments)[0]


def _forward(
    limits: Limits, queries: Array, keys: Array, values: Array, segments: Array, numbers: Array | None = None
) -> tuple[Array, tuple[Array, ...]]:
    """`numbers`: which tiles of the row the queries are, ascending; None: all."""
    (window, softcap), batch, head_dim = limits, len(segments), queries.shape[3]
    by_tile, first, _ = _pairs(window, segments, *keys.shape[::2])
    size = by_tile.shape[2]

    def of_queries(slot: Array) -> tuple[Array, Array]:
        i = slot if numbers is None else numbers[slot]

        def add(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            mixed, highest, total = carry
            scores = capped(_product("nth,nsh->nts", queries[slot], keys[j]) * head_dim**-0.5, softcap)
            by_head = scores.reshape(batch, -1, size, size) + _bias(window, by_tile, i, j)[:, None]
            scores = by_head.reshape(scores.shape)
            now = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, before = jnp.exp(scores - now), jnp.exp(highest - now)
            mixed = mixed * before + _product("nts,nsh->nth", weights.astype(values.dtype), values[j])
            return mixed, now, total * before + weights.sum(axis=-1, keepdims=True)

        column = jnp.full((*queries.shape[1:3], 1), HIDDEN, jnp.float32)
        start = (jnp.zeros(queries.shape[1:], jnp.float32), column, jnp.zeros_like(column))
        mixed, highest, total = jax.lax.fori_loop(first[i], i + 1, add, start)
        return (mixed / total).astype(queries.dtype), (highest + jnp.log(total))[..., 0]

    mixed, normalizer = jax.lax.map(of_queries, jnp.arange(len(queries)))
    mixed, normalizer = checkpoint_name((mixed, normalizer), ATTENTION_OUTPUT)
    return mixed, (queries, keys, values, segments, mixed, normalizer)


def _backward(
    limits: Limits, saved: tuple[Array, ...], gradients: Float[Array, "I n m H"], numbers: Array | None = None
) -> tuple[Array, Array, Array, None]:
    (window, softcap), (queries, keys, values, segments, mixed, normalizer) = limits, saved
    batch, head_dim, dtype = len(segments), queries.shape[3], queries.dtype
    kv_heads = queries.shape[1] // batch
    by_tile, _, end = _pairs(window, segments, *keys.shape[::2])
    size = by_tile.shape[2]
    # Of each query, the sum over keys of its weights times their gradients.
    mean = (gradients.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(axis=-1)

    def of_keys(to_queries: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        # Keys by queries, and the queries' gradients by head dim, so that no product has to transpose scores.
        by_dim = jnp.swapaxes(keys[j], 1, 2)

        def add(slot: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            i = slot if numbers is None else numbers[slot]
            to_queries, to_keys, to_values = carry
            scores = capped(_product("nsh,nth->nst", keys[j], queries[slot]) * head_dim**-0.5, softcap)
            bias = jnp.swapaxes(_bias(window, by_tile, i, j), 1, 2)[:, None, :, None]
            by_head = scores.reshape(batch, kv_heads, size, -1, size) + bias
            weights = jnp.exp(by_head.reshape(scores.shape) - normalizer[slot][:, None])
            to_weights = _product("nsh,nth->nst", values[j], gradients[slot])
            to_scores = weights * (to_weights - mean[slot][:, None]) * head_dim**-0.5
            if softcap is not None:
                to_scores *= 1.0 - jnp.square(scores / softcap)
            # A barrier, or the exponential is taken again for each product that wants it.
            weights, to_scores = jax.lax.optimization_barrier((weights.astype(dtype), to_scores.astype(dtype)))
            to_values += _product("nst,nth->nsh", weights, gradients[slot])
            to_keys += _product("nst,nth->nsh", to_scores, queries[slot])
            to_queries = to_queries.at[slot].add(_product("nhs,nst->nht", by_dim, to_scores))
            return to_queries, to_keys, to_values

        zeros = jnp.zeros(keys.shape[1:], jnp.float32)
        seeing = (j, end[j]) if numbers is None else jnp.searchsorted(numbers, jnp.stack([j, end[j]]))
        to_queries, *shares = jax.lax.fori_loop(seeing[0], seeing[1], add, (to_queries, zeros, zeros))
        return to_queries, tuple(shares)

    start = jnp.zeros(jnp.swapaxes(queries, 2, 3).shape, jnp.float32)
    to_queries, (to_keys, to_values) = jax.lax.scan(of_keys, start, jnp.arange(len(keys)))
    to_queries = jnp.swapaxes(to_queries, 2, 3)
    return to_queries.astype(dtype), to_keys.astype(dtype), to_values.astype(dtype), None


_tiled.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled_over_context(
    limits: Limits,
    queries: Float[Array, "I n m H"],
    keys: Float[Array, "I n t H"],
    values: Float[Array, "I n t H"],
    segments: Int[Array, "B T"],
    numbers: Int[Array, " I"],
) -> Float[Array, "I n m H"]:
    """As `_tiled`, with keys and values that lie over the devices of `mesh.context` in the order of the row.

    Gathered here, and again for the backward pass, so that no layer's wait for it whole on every device.

    Args:
      segments: of whole rows.
      numbers: which tiles of the row the queries are, ascending.
    """
    return _forward_over_context(limits, queries, keys, values, segments, numbers)[0]


def _forward_over_context(
    limits: Limits, queries: Array, keys: Array, values: Array, segments: Array, numbers: Array
) -> tuple[Array, tuple[Array, ...]]:
    mixed, saved = _forward(limits, queries, *gathered(keys, values, axis=0), segments, numbers)
    return mixed, (queries, keys, values, segments, *saved[4:], numbers)


def _backward_over_context(
    limits: Limits, saved: tuple[Array, ...], gradients: Float[Array, "I n m H"]
) -> tuple[Array, Array, Array, None, None]:
    queries, keys, values, segments, mixed, normalizer, numbers = saved
    whole = (queries, *gathered(keys, values, axis=0), segments, mixed, normalizer)
    to_queries, to_keys, to_values, _ = _backward(limits, whole, gradients, numbers)
    to_keys = jax.lax.psum_scatter(to_keys, CONTEXT, scatter_dimension=0, tiled=True)
    to_values = jax.lax.psum_scatter(to_values, CONTEXT, scatter_dimension=0, tiled=True)
    return to_queries, to_keys, to_values, None, None


_tiled_over_context.defvjp(_forward_over_context, _backward_over_context)
