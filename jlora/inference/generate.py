"""Text out of a base, with or without an adapter.

A jitted prefill fills a key/value cache with a batch of left-padded prompts; a jitted loop decodes until
every row has ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.hf.pretrained import (
    Pretrained,
    stop_tokens,
)
from jlora.model import attention
from jlora.model.adapter import Adapter
from jlora.model.llama import Cache, Decoder, empty_cache
from jlora.model.precision import products_in

# Prompts are padded to multiples of this, so that few lengths are ever compiled.
LENGTH_STEP = 32
STREAM_TOKENS = 8


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 takes the likeliest."""

    temperature: float
    top_p: float


@no_type_check  # tree functions put what they like at its leaves
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Where a batch stands: [B] each but the cache, `out` [B max_new_tokens] and the scalars."""

    cache: Cache
    last: Array
    lengths: Array
    ended: Array
    out: Array
    num_out: Array
    key: Array


def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Array:
    """One token id a row. Nucleus sampling (arXiv:1904.09751) keeps the likeliest tokens whose
    probabilities first add up to `top_p`."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _take(state: Decoding, logits: Array, stop_ids: Array, sampling: Sampling) -> Decoding:
    """Draw the next token of every row that has not ended, and write it down."""
    key, draw = jax.random.split(state.key)
    token = jnp.where(state.ended, stop_ids[0], sample(logits, draw, sampling))
    ended = state.ended | jnp.isin(token, stop_ids)
    out = jax.lax.dynamic_update_slice(state.out, token[:, None], (0, state.num_out))
    return Decoding(state.cache, token, state.lengths, ended, out, state.num_out + 1, key)


@partial(jax.jit, static_argnames=("kernel", "sampling", "max_new_tokens", "dtype"))
def prefill(
    base: Decoder,
    adapter: Adapter,
    tokens: Array,
    lengths: Array,
    stop_ids: Array,
    key: Array,
    kernel: attention.Attention,
    sampling: Sampling,
    max_new_tokens: int,
    dtype: jnp.dtype,
) -> Decoding:
    """Run left-padded prompts [B T] of the given lengths through the model and draw the first token."""
    batch, width = tokens.shape
    positions = jnp.arange(width)[None] - (width - lengths[:, None])
    segments = (positions >= 0).astype(jnp.int32)
    cache = empty_cache(base.cfg, batch, width + max_new_tokens, dtype)
    with products_in(dtype):
        hidden, cache = base.hidden_cached(
            tokens, jnp.maximum(positions, 0), segments, cache, adapter=adapter, attention=kernel
        )
        logits = base.logits(hidden[:, -1:], adapter)[:, 0]
    state = Decoding(
        cache=cache,
        last=tokens[:, -1],
        lengths=lengths,
        ended=jnp.zeros(batch, bool),
        out=jnp.zeros((batch, max_new_tokens), jnp.int32),
        num_out=jnp.zeros((), jnp.int32),
        key=key,
    )
    return _take(state, logits, stop_ids, sampling)


@partial(jax.jit, static_argnames=("kernel", "sampling"), donate_argnames=("state",))
def decode(
    base: Decoder,
    adapter: Adapter,
    state: Decoding,
    until: Array,
    stop_ids: Array,
    kernel: attention.Attention,
    sampling: Sampling,
) -> Decoding:
    """Decode until `until` tokens are out or every row has ended."""

    def running(state: Decoding) -> Array:
        return (state.num_out < until) & ~state.ended.all()

    @products_in(state.cache.keys.dtype)
    def one(state: Decoding) -> Decoding:
        positions = (state.lengths + state.num_out - 1)[:, None]
        hidden, cache = base.hidden_cached(
            state.last[:, None],
            positions,
            jnp.ones_like(positions),
            state.cache,
            adapter=adapter,
            attention=kernel,
        )
        moved = Decoding(cache, state.last, state.lengths, state.ended, state.out, state.num_out, state.key)
        return _take(moved, base.logits(hidden, adapter)[:, 0], stop_ids, sampling)

    return jax.lax.while_loop(running, one, state)


def generate(
    pretrained: Pretrained,
    adapter: Adapter,
    prompts: list[list[int]],
    *,
    kernel: attention.Attention,
    dtype: jnp.dtype,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    width: int | None = None,
) -> Iterator[list[list[int]]]:
    """Continuations of a batch of prompts, yielded as they grow; the last one yielded is whole.

    A stop token is left out. Rows do not influence each other.

    Args:
      width: tokens that each prompt is padded to, where it is not to follow from the longest; each is compiled for.
    """
    stops = stop_tokens(pretrained)
    width = width or -(-max(map(len, prompts)) // LENGTH_STEP) * LENGTH_STEP
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = ids
    lengths, stop_ids = jnp.asarray([len(ids) for ids in prompts]), jnp.asarray(stops, jnp.int32)
    state = prefill(
        pretrained.base,
        adapter,
        jnp.asarray(tokens),
        lengths,
        stop_ids,
        jax.random.key(seed),
        kernel,
        sampling,
        max_new_tokens,
        dtype,
    )
    while True:
        done = bool(state.ended.all()) or int(state.num_out) >= max_new_tokens
        yield [_until_stop(row, stops) for row in np.asarray(state.out)[:, : int(state.num_out)].tolist()]
        if done:
            return
        until = jnp.minimum(state.num_out + STREAM_TOKENS, max_new_tokens)
        state = decode(pretrained.base, adapter, state, until, stop_ids, kernel, sampling)


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
