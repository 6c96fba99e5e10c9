"""LoRA: shape, initialisation, the projection that an adapter takes part in, and merging.

The adapter of a model is a dict from projection name to `Lora`, its factors stacked over layers like
the weights they belong to. Knows nothing of files (`jlora.hf`) or of the optimizer.
"""

import math
import zlib
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.config import PROJECTIONS, LoraSection
from jlora.quant import Leaf, Quantized, quantized_einsum

# The checkpoint name of a product with a quantised weight, for `jlora.remat`.
QUANTIZED_PRODUCT = "quantized_product"


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
        y = checkpoint_name(quantized_einsum(equation, x, weight), QUANTIZED_PRODUCT)
    else:
        y = jnp.einsum(equation, x, weight.astype(x.dtype))
    if lora is None:
        return y
    if dropout_key is not None and lora.dropout > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - lora.dropout, x.shape)
        x = jnp.where(keep, x / (1.0 - lora.dropout), jnp.zeros_like(x))
    return y + _low_rank(equation, x, lora.lora_a, lora.lora_b) * lora.scale


@dataclass(frozen=True)
class _Dims:
    """The dims of a low-rank product, as an equation of the projection names them: r is the rank."""

    x: str
    y: str
    a: str
    b: str
    inner: str


def _dims(equation: str) -> _Dims:
    x, w, y = equation.replace("->", ",").split(",")
    summed = "".join(dim for dim in w if dim not in y)
    outputs = "".join(dim for dim in w if dim in y)
    return _Dims(x, y, f"{summed}r", f"r{outputs}", "".join(dim for dim in x if dim not in summed) + "r")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(
    equation: str, x: Float[Array, "..."], lora_a: Float[Array, "..."], lora_b: Float[Array, "..."]
) -> Float[Array, "..."]:
    """(x A) B in the dtype of `x`. By hand for its gradients: those of A and B leave their products in float32, and
    no product has to transpose more than its side of rank R."""
    return _low_rank_forward(equation, x, lora_a, lora_b)[0]


def _low_rank_forward(equation: str, x: Array, lora_a: Array, lora_b: Array) -> tuple[Array, tuple[Array, ...]]:
    dims = _dims(equation)
    inner = jnp.einsum(f"{dims.x},{dims.a}->{dims.inner}", x, lora_a.astype(x.dtype))
    delta = jnp.einsum(f"{dims.inner},{dims.b}->{dims.y}", inner, lora_b.astype(x.dtype))
    return delta, (x, inner, lora_a, lora_b)


def _low_rank_backward(equation: str, saved: tuple[Array, ...], to_y: Array) -> tuple[Array, Array, Array]:
    dims = _dims(equation)
    x, inner, lora_a, lora_b = saved
    in_float32 = partial(jnp.einsum, preferred_element_type=jnp.float32)
    to_inner = jnp.einsum(f"{dims.y},{dims.b}->{dims.inner}", to_y, lora_b.astype(x.dtype))
    to_x = jnp.einsum(f"{dims.inner},{dims.a}->{dims.x}", to_inner, lora_a.astype(x.dtype))
    to_a = in_float32(f"{dims.inner},{dims.x}->r{dims.a[:-1]}", to_inner, x)
    # Behind a barrier, or XLA makes a product of it that transposes x, which in bfloat16 its CPU backend can not.
    to_a = jnp.moveaxis(jax.lax.optimization_barrier(to_a), 0, -1)
    to_b = in_float32(f"{dims.inner},{dims.y}->{dims.b}", inner, to_y)
    return to_x, to_a.astype(lora_a.dtype), to_b.astype(lora_b.dtype)


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def layer_keys(dropout_key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """The dropout key of one projection of one layer, from the layer's key."""
    return jax.random.fold_in(dropout_key, PROJECTIONS.index(name))
