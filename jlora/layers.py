"""RMSNorm and rotary embedding: pure functions of arrays, every numeric given by the caller."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class RopeScaling:
    """Rescaling of rotary frequencies; fields as in a Hugging Face config's `rope_scaling`.

    `kind` is "linear" (all frequencies divided by `factor`) or "llama3", which alone uses the rest.
    """

    kind: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def rms_norm(x: Float[Array, "B T D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "B T D"]:
    """RMSNorm (arXiv:1910.07467), normalised in float32, scaled in the dtype of `x` as LlamaRMSNorm does."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype)[None, None] * (x32 * inverse).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequencies of rotary embedding, [H / 2] float32, as `ROPE_INIT_FUNCTIONS` of transformers."""
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    # Llama-3: long wavelengths are stretched, short ones kept, those between blended.
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    stretched = np.where(wavelength > low, frequencies / scaling.factor, frequencies)
    return np.where((wavelength <= low) & (wavelength >= high), between, stretched).astype(np.float32)


def rotate(
    x: Float[Array, "B T N H"], positions: Int[Array, "B T"], frequencies: np.ndarray
) -> Float[Array, "B T N H"]:
    """Rotary embedding (arXiv:2104.09864) in the half-rotation layout of `apply_rotary_pos_emb`.

    Angles and rotation in float32; result in the dtype of `x`.
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
