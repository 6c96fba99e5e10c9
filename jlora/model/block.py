"""One layer of a decoder as a `flax.nnx` module; what families do differently in it are fields of `ModelConfig`."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.model.adapter import Lora, layer_keys, project
from jlora.model.config import ModelConfig, Weight, block_weights
from jlora.model.layers import plus, rms_norm
from jlora.model.quant import in_turn
from jlora.model.remat import ATTENTION_INPUT
from jlora.model.rope import Rotary, rotate
from jlora.model.sharding import constrain


class Block(nnx.Module):
    """One layer, or all layers stacked: then every weight has a leading dim L. See `block_weights` for those it has."""

    input_layernorm: nnx.Param
    q_proj: nnx.Param
    k_proj: nnx.Param
    v_proj: nnx.Param
    q_norm: nnx.Param
    k_norm: nnx.Param
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
        cfg = self.cfg

        def weighted(name: str, equation: str, inputs: Array) -> Array:
            key = None if dropout_key is None else layer_keys(dropout_key, name)
            y = project(equation, inputs, getattr(self, name).get_value(), adapter.get(name), key)
            return plus(y, getattr(self, f"{name}_bias")[...]) if name in cfg.biased else y

        def norm(name: str, inputs: Array) -> Array:
            return rms_norm(inputs, getattr(self, name)[...], cfg.norm_eps)

        normed = norm("input_layernorm", x)
        q = constrain(weighted("q_proj", "btd,dnh->btnh", normed), "act_batch", None, "act_heads", None)
        k = constrain(weighted("k_proj", "btd,dnh->btnh", normed), "act_batch", None, "act_kv_heads", None)
        v = constrain(weighted("v_proj", "btd,dnh->btnh", normed), "act_batch", None, "act_kv_heads", None)
        q, k, v = (checkpoint_name(projected, ATTENTION_INPUT) for projected in (q, k, v))
        if cfg.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        mixed = attend(rotate(q, rotary), rotate(k, rotary), v)
        x = x + constrain(weighted("o_proj", "btnh,nhd->btd", mixed), "act_batch", "act_seq", "act_embed")
        normed = norm("post_attention_layernorm", x)
        gate = constrain(weighted("gate_proj", "btd,df->btf", normed), "act_batch", None, "act_mlp")
        gate, normed = in_turn(self.gate_proj.get_value(), gate, normed)
        up = constrain(weighted("up_proj", "btd,df->btf", normed), "act_batch", None, "act_mlp")
        down = weighted("down_proj", "btf,fd->btd", jax.nn.silu(gate) * up)
        return x + constrain(down, "act_batch", "act_seq", "act_embed")
