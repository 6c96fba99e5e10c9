"""Rotary embedding and its rescalings: pure functions of positions, every numeric given by the caller.

What is computed is `ROPE_INIT_FUNCTIONS` of transformers, and its fields are those of a config's `rope_scaling`.
"""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class LinearRope:
    """All frequencies divided by `factor` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicRope:
    """A larger theta for segments longer than `max_position_embeddings`, growing with their length (NTK)."""

    factor: float
    max_position_embeddings: int


@dataclass(frozen=True)
class Llama3Rope:
    """Long wavelengths are stretched, short ones kept, those between blended, as Llama-3.1 does."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv:2309.00071): stretched by how often a dim turns over the original context, and scaled.

    `attention_factor` scales cosines and sines, so scores grow with its square. `truncate` rounds the bounds
    between stretched and kept dims, given in turns by `beta_fast` and `beta_slow`, to whole dims.
    """

    factor: float
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753): each frequency is divided, by other numbers in segments beyond the original context.

    `attention_factor` scales cosines and sines; the divisors are [dim / 2].
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope


@dataclass(frozen=True)
class Rope:
    """How a layer's heads are turned by position.

    Attributes:
      theta: the base of the wavelengths.
      dim: how many of a head's dims are turned, the first ones.
      scaling: how the frequencies are rescaled.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None


Rotary = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # of the dims that are turned


def rope_frequencies(rope: Rope) -> np.ndarray:
    """Angular frequencies, [dim / 2] float32; those of segments that are not too long where that matters.

    Rounded as PyTorch rounds them: at position 100,000 one more last bit is an angle of 0.01.
    """
    scaling = rope.scaling
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    frequencies = np.float32(1) / (rope.theta ** exponents.astype(np.float64)).astype(np.float32)
    match scaling:
        case LinearRope():
            frequencies = frequencies / scaling.factor
        case Llama3Rope():
            frequencies = _llama3(frequencies, scaling)
        case YarnRope():
            kept = 1.0 - _yarn_ramp(rope.dim, rope.theta, scaling)
            frequencies = frequencies / scaling.factor * (1.0 - kept) + frequencies * kept
        case LongRope():
            frequencies = np.divide(frequencies, np.asarray(scaling.short_factor, np.float32))
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_max_position_embeddings / scaling.low_freq_factor
    high = scaling.original_max_position_embeddings / scaling.high_freq_factor
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    stretched = np.where(wavelength > low, frequencies / scaling.factor, frequencies)
    return np.where((wavelength <= low) & (wavelength >= high), between, stretched)


def _yarn_ramp(dim: int, theta: float, scaling: YarnRope) -> np.ndarray:
    """How much of each dim is stretched, [dim / 2]: 0 for those that turn often, 1 for those that hardly turn."""

    def dim_of(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    return np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)


def rotary_table(
    positions: Int[Array, "B T"], segments: Int[Array, "B T"], rope: Rope
) -> tuple[Float[Array, "B T {rope.dim//2}"], Float[Array, "B T {rope.dim//2}"]]:
    """Cosines and sines of every token's angles, float32, to be used by all layers that turn alike.

    `DynamicRope` and `LongRope` depend on a length, for which transformers takes the longest position of a whole
    forward pass, and of earlier ones. Here it is the longest position of a token's own segment: what transformers
    computes for that segment alone, whatever stands beside it in its row or batch.
    """
    scaling = rope.scaling
    frequencies = jnp.asarray(rope_frequencies(rope))[None, None]
    if isinstance(scaling, DynamicRope):
        frequencies = _dynamic_frequencies(_lengths(positions, segments), rope.dim, rope.theta, scaling)
    elif isinstance(scaling, LongRope):
        long = rope_frequencies(replace(rope, scaling=replace(scaling, short_factor=scaling.long_factor)))
        is_long = _lengths(positions, segments) > scaling.original_max_position_embeddings
        frequencies = jnp.where(is_long[:, :, None], jnp.asarray(long)[None, None], frequencies)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    amplitude = scaling.attention_factor if isinstance(scaling, YarnRope | LongRope) else 1.0
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def _lengths(positions: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """One more than the last position of each token's segment."""

    def row(positions: Int[Array, " T"], segments: Int[Array, " T"]) -> Int[Array, " T"]:
        last = jax.ops.segment_max(positions, segments, num_segments=segments.shape[0] + 1)
        return last[segments] + 1

    return jax.vmap(row)(positions, segments)


def _dynamic_frequencies(
    lengths: Int[Array, "B T"], dim: int, theta: float, scaling: DynamicRope
) -> Float[Array, "B T {dim//2}"]:
    longest = jnp.maximum(lengths, scaling.max_position_embeddings).astype(jnp.float32)
    growth = scaling.factor * longest / scaling.max_position_embeddings - (scaling.factor - 1)
    thetas = theta * growth ** (dim / (dim - 2))
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return 1.0 / thetas[:, :, None] ** exponents[None, None]


def rotate(x: Float[Array, "B T N H"], rotary: Rotary) -> Float[Array, "B T N H"]:
    """Rotary embedding (arXiv:2104.09864) in the half-rotation layout of `apply_rotary_pos_emb`.

    Rotation in float32; result in the dtype of `x`. Dims beyond those that the table has angles for stay as they are.
    """
    cos, sin = (table[:, :, None] for table in rotary)
    dim = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :dim].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if dim == x.shape[-1] else jnp.concatenate([rotated, x[..., dim:]], axis=-1)
