"""Layers without a product: pure functions of arrays, every numeric given by the caller; and how products are computed.

A vector that meets every token has a gradient that is a sum over tokens. What JAX makes of broadcasting adds that up in
the dtype of the activations, and in bfloat16 a sum stands still once it is some hundred times its terms. `times` and
`plus` compute forward in that dtype, and add up in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _over_tokens(gradient: Float[Array, "B T ..."], vector: Float[Array, "*features"]) -> Float[Array, "*features"]:
    return gradient.sum(axis=tuple(range(gradient.ndim - vector.ndim)), dtype=jnp.float32).astype(vector.dtype)


def _spread(vector: Float[Array, "*features"], x: Float[Array, "B T ..."]) -> Float[Array, "1 1 ..."]:
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - vector.ndim) + vector.shape)


@jax.custom_vjp
def plus(x: Float[Array, "B T *features"], vector: Float[Array, "*features"]) -> Float[Array, "B T *features"]:
    """`x` plus one vector for all tokens, in the dtype of `x`; the vector's gradient is added up in float32."""
    return x + _spread(vector, x)


def _plus_forward(x: Array, vector: Array) -> tuple[Array, Array]:
    return plus(x, vector), vector


def _plus_backward(vector: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, _over_tokens(gradient, vector)


plus.defvjp(_plus_forward, _plus_backward)


@jax.custom_vjp
def times(x: Float[Array, "B T *dims"], vector: Float[Array, "*features"]) -> Float[Array, "B T *dims"]:
    """`x` times one vector for all tokens (and heads, where it has no dim for them), in the dtype of `x`; the vector's
    gradient is added up in float32."""
    return _spread(vector, x) * x


def _times_forward(x: Any, vector: Any) -> tuple[Array, tuple[Array | None, Array]]:
    # `x` waits for the backward pass only where the vector is trained.
    return times(x.value, vector.value), (x.value if vector.perturbed else None, vector.value)


def _times_backward(saved: tuple[Array | None, Array], gradient: Array) -> tuple[Array, Array | None]:
    x, vector = saved
    to_vector = None
    if x is not None:
        to_vector = _over_tokens(gradient.astype(jnp.float32) * x.astype(jnp.float32), vector)
    return _spread(vector, gradient) * gradient, to_vector


times.defvjp(_times_forward, _times_backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(equation: str, x: Float[Array, "B T *inputs"], weight: Float[Array, "*dims"]) -> Float[Array, "B T *outputs"]:
    """`einsum(equation, x, weight)` in the dtype of `x`.

    By hand for a trained weight's gradient: it leaves its product in float32, and in the order of the weight's dims.
    JAX turns them, and XLA on CPUs then turns both factors of the product, which took as long as the product itself.
    """
    return jnp.einsum(equation, x, weight.astype(x.dtype))


def _dense_forward(equation: str, x: Any, weight: Any) -> tuple[Array, tuple[Array | None, Array]]:
    # As with `times`.
    return dense(equation, x.value, weight.value), (x.value if weight.perturbed else None, weight.value)


def _dense_backward(equation: str, saved: tuple[Array | None, Array], dy: Array) -> tuple[Array, Array | None]:
    x, weight = saved
    of_x, of_w, of_y = equation.replace("->", ",").split(",")
    to_weight = None
    if x is not None:
        to_weight = jnp.einsum(f"{of_x},{of_y}->{of_w}", x, dy, preferred_element_type=jnp.float32)
        to_weight = to_weight.astype(weight.dtype)
    return jnp.einsum(f"{of_y},{of_w}->{of_x}", dy, weight.astype(dy.dtype)), to_weight


dense.defvjp(_dense_forward, _dense_backward, symbolic_zeros=True)


def layer_norm(
    x: Float[Array, "B T D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "B T D"]:
    """LayerNorm (arXiv:1607.06450) in float32; result in the dtype of `x`, as torch's."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    return plus(times(centered * inverse, weight), bias).astype(x.dtype)


def capped(x: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """Softly limited to plus and minus `softcap`; as it is without one."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


# By the names of `ModelConfig.activation`.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def offset_rms_norm(
    x: Float[Array, "B T *heads D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "B T *heads D"]:
    """RMSNorm that multiplies by 1 + weight, all in float32, as Gemma's."""
    return rms_norm(x.astype(jnp.float32), 1.0 + weight.astype(jnp.float32), eps).astype(x.dtype)


def rms_norm(x: Float[Array, "B T *heads D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "B T *heads D"]:
    """RMSNorm (arXiv:1910.07467), normalised in float32, scaled in the dtype of `x` as LlamaRMSNorm does."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return times((x32 * inverse).astype(x.dtype), weight)


@contextmanager
def products_in(dtype: jnp.dtype) -> Iterator[None]:
    """What is traced within, backward passes too, multiplies float32 as such if that is `dtype`; also a decorator.

    GPUs multiply float32 in TF32 (10 bits of mantissa) and TPUs in bfloat16 (7 bits) unless JAX is told otherwise,
    while a product is traced. Nothing changes on CPUs, nor in other dtypes.
    """
    if dtype != jnp.float32:
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield
