"""Llama and its kin as a `flax.nnx` module: blocks stacked over layers, each stack run by scan.

Owns the forward pass; the weights' shapes and axes are `config.py`'s, and a layer is `block.py`'s. Knows nothing of
files, losses or optimizers. A module is a pytree, so it passes through `jax.jit` and `jax.grad` as it is.
"""

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.model.adapter import Adapter, Lora, Rows, Saved, lowest_adapted
from jlora.model.attention import Attention, Places
from jlora.model.block import Block, normalize
from jlora.model.config import ModelConfig, Weight, kinds, outer_weights, projection_shapes
from jlora.model.layers import capped
from jlora.model.quant import quantize
from jlora.model.remat import LAYER_INPUT, policy
from jlora.model.rope import Rotary, rotary_table
from jlora.model.sharding import constrain
from jlora.model.stacks import Layer, cut, over_layers, split_at


@no_type_check  # tree functions put what they like at its leaves
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of the tokens so far, for decoding. Slots fill from the left; segment 0 is empty.

    Attributes:
      keys, values: [L B S K H] in the model's dtype.
      segments, positions: [B S] int32.
      used: scalar int32, slots filled.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    segments: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    used: Int[Array, ""]


def empty_cache(cfg: ModelConfig, batch_size: int, num_slots: int, dtype: jnp.dtype) -> Cache:
    """A cache with room for `num_slots` tokens a row."""
    shape = (cfg.num_hidden_layers, batch_size, num_slots, cfg.num_key_value_heads, cfg.head_dim)
    zeros = jnp.zeros((batch_size, num_slots), jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zeros, zeros, jnp.zeros((), jnp.int32))


def rotary_by_layer(
    cfg: ModelConfig, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Callable[[Layer], Rotary | None]:
    """Layer -> cosines and sines of the tokens' angles, each computed once for all layers that turn alike.

    None where heads are not turned.
    """
    ropes, which = kinds(cfg.ropes)
    by_token = partial(jax.tree.map, lambda table: constrain(table, "act_batch", "act_tokens", None))
    tables = [by_token(rotary_table(positions, segments, rope)) for rope in ropes]
    if len(tables) <= 1:
        return lambda _: tables[0] if tables else None
    stacked: Rotary = jax.tree.map(lambda *same: jnp.stack(same), *tables)
    return lambda layer: jax.tree.map(lambda table: table[jnp.asarray(np.array(which, np.int32))[layer]], stacked)


def attend(
    cfg: ModelConfig,
    attention: Attention,
    layer: Layer,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    places: Places,
) -> Float[Array, "B T N H"]:
    """`attention` with the window of a layer. A kernel is compiled for one window, so there is a branch for each."""
    windows, which = kinds(cfg.windows)
    branches = [partial(attention, places=places, window=window, softcap=cfg.attention_softcap) for window in windows]
    if len(branches) == 1 or isinstance(layer, int):
        return branches[which[layer] if len(branches) > 1 else 0](q, k, v)
    return jax.lax.switch(jnp.asarray(np.array(which, np.int32))[layer], branches, q, k, v)


class Decoder(nnx.Module):
    """A Llama with its language-model head; logits match transformers' class of its family."""

    embed_tokens: nnx.Param
    embed_positions: nnx.Param  # where positions are learned
    norm: nnx.Param
    norm_bias: nnx.Param  # of a LayerNorm
    lm_head: nnx.Param  # absent where the embedding is tied
    layers: Block | nnx.List  # all layers in one stack, or in several

    def __init__(self, cfg: ModelConfig, fill: Callable[[Weight], Array], sizes: tuple[int, ...] | None = None):
        """A decoder of the shape of `cfg`.

        Args:
          fill: makes each weight, stacked over layers, from its shape and logical axes.
          sizes: layers of each stack; None is one of all of them.
        """
        self.cfg = cfg
        if sizes is None or len(sizes) == 1:
            self.layers = Block(cfg, fill, cfg.num_hidden_layers)
        else:
            self.layers = nnx.List([Block(cfg, fill, size) for size in sizes])
        for name, weight in outer_weights(cfg).items():
            setattr(self, name, nnx.Param(fill(weight), axes=weight.axes))

    @property
    def stacks(self) -> list[Block]:
        """The layers, in their stacks."""
        return [self.layers] if isinstance(self.layers, Block) else list(self.layers)

    def head(self, adapter: Adapter) -> Float[Array, "V D"]:
        """The output projection: the adapter's own, or the base's, which is its embedding where they are tied."""
        saved = adapter.get("lm_head")
        if isinstance(saved, Saved):
            return saved.weight
        table = (self.embed_tokens if self.cfg.tie_word_embeddings else self.lm_head)[...]
        rows = self.head_rows(adapter)
        return table if rows is None else rows.within(table)

    def head_rows(self, adapter: Adapter) -> Rows | None:
        """The rows of the output projection that are trained; as in PEFT, those of an embedding that it is tied to."""
        tied = self.cfg.tie_word_embeddings and "lm_head" not in adapter
        rows = adapter.get("embed_tokens" if tied else "lm_head")
        return rows if isinstance(rows, Rows) else None

    def adapted(self, adapter: Adapter) -> tuple["Decoder", dict[str, Lora]]:
        """The model with the weights that the adapter has in full but the head, and the adapter's low-rank part.

        As in PEFT, an embedding that is trained leaves a head that is tied to it where it was.
        """
        saved = {name: part for name, part in adapter.items() if isinstance(part, Saved) and name != "lm_head"}
        low_rank = {name: part for name, part in adapter.items() if isinstance(part, Lora)}
        model = jax.tree.map(lambda leaf: leaf, self) if saved else self
        for name, part in saved.items():
            if name == "embed_tokens":
                model.embed_tokens.set_raw_value(part.weight)
                continue
            for stack, weight in zip(model.stacks, cut(part.weight, model.stacks), strict=True):
                getattr(stack, name).set_raw_value(weight)
        return model, low_rank

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        *,
        adapter: Adapter,
        dropout_key: PRNGKeyArray | None,
        neftune_noise_alpha: float,
        attention: Attention,
        remat: str,
        dtype: jnp.dtype,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the last norm, in `dtype`, for rows of packed segments.

        Args:
          positions: restart at 0 in every segment.
          segments: 1, 2, ... within a row; 0 is padding.
          adapter: empty for the bare base.
          dropout_key: None when not training.
          neftune_noise_alpha: of the noise on embeddings in training, or 0.
        """
        model, low_rank = self.adapted(adapter)
        places = Places(segments, segments, positions, positions)
        rotary = rotary_by_layer(self.cfg, positions, segments)

        def layer(
            index: Layer, x: Array, block: Block, factors: dict[str, Lora], key: PRNGKeyArray | None = None
        ) -> Array:
            seeing = partial(attend, self.cfg, attention, index, places=places)
            return block(checkpoint_name(x, LAYER_INPUT), rotary(index), seeing, factors, key)

        def rematerialised(layer: Callable[..., Array]) -> Callable[..., Array]:
            return layer if remat == "none" else jax.checkpoint(layer, policy=policy(remat))

        keys = None if dropout_key is None else jax.random.split(dropout_key, self.cfg.num_hidden_layers)
        x = model._embed(tokens, positions, dtype, adapter)
        if dropout_key is not None and neftune_noise_alpha > 0.0:
            x = x + embedding_noise(dropout_key, x, neftune_noise_alpha)
        below, above = split_at(model.stacks, lowest_adapted(adapter))
        x = over_layers(layer, x, below, ({},), 0)  # nothing to train, so no backward pass
        start = sum(stack.size for stack in below)
        own = jax.tree.map(lambda leaf: leaf[start:], (low_rank, keys)) if start else (low_rank, keys)
        return self._normed(over_layers(layer, x, above, own, start, rematerialised))

    def hidden_cached(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
        cache: Cache,
        *,
        adapter: Adapter,
        attention: Attention,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """As `hidden`, for the next T tokens of rows whose earlier tokens are in `cache`."""
        model, low_rank = self.adapted(adapter)
        slot = cache.used
        all_segments = jax.lax.dynamic_update_slice(cache.segments, segments, (0, slot))
        all_positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, slot))
        rotary = rotary_by_layer(self.cfg, positions, segments)

        def layer(
            index: Layer, carry: tuple[Array, Array, Array], block: Block, factors: dict[str, Lora]
        ) -> tuple[Array, Array, Array]:
            x, keys, values = carry

            def seeing(q: Array, k: Array, v: Array) -> Array:
                nonlocal keys, values
                keys = jax.lax.dynamic_update_slice(keys, k[None], (index, 0, slot, 0, 0))
                values = jax.lax.dynamic_update_slice(values, v[None], (index, 0, slot, 0, 0))
                places = Places(segments, all_segments, positions, all_positions)
                return attend(self.cfg, attention, index, q, keys[index], values[index], places)

            return block(x, rotary(index), seeing, factors, None), keys, values

        x = model._embed(tokens, positions, cache.keys.dtype, adapter)
        # The cache is carried, not scanned over, so that a step writes its own slots and copies nothing.
        x, keys, values = over_layers(layer, (x, cache.keys, cache.values), model.stacks, (low_rank,))
        cache = Cache(keys, values, all_segments, all_positions, slot + tokens.shape[1])
        return self._normed(x), cache

    def logits(self, hidden: Float[Array, "B T D"], adapter: Adapter) -> Float[Array, "B T V"]:
        """Logits in float32."""
        head = self.head(adapter).astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
        return capped(logits, self.cfg.logits_softcap)

    def _normed(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return normalize(self.cfg, x, self.norm[...], self.norm_bias[...] if self.cfg.layer_norm else None)

    def _embed(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], dtype: jnp.dtype, adapter: Adapter
    ) -> Float[Array, "B T D"]:
        x = self.embed_tokens[...][tokens].astype(dtype)
        if isinstance(rows := adapter.get("embed_tokens"), Rows):
            x = rows.of(tokens, x)
        if self.cfg.embedding_scale != 1.0:
            x = x * jnp.asarray(self.cfg.embedding_scale, dtype)
        if self.cfg.learned_positions is not None:
            x = x + self.embed_positions[...][positions].astype(dtype)
        return constrain(x, "act_batch", "act_seq", "act_embed")


def embedding_noise(key: PRNGKeyArray, x: Float[Array, "B T D"], alpha: float) -> Float[Array, "B T D"]:
    """NEFTune (arXiv:2310.05914): uniform within alpha / sqrt(T D), as the hook of transformers has it."""
    bound = alpha / math.sqrt(x.shape[1] * x.shape[2])
    noise_key = jax.random.fold_in(key, zlib.crc32(b"neftune"))
    return jax.random.uniform(noise_key, x.shape, jnp.float32, -bound, bound).astype(x.dtype)


def abstract_decoder(
    cfg: ModelConfig,
    dtype: jnp.dtype,
    quantization: str | None = None,
    sizes: tuple[int, ...] | None = None,
    coded: bool = False,
) -> Decoder:
    """The module with shapes instead of arrays: projections quantised where asked for, all else in `dtype`.

    Args:
      sizes: as of `Decoder`.
      coded: as of `Quantized`, of all projections.
    """

    def make() -> Decoder:
        decoder = Decoder(cfg, lambda weight: jnp.zeros(weight.shape, dtype), sizes)
        for stack, (name, (inputs, _)) in itertools.product(decoder.stacks, projection_shapes(cfg).items()):
            if quantization is not None:
                param = getattr(stack, name)
                one_layer = partial(quantize, kind=quantization, num_inputs=len(inputs))
                param.set_raw_value(replace(jax.vmap(one_layer)(param.get_raw_value()), coded=coded))
        return decoder

    return jax.eval_shape(make)
