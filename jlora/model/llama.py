"""Llama as a `flax.nnx` module: blocks stacked over layers and run by scan.

Owns the shapes and logical axes of the weights and the forward pass. Knows nothing of files,
losses or optimizers. A module is a pytree, so it passes through `jax.jit` and `jax.grad` as it is.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, no_type_check

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.errors import ModelError
from jlora.model.adapter import Adapter, Lora, Saved, layer_keys, project
from jlora.model.attention import Attention, Places
from jlora.model.boundary import finding
from jlora.model.layers import plus, rms_norm
from jlora.model.quant import in_turn, quantize
from jlora.model.remat import ATTENTION_INPUT, LAYER_INPUT, checkpointed
from jlora.model.rope import RopeScaling, Rotary, rotary_table, rotate
from jlora.model.sharding import constrain, named_sharding, place


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a Llama, all from the base's own config.json; no field has a default."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    tie_word_embeddings: bool
    biased: tuple[str, ...]  # projections that have a bias


# Input dims of a projection: heads and head_dim; every other one has one.
NUM_INPUTS = {"o_proj": 2}


@dataclass(frozen=True)
class Weight:
    """Shape and logical axes of one weight."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def block_weights(cfg: ModelConfig) -> dict[str, Weight]:
    """The weights of one layer, in the order of their use, then the biases."""
    d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    n, k = cfg.num_attention_heads, cfg.num_key_value_heads
    weights = {
        "input_layernorm": Weight((d,), ("embed",)),
        "q_proj": Weight((d, n, h), ("embed", "heads", "head_dim")),
        "k_proj": Weight((d, k, h), ("embed", "kv_heads", "head_dim")),
        "v_proj": Weight((d, k, h), ("embed", "kv_heads", "head_dim")),
        "o_proj": Weight((n, h, d), ("heads", "head_dim", "embed")),
        "post_attention_layernorm": Weight((d,), ("embed",)),
        "gate_proj": Weight((d, f), ("embed", "mlp")),
        "up_proj": Weight((d, f), ("embed", "mlp")),
        "down_proj": Weight((f, d), ("mlp", "embed")),
    }
    for name in cfg.biased:
        weight, inputs = weights[name], NUM_INPUTS.get(name, 1)
        weights[f"{name}_bias"] = Weight(weight.shape[inputs:], weight.axes[inputs:])
    return weights


def outer_weights(cfg: ModelConfig) -> dict[str, Weight]:
    """The weights outside the layers."""
    table = Weight((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
    norm = Weight((cfg.hidden_size,), ("embed",))
    tied = {"embed_tokens": table, "norm": norm}
    return tied if cfg.tie_word_embeddings else tied | {"lm_head": table}


def projection_shapes(cfg: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Projection name -> (input dims, output dims) of one layer, for its adapter."""
    return {
        name: (weight.shape[: NUM_INPUTS.get(name, 1)], weight.shape[NUM_INPUTS.get(name, 1) :])
        for name, weight in block_weights(cfg).items()
        if name.endswith("_proj")
    }


def adapter_axes(cfg: ModelConfig, adapter: Adapter) -> Any:
    """A tree like the adapter, with logical axes for arrays: those of the weight, cut at the rank in A and B."""
    stacked, outer = block_weights(cfg), outer_weights(cfg)
    tree: dict[str, Any] = {}
    part: Any
    for name, part in adapter.items():
        if isinstance(part, Saved):
            axes = ("layers", *stacked[name].axes) if name in stacked else outer.get(name, outer["embed_tokens"]).axes
            tree[name] = Saved(axes)  # type: ignore[arg-type]
            continue
        inputs = NUM_INPUTS.get(name, 1)
        ins, outs = stacked[name].axes[:inputs], stacked[name].axes[inputs:]
        a, b = ("layers", *ins, "rank"), ("layers", "rank", *outs)
        magnitude = None if part.magnitude is None else ("layers", *outs)
        initial = None if part.initial is None else (a, b)
        scale = None if part.scale is None else ("layers",)
        tree[name] = replace(part, lora_a=a, lora_b=b, scale=scale, magnitude=magnitude, initial=initial)
    return tree


class Block(nnx.Module):
    """One layer, or all layers stacked: then every weight has a leading dim L."""

    input_layernorm: nnx.Param
    q_proj: nnx.Param
    k_proj: nnx.Param
    v_proj: nnx.Param
    o_proj: nnx.Param
    post_attention_layernorm: nnx.Param
    gate_proj: nnx.Param
    up_proj: nnx.Param
    down_proj: nnx.Param

    def __init__(self, cfg: ModelConfig, fill: Callable[[Weight], Array]):
        self.cfg = cfg
        for name, weight in block_weights(cfg).items():
            stacked = Weight((cfg.num_hidden_layers, *weight.shape), ("layers", *weight.axes))
            setattr(self, name, nnx.Param(fill(stacked), axes=stacked.axes))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary,
        attend: Callable[..., Array],
        adapter: dict[str, Lora],
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "B T D"]:
        """One layer.

        Args:
          rotary: cosines and sines of the tokens' angles.
          attend: (q [B T N H], k [B T K H], v [B T K H]) -> [B T N H], with the mask inside.
          adapter: this layer's factors by projection name.
        """

        biased = self.cfg.biased

        def weighted(name: str, equation: str, inputs: Array) -> Array:
            key = None if dropout_key is None else layer_keys(dropout_key, name)
            y = project(equation, inputs, getattr(self, name).get_value(), adapter.get(name), key)
            return plus(y, getattr(self, f"{name}_bias")[...]) if name in biased else y

        normed = rms_norm(x, self.input_layernorm[...], self.cfg.rms_norm_eps)
        q = constrain(weighted("q_proj", "btd,dnh->btnh", normed), "act_batch", None, "act_heads", None)
        k = constrain(weighted("k_proj", "btd,dnh->btnh", normed), "act_batch", None, "act_kv_heads", None)
        v = constrain(weighted("v_proj", "btd,dnh->btnh", normed), "act_batch", None, "act_kv_heads", None)
        q, k, v = (checkpoint_name(projected, ATTENTION_INPUT) for projected in (q, k, v))
        mixed = attend(rotate(q, rotary), rotate(k, rotary), v)
        x = x + constrain(weighted("o_proj", "btnh,nhd->btd", mixed), "act_batch", "act_seq", "act_embed")
        normed = rms_norm(x, self.post_attention_layernorm[...], self.cfg.rms_norm_eps)
        gate = constrain(weighted("gate_proj", "btd,df->btf", normed), "act_batch", None, "act_mlp")
        gate, normed = in_turn(self.gate_proj.get_value(), gate, normed)
        up = constrain(weighted("up_proj", "btd,df->btf", normed), "act_batch", None, "act_mlp")
        down = weighted("down_proj", "btf,fd->btd", jax.nn.silu(gate) * up)
        return x + constrain(down, "act_batch", "act_seq", "act_embed")


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


class Decoder(nnx.Module):
    """A Llama with its language-model head; logits match transformers' class of its family."""

    embed_tokens: nnx.Param
    norm: nnx.Param
    lm_head: nnx.Param  # absent where the embedding is tied

    def __init__(self, cfg: ModelConfig, fill: Callable[[Weight], Array]):
        """A decoder of the shape of `cfg`.

        Args:
          fill: makes each weight, stacked over layers, from its shape and logical axes.
        """
        self.cfg = cfg
        self.layers = Block(cfg, fill)
        for name, weight in outer_weights(cfg).items():
            setattr(self, name, nnx.Param(fill(weight), axes=weight.axes))

    def head(self, adapter: Adapter) -> Float[Array, "V D"]:
        """The output projection: the adapter's own, or the base's, which is its embedding where they are tied."""
        saved = adapter.get("lm_head")
        if isinstance(saved, Saved):
            return saved.weight
        return (self.embed_tokens if self.cfg.tie_word_embeddings else self.lm_head)[...]

    def adapted(self, adapter: Adapter) -> tuple["Decoder", dict[str, Lora]]:
        """The model with the weights that the adapter has in full but the head, and the adapter's low-rank part.

        As in PEFT, an embedding that is trained leaves a head that is tied to it where it was.
        """
        saved = {name: part for name, part in adapter.items() if isinstance(part, Saved) and name != "lm_head"}
        low_rank = {name: part for name, part in adapter.items() if isinstance(part, Lora)}
        model = jax.tree.map(lambda leaf: leaf, self) if saved else self
        for name, part in saved.items():
            owner = model if name == "embed_tokens" else model.layers
            getattr(owner, name).set_raw_value(part.weight)
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
        attend = partial(attention, places=places, window=self.cfg.sliding_window)
        rotary = self._rotary(positions, segments)

        def layer(x: Array, scanned: tuple[Block, dict[str, Lora], PRNGKeyArray | None]) -> tuple[Array, None]:
            block, factors, key = scanned
            return block(checkpoint_name(x, LAYER_INPUT), rotary, attend, factors, key), None

        keys = None if dropout_key is None else jax.random.split(dropout_key, self.cfg.num_hidden_layers)
        x = model._embed(tokens, dtype)
        if dropout_key is not None and neftune_noise_alpha > 0.0:
            x = x + embedding_noise(dropout_key, x, neftune_noise_alpha)
        x, _ = jax.lax.scan(checkpointed(layer, remat), x, (model.layers, low_rank, keys))
        return rms_norm(x, self.norm[...], self.cfg.rms_norm_eps)

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
        rotary = self._rotary(positions, segments)

        def layer(
            carry: tuple[Array, Array, Array], scanned: tuple[Block, dict[str, Lora], Array]
        ) -> tuple[tuple[Array, Array, Array], None]:
            x, keys, values = carry
            block, factors, index = scanned

            def attend(q: Array, k: Array, v: Array) -> Array:
                nonlocal keys, values
                keys = jax.lax.dynamic_update_slice(keys, k[None], (index, 0, slot, 0, 0))
                values = jax.lax.dynamic_update_slice(values, v[None], (index, 0, slot, 0, 0))
                places = Places(segments, all_segments, positions, all_positions)
                return attention(q, keys[index], values[index], places, self.cfg.sliding_window)

            return (block(x, rotary, attend, factors, None), keys, values), None

        x = model._embed(tokens, cache.keys.dtype)
        # The cache is carried, not scanned over, so that a step writes its own slots and copies nothing.
        (x, keys, values), _ = jax.lax.scan(
            layer,
            (x, cache.keys, cache.values),
            (model.layers, low_rank, jnp.arange(self.cfg.num_hidden_layers)),
        )
        cache = Cache(keys, values, all_segments, all_positions, slot + tokens.shape[1])
        return rms_norm(x, self.norm[...], self.cfg.rms_norm_eps), cache

    def logits(self, hidden: Float[Array, "B T D"], adapter: Adapter) -> Float[Array, "B T V"]:
        """Logits in float32."""
        head = self.head(adapter).astype(hidden.dtype)
        return jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)

    def _rotary(self, positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Rotary:
        cfg = self.cfg
        cos, sin = rotary_table(positions, segments, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        return constrain(cos, "act_batch", None, None), constrain(sin, "act_batch", None, None)

    def _embed(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        x = self.embed_tokens[...][tokens].astype(dtype)
        return constrain(x, "act_batch", "act_seq", "act_embed")


def embedding_noise(key: PRNGKeyArray, x: Float[Array, "B T D"], alpha: float) -> Float[Array, "B T D"]:
    """NEFTune (arXiv:2310.05914): uniform within alpha / sqrt(T D), as the hook of transformers has it."""
    bound = alpha / math.sqrt(x.shape[1] * x.shape[2])
    noise_key = jax.random.fold_in(key, zlib.crc32(b"neftune"))
    return jax.random.uniform(noise_key, x.shape, jnp.float32, -bound, bound).astype(x.dtype)


def abstract_decoder(cfg: ModelConfig, dtype: jnp.dtype, quantization: str | None = None) -> Decoder:
    """The module with shapes instead of arrays: projections quantised where asked for, all else in `dtype`."""

    def make() -> Decoder:
        decoder = Decoder(cfg, lambda weight: jnp.zeros(weight.shape, dtype))
        for name, (inputs, _) in projection_shapes(cfg).items():
            if quantization is not None:
                param = getattr(decoder.layers, name)
                one_layer = partial(quantize, kind=quantization, num_inputs=len(inputs))
                param.set_raw_value(jax.vmap(one_layer)(param.get_raw_value()))
        return decoder

    return jax.eval_shape(make)


def require_fits(adapter: Adapter, cfg: ModelConfig) -> None:
    """An adapter, arrays or shapes, must have the dims of the weights it belongs to.

    Raises:
      ModelError: it is another base's, and where that shows.
    """
    layers, shapes, stacked = cfg.num_hidden_layers, projection_shapes(cfg), block_weights(cfg)
    for name, part in adapter.items():
        try:
            if isinstance(part, Lora):
                inputs, outputs = shapes[name]
                chex.assert_tree_shape_prefix(part.lora_a, (layers, *inputs))
                chex.assert_tree_shape_prefix(part.lora_b, (layers,))
                chex.assert_tree_shape_suffix(part.lora_b, outputs)
            else:
                whole = (layers, *stacked[name].shape) if name in stacked else (cfg.vocab_size, cfg.hidden_size)
                chex.assert_tree_shape_prefix(part.weight, whole)
        except AssertionError as error:
            raise ModelError(
                f"the adapter's {name} does not fit this base ({finding(error)}); give the base that it was trained on"
            ) from None


def place_adapter(adapter: Adapter, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> Adapter:
    """The adapter laid out over `mesh` like the weights it belongs to; abstract in, abstract out.

    Raises:
      ModelError: see `require_fits`.
    """
    require_fits(adapter, cfg)

    def lay_out(
        array: Array | np.ndarray | jax.ShapeDtypeStruct, dims: tuple[str, ...]
    ) -> Array | jax.ShapeDtypeStruct:
        sharding = named_sharding(mesh, dims)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return place(np.asarray(array), sharding)

    return jax.tree.map(lay_out, adapter, adapter_axes(cfg, adapter))
