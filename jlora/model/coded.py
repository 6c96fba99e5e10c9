"""Products with a frozen weight in 8-bit codes on both sides, as `model.compute` asks for: int8 or fp8.

The weight was rounded once, while it was loaded; what it is multiplied with is rounded row by row as it comes: x in the
forward pass, and in the backward pass dy times the scales of the weight's channels, so that one copy of the codes
serves both. Adapters, norms and attention never see a rounded number.

Plain einsums of codes, which XLA makes the hardware's 8-bit products. Not Qwix, which is made for weights that change
and rounds them in every step; not `jax.nn.scaled_matmul`, which is for Blackwell's block scales alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Shaped

from jlora.model.quant import CHANNEL_TYPES, Quantized


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def coded_einsum(equation: str, x: Float[Array, "B T *inputs"], leaf: Quantized) -> Float[Array, "B T *outputs"]:
    """About `einsum(equation, x, dequantize(leaf))`, in the dtype of `x`; the leaf, of int8 or fp8, has no gradient."""
    product = _product(equation, x, leaf, x.dtype)
    return (product * leaf.scales[None, None]).astype(x.dtype)


def _forward(equation: str, x: Array, leaf: Quantized) -> tuple[Array, Quantized]:
    return coded_einsum(equation, x, leaf), leaf


def _backward(equation: str, leaf: Quantized, dy: Array) -> tuple[Array, None]:
    of_x, of_w, of_y = equation.replace("->", ",").split(",")
    scaled = dy.astype(jnp.float32) * leaf.scales[None, None]
    return _product(f"{of_y},{of_w}->{of_x}", scaled, leaf, dy.dtype).astype(dy.dtype), None


coded_einsum.defvjp(_forward, _backward)


def _product(equation: str, x: Float[Array, "B T ..."], leaf: Quantized, dtype: jnp.dtype) -> Float[Array, "B T ..."]:
    """The product with the weight's codes times the scales of the rows, float32; fp8 leaves the product in `dtype`."""
    codes, scales = row_codes(x, leaf.kind)
    # A product wants the dim that it sums over last. Were the weight free to lie so, the compiler would turn those of
    # all layers before their loop, and hold the base twice.
    weight = with_layout_constraint(leaf.codes, Layout(tuple(range(leaf.codes.ndim))))
    result = jnp.int32 if leaf.kind == "int8" else dtype
    product = jnp.einsum(equation, codes, weight, preferred_element_type=result)
    return product.astype(jnp.float32) * scales.reshape(*x.shape[:2], *(1 for _ in range(product.ndim - 2)))


def row_codes(x: Float[Array, "B T ..."], kind: str) -> tuple[Shaped[Array, "B T ..."], Float[Array, "B T ..."]]:
    """Codes and one scale a token, float32; all zero where the token is."""
    dtype, largest = CHANNEL_TYPES[kind]
    scales = jnp.max(jnp.abs(x), axis=tuple(range(2, x.ndim)), keepdims=True).astype(jnp.float32) / largest
    scaled = x.astype(jnp.float32) / jnp.where(scales > 0.0, scales, 1.0)
    if kind == "int8":
        scaled = jnp.round(scaled)
    return jnp.clip(scaled, -largest, largest).astype(dtype), scales
