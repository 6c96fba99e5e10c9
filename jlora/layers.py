"""RMSNorm: a pure function of arrays, every numeric given by the caller."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "B T D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "B T D"]:
    """RMSNorm (arXiv:1910.07467), normalised in float32, scaled in the dtype of `x` as LlamaRMSNorm does."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype)[None, None] * (x32 * inverse).astype(x.dtype)
