"""LoRA: shape, initialisation, the projection that an adapter takes part in, and merging.

The adapter of a model is a dict from projection name to `Lora`, its factors stacked over layers like
the weights they belong to. Knows nothing of files (`jlora.hf`) or of the optimizer.
"""

import math
import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.config import PROJECTIONS, LoraSection
from jlora.quant import Leaf, Quantized, quantized_einsum


@dataclass(frozen=True)
class Lora:
    """Low-rank factors of one projection (arXiv:2106.09685): W x becomes W x + scale * B A x.

    Attributes:
      lora_a: the projection's input dims, then R; float32.
      lora_b: R, then the projection's output dims; float32.
      scale: alpha / R, or alpha / sqrt(R) with rsLoRA.
      dropout: probability with which an element of the adapter's input is dropped in training.
    Stacked over layers, both arrays have a leading dim L.
    """

    lora_a: Float[Array, "..."]
    lora_b: Float[Array, "..."]
    scale: float
    dropout: float


register_dataclass(Lora, data_fields=["lora_a", "lora_b"], meta_fields=["scale", "dropout"])

Adapter = dict[str, Lora]


def scaling(cfg: LoraSection) -> float:
    """What the product BA is multiplied by, as `LoraLayer.update_layer` of PEFT has it."""
    return cfg.alpha / (math.sqrt(cfg.rank) if cfg.use_rslora else cfg.rank)


def init_adapter(
    cfg: LoraSection, shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]], num_layers: int, seed: int
) -> Adapter:
    """A Kaiming-uniform, B zero, as `LoraLayer.reset_lora_parameters` of PEFT.

    PyTorch's `kaiming_uniform_(a=sqrt(5))` draws from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The draw of
    a projection depends on the seed and its name alone, so adding a target does not move the others.

    Args:
      shapes: projection name -> (input dims, output dims) of one layer.
    """
    adapter: Adapter = {}
    for name in cfg.targets:
        inputs, outputs = shapes[name]
        bound = 1.0 / math.sqrt(math.prod(inputs))
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        adapter[name] = Lora(
            lora_a=jax.random.uniform(key, (num_layers, *inputs, cfg.rank), jnp.float32, -bound, bound),
            lora_b=jnp.zeros((num_layers, cfg.rank, *outputs), jnp.float32),
            scale=scaling(cfg),
            dropout=cfg.dropout,
        )
    return adapter


def project(
    equation: str,
    x: Float[Array, "..."],
    weight: Leaf,
    lora: Lora | None,
    dropout_key: PRNGKeyArray | None,
) -> Float[Array, "..."]:
    """`einsum(equation, x, weight)` plus the adapter's share, never forming W + BA.

    A quantised weight is dequantised here, to the dtype of `x`, and nowhere else.

    The adapter's input dims are the ones that `equation` sums over. Dropout falls on the adapter's
    input, as in PEFT. Result in the dtype of `x`.

    Args:
      weight: the projection's array, or its `jlora.quant.Quantized`.
      dropout_key: None when not training.
    """
    if isinstance(weight, Quantized):
        y = checkpoint_name(quantized_einsum(equation, x, weight), "projection")
    else:
        y = jnp.einsum(equation, x, weight.astype(x.dtype))
    if lora is None:
        return y
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    summed = "".join(dim for dim in w_dims if dim not in y_dims)
    outputs = "".join(dim for dim in w_dims if dim in y_dims)
    kept = "".join(dim for dim in x_dims if dim not in summed)
    if dropout_key is not None and lora.dropout > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - lora.dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - lora.dropout), jnp.zeros_like(x))
    inner = jnp.einsum(f"{x_dims},{summed}r->{kept}r", x, lora.lora_a.astype(x.dtype))
    delta = jnp.einsum(f"{kept}r,r{outputs}->{y_dims}", inner, lora.lora_b.astype(x.dtype))
    return y + delta * lora.scale


def layer_keys(dropout_key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The dropout key of one projection of one layer, from the layer's key."""
    return jax.random.fold_in(dropout_key, PROJECTIONS.index(name))
