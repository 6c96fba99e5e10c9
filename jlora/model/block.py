"""One layer of a decoder as a `flax.nnx` module; what families do differently in it are fields of `ModelConfig`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.config import ALL_PROJECTIONS
from jlora.model.adapter import Lora, project
from jlora.model.config import ModelConfig, Weight, block_weights
from jlora.model.layers import ACTIVATIONS, layer_norm, offset_rms_norm, plus, rms_norm
from jlora.model.remat import ATTENTION_INPUT, MIDDLE, MLP_INPUT
from jlora.model.rope import Rotary, rotate
from jlora.model.sharding import constrain
from jlora.model.shared_input import products


def normalize(cfg: ModelConfig, x: Array, weight: Array, bias: Array | None) -> Array:
    """The model's norm over the last dim of `x` [B T ... D]."""
    if bias is not None:
        return layer_norm(x, weight, bias, cfg.norm_eps)
    return (offset_rms_norm if cfg.norm_offset else rms_norm)(x, weight, cfg.norm_eps)


class Block(nnx.Module):
    """One layer, or several stacked: then every weight has a leading dim. See `block_weights` for those it has."""

    gate_proj: nnx.Param

    def __init__(self, cfg: ModelConfig, fill: Callable[[Weight], Array], size: int):
        """A stack of `size` layers."""
        self.cfg = cfg
        for name, weight in block_weights(cfg).items():
            stacked = Weight((size, *weight.shape), ("layers", *weight.axes))
            setattr(self, name, nnx.Param(fill(stacked), axes=stacked.axes))

    @property
    def size(self) -> int:
        """Number of layers of a stack."""
        return jax.tree.leaves(self)[0].shape[0]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: Rotary | None,
        attend: Callable[..., Array],
        adapter: dict[str, Lora],
        dropout_key: PRNGKeyArray | None,
    ) -> Float[Array, "B T D"]:
        """One layer.

        Args:
          rotary: cosines and sines of the tokens' angles; None where heads are not turned.
          attend: (q [B T N H], k [B T K H], v [B T K H]) -> [B T N H], with the mask inside.
          adapter: this layer's factors by projection name.
        """
        cfg = self.cfg

        def weighted(name: str, equation: str, inputs: Array, product: Array | None = None) -> Array:
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, ALL_PROJECTIONS.index(name))
            y = project(equation, inputs, getattr(self, name).get_value(), adapter.get(name), key, product)
            return plus(y, getattr(self, f"{name}_bias")[...]) if name in cfg.biased else y

        def of_one(names: tuple[str, ...], equation: str, inputs: Array) -> list[Array]:
            axes = [block_weights(cfg)[name].axes for name in names]
            found = products(equation, inputs, [getattr(self, name).get_value() for name in names], axes)
            return [weighted(name, equation, inputs, y) for name, y in zip(names, found, strict=True)]

        def norm(name: str, inputs: Array) -> Array:
            bias = getattr(self, f"{name}_bias")[...] if cfg.layer_norm else None
            return normalize(cfg, inputs, getattr(self, name)[...], bias)

        def into_mlp(inputs: Array) -> list[Array]:
            """Gate and up, or up alone."""
            if cfg.gated and cfg.fused:
                parts = jnp.split(of_one(("gate_up_proj",), "btd,df->btf", inputs)[0], 2, axis=-1)
            else:
                parts = of_one(("gate_proj", "up_proj") if cfg.gated else ("up_proj",), "btd,df->btf", inputs)
            return [checkpoint_name(constrain(part, "act_batch", "act_tokens", "act_mlp"), MLP_INPUT) for part in parts]

        def added(name: str, y: Array) -> Array:
            return norm(name, checkpoint_name(y, MIDDLE)) if cfg.post_norms else y

        normed = norm("input_layernorm", x)
        if cfg.fused:
            ends = [cfg.num_attention_heads, cfg.num_attention_heads + cfg.num_key_value_heads]
            q, k, v = jnp.split(of_one(("qkv_proj",), "btd,dnh->btnh", normed)[0], ends, axis=2)
        else:
            q, k, v = of_one(("q_proj", "k_proj", "v_proj"), "btd,dnh->btnh", normed)
        q = checkpoint_name(constrain(q, "act_batch", "act_tokens", "act_heads", None), ATTENTION_INPUT)
        k = checkpoint_name(constrain(k, "act_batch", "act_tokens", "act_kv_heads", None), ATTENTION_INPUT)
        v = checkpoint_name(constrain(v, "act_batch", "act_tokens", "act_kv_heads", None), ATTENTION_INPUT)
        if cfg.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        if cfg.query_scale != 1.0:
            q = q * cfg.query_scale
        mixed = constrain(weighted("o_proj", "btnh,nhd->btd", attend(q, k, v)), "act_batch", "act_seq", "act_embed")
        x = checkpoint_name(x + added("post_attention_layernorm", mixed), MIDDLE)
        normed = norm("pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm", x)
        first, *up = into_mlp(normed)
        inner = ACTIVATIONS[cfg.activation](first)
        inner = inner * up[0] if cfg.gated else inner
        down = constrain(weighted("down_proj", "btf,fd->btd", inner), "act_batch", "act_seq", "act_embed")
        return x + added("post_feedforward_layernorm", down)
