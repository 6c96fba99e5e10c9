"""Text out of a base, with or without an adapter.

A jitted prefill fills a key/value cache with a batch of left-padded prompts; a jitted loop decodes until
every row has ended.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora.inference.model import Adapted
from jlora.model import attention
from jlora.model.adapter import Adapter
from jlora.model.config import ModelConfig, check_length
from jlora.model.layers import products_in
from jlora.model.llama import Cache, Decoder, empty_cache
from jlora.model.rope import LongRope

# Prompts are padded to multiples of this, so that few lengths are ever compiled.
LENGTH_STEP = 32
STREAM_TOKENS = 8


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 takes the likeliest."""

    temperature: float
    top_p: float


GREEDY = Sampling(temperature=0.0, top_p=1.0)


@no_type_check  # tree functions put what they like at its leaves
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Where a batch stands: [B] each but the cache, `out` [B max_new_tokens], the ids in `stops`, and the scalars."""

    cache: Cache
    last: Array
    lengths: Array
    ended: Array
    out: Array
    num_out: Array
    stops: Array
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


def _advance(
    base: Decoder, adapter: Adapter, state: Decoding, rows: tuple[Array, Array, Array], sampling: Sampling
) -> Decoding:
    """Run the next tokens of every row, and write down the one that is drawn after them where it has not ended.

    Args:
      rows: tokens, positions and segments, [B T] each.
    """
    with products_in(state.cache.keys.dtype):
        # The reference is for few queries and many keys; kernels want as many of both.
        hidden, cache = base.hidden_cached(*rows, state.cache, adapter=adapter, attention=attention.reference)
        logits = base.logits(hidden[:, -1:], adapter)[:, 0]
    key, draw = jax.random.split(state.key)
    token = jnp.where(state.ended, state.stops[0], sample(logits, draw, sampling))
    return replace(
        state,
        cache=cache,
        last=token,
        ended=state.ended | jnp.isin(token, state.stops),
        out=jax.lax.dynamic_update_slice(state.out, token[:, None], (0, state.num_out)),
        num_out=state.num_out + 1,
        key=key,
    )


@partial(jax.jit, static_argnames=("sampling", "max_new_tokens", "dtype"))
def prefill(
    base: Decoder,
    adapter: Adapter,
    prompts: tuple[Array, Array],
    stops: Array,
    key: Array,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    dtype: jnp.dtype,
) -> Decoding:
    """Run prompts through the model and draw the first token.

    Args:
      prompts: left-padded tokens [B T], and how many of them each prompt has [B].
    """
    tokens, lengths = prompts
    batch, width = tokens.shape
    positions = jnp.arange(width)[None] - (width - lengths[:, None])
    state = Decoding(
        cache=empty_cache(base.cfg, batch, width + max_new_tokens, dtype),
        last=tokens[:, -1],
        lengths=lengths,
        ended=jnp.zeros(batch, bool),
        out=jnp.zeros((batch, max_new_tokens), jnp.int32),
        num_out=jnp.zeros((), jnp.int32),
        stops=stops,
        key=key,
    )
    rows = tokens, jnp.maximum(positions, 0), (positions >= 0).astype(jnp.int32)
    return _advance(base, adapter, state, rows, sampling)


@partial(jax.jit, static_argnames="sampling", donate_argnames="state")
def decode(base: Decoder, adapter: Adapter, state: Decoding, until: Array, sampling: Sampling) -> Decoding:
    """Decode until `until` tokens are out or every row has ended."""

    def running(state: Decoding) -> Array:
        return (state.num_out < until) & ~state.ended.all()

    def one(state: Decoding) -> Decoding:
        positions = (state.lengths + state.num_out - 1)[:, None]
        return _advance(base, adapter, state, (state.last[:, None], positions, jnp.ones_like(positions)), sampling)

    return jax.lax.while_loop(running, one, state)


def generate(
    model: Adapted,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    width: int | None = None,
) -> Iterator[list[list[int]]]:
    """Continuations of a batch of prompts, yielded as they grow; the last one yielded is whole.

    A stop token is left out. Rows do not influence each other. Where a row outgrows LongRoPE's shorter context, all
    that it holds turns by other frequencies: its cache is made anew, as transformers does.

    Args:
      width: tokens that each prompt is padded to, where it is not to follow from the longest; each is compiled for.
    """
    base, stops = model.pretrained.base, model.pretrained.stops
    check_length(base.cfg, max(map(len, prompts)) + max_new_tokens, "a prompt with its answer")
    answers: list[list[int]] = [[] for _ in prompts]
    drawn = 0
    while drawn < max_new_tokens and not (drawn and all(set(answer) & {*stops} for answer in answers)):
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        many = min(_tokens_alike(base.cfg, len(row), max_new_tokens - drawn) for row in rows)
        for more in _continued(model, rows, many, sampling, seed + drawn, stops, width if not drawn else None):
            grown = [answer + new for answer, new in zip(answers, more, strict=True)]
            yield [_until_stop(answer, stops) for answer in grown]
        answers, drawn = grown, drawn + many


def _tokens_alike(cfg: ModelConfig, length: int, most: int) -> int:
    """How many tokens, of so many, are drawn after a row of `length` before what it holds turns otherwise."""
    bounds = [rope.scaling.original_max_position_embeddings for rope in cfg.ropes if isinstance(rope.scaling, LongRope)]
    return min([most, *(bound - length + 1 for bound in bounds if length <= bound)])


def _continued(
    model: Adapted,
    rows: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stops: list[int],
    width: int | None,
) -> Iterator[list[list[int]]]:
    """What follows in each row, as far as it is drawn, stop tokens included; until all have ended or are as long."""
    base = model.pretrained.base
    width = width or -(-max(map(len, rows)) // LENGTH_STEP) * LENGTH_STEP
    tokens = np.zeros((len(rows), width), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, width - len(ids) :] = ids
    state = prefill(
        base,
        model.adapter,
        (jnp.asarray(tokens), jnp.asarray([len(ids) for ids in rows])),
        jnp.asarray(stops, jnp.int32),
        jax.random.key(seed),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        dtype=model.dtype,
    )
    while True:
        done = bool(state.ended.all()) or int(state.num_out) >= max_new_tokens
        yield np.asarray(state.out)[:, : int(state.num_out)].tolist()
        if done:
            return
        state = decode(base, model.adapter, state, jnp.minimum(state.num_out + STREAM_TOKENS, max_new_tokens), sampling)


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
