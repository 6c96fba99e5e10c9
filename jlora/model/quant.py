"""Quantised weight leaf: int8, fp8, nf4 and int4 codes with their scales, made and undone by pure JAX.

A weight of the model is an array or a `Quantized`; this module and `jlora.model.adapter.project` alone know.
Not Qwix (0.1.8): its NF4 has no double quantisation (4.5 bits a weight with float32 scales, not 4.13, and not the
scales of bitsandbytes), and `quantize_params` takes a leaf whole: stacked for `scan`, 35 GiB of a 70B's gate_proj.

Layout. A weight keeps its input dims first and Hugging Face its output dim, so a block of 64 consecutive elements of
Hugging Face's [out, in] runs down our flattened input dims: codes and scales are cut over devices as the weight is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from jlora.errors import ConfigError

BLOCK = 64  # weights that share an absmax
SECOND_BLOCK = 256  # absmaxes that share one of their own

# QLoRA, appendix E (arXiv:2305.14314): quantiles of a normal distribution, with an exact zero.
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
# What a 4-bit code stands for. int4's levels are looked up too: XLA would hoist the arithmetic out of the scan.
LEVELS = {"nf4": NF4_LEVELS, "int4": (np.arange(-7, 8) / 7).astype(np.float32)}
# What a weight of a channel-wise kind is stored as, and the number that the channel's largest becomes.
CHANNEL_TYPES = {"int8": (jnp.dtype("int8"), 127.0), "fp8": (jnp.dtype("float8_e4m3fn"), 448.0)}


def dynamic_map() -> np.ndarray:
    """The 256 values of the signed dynamic 8-bit type (arXiv:1511.04561), sorted, float32.

    Seven decades from 1e-6 up, the i-th with 2^i values of each sign, evenly spread; and 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        # From both ends and rounded once, as PyTorch spaces them: the last bit of a value decides over codes.
        count = 2**i + 1
        start, step = np.float64(np.float32(0.1)), np.float64(np.float32(0.9 / 2**i))
        bounds = [start + step * j if j < count // 2 else 1.0 - step * (count - 1 - j) for j in range(count)]
        edges = np.array(bounds, np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2.0)
        decade = (np.float32(10.0 ** (i - 6)) * means).tolist()
        values += [*decade, *(-value for value in decade)]
    return np.sort(np.array(values, np.float32))


DYNAMIC_MAP = dynamic_map()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """One projection's weight, quantised; stacked over layers, every array has a leading dim L.

    Attributes:
      codes: int8 and fp8: int8 or float8_e4m3fn of the weight's shape. nf4 and int4: uint8 [blocks, 32, *outputs],
        byte i of a block holds its elements i (low half) and i + 32 (high half); what a last block lacks is zero.
      scales: int8 and fp8: float32 [*outputs], what the channel's codes are multiplied by. nf4 and int4: uint8
        [blocks, *outputs], absmax of each block as an index into the dynamic map.
      second: nf4 and int4: float32 [segments, *outputs], what runs of equally many blocks multiply that by.
      offset: nf4 and int4: float32 scalar, what is added then, the mean absmax.
    Before `finish`, scales of nf4 and int4 are the absmax itself, float32, and second and offset are None.
      kind: int8, fp8, nf4 or int4.
      inputs: the weight's input dims.
      coded: whether products take the codes as they are (`jlora.model.coded`), or the weight dequantised.

    Not XLA's own 4-bit types: on CPUs their arrays have another layout than compiled programs want (jax 0.10.2).
    """

    codes: Any
    scales: Any
    second: Any
    offset: Any
    kind: str = field(metadata={"static": True})
    inputs: tuple[int, ...] = field(metadata={"static": True})
    coded: bool = field(default=False, metadata={"static": True})

    @property
    def size(self) -> int:
        """Number of weights."""
        num_inputs = math.prod(self.inputs)
        num_scales = 1 if self.kind in CHANNEL_TYPES else -(-num_inputs // BLOCK)
        return math.prod(self.scales.shape) // num_scales * num_inputs


Weight = Array | Quantized


def is_quantized(leaf: Any) -> bool:
    """For `is_leaf` of tree functions that take a quantised weight as one."""
    return isinstance(leaf, Quantized)


def quantize(weight: Float[Array, "*weight"], kind: str, num_inputs: int) -> Quantized:
    """Quantise one layer's weight [*inputs, *outputs]; jit-able. Stacked weights: `jax.vmap` of it.

    nf4 is bitsandbytes' `quantize_4bit(..., compress_statistics=True)` of the transposed weight where the number of
    inputs is a multiple of 64; elsewhere each row's last block is short here and runs on into the next row there.
    """
    inputs, outputs = weight.shape[:num_inputs], weight.shape[num_inputs:]
    codes, scales = encode(weight.reshape(math.prod(inputs), math.prod(outputs)), kind)
    shape = weight.shape if kind in CHANNEL_TYPES else (*codes.shape[:2], *outputs)
    return finish(
        Quantized(codes.reshape(shape), scales.reshape(*scales.shape[:-1], *outputs), None, None, kind, inputs)
    )


def encode(weight: Shaped[Array, "I O"], kind: str) -> tuple[Shaped[Array, "*codes O"], Float[Array, "*blocks O"]]:
    """Codes and scales of `Quantized` before `finish`, with the outputs as one dim.

    Bytes are codes of 4 bits already, in the order of `Quantized`; their absmax is left 0.
    """
    if weight.dtype == jnp.uint8:
        codes = weight.reshape(-1, BLOCK // 2, weight.shape[1])
        return codes, jnp.zeros((codes.shape[0], weight.shape[1]), jnp.float32)
    return channel_codes(weight, kind) if kind in CHANNEL_TYPES else block_codes(weight, kind)


def finish(leaf: Quantized) -> Quantized:
    """One layer's weight with its absmax quantised too, where it has one; jit-able. Wants the absmax of all of it."""
    if leaf.kind in CHANNEL_TYPES:
        return leaf
    num_blocks, *outputs = leaf.scales.shape
    scales, second, offset = quantize_absmax(leaf.scales.reshape(num_blocks, math.prod(outputs)))
    return replace(leaf, scales=scales.reshape(-1, *outputs), second=second.reshape(-1, *outputs), offset=offset)


def channel_codes(weight: Float[Array, "I O"], kind: str) -> tuple[Shaped[Array, "I O"], Float[Array, " O"]]:
    """Codes [I O] and scales of int8 or fp8. Needs all inputs of a channel, but no other channel."""
    dtype, largest = CHANNEL_TYPES[kind]
    weight = weight.astype(jnp.float32)
    scales = jnp.max(jnp.abs(weight), axis=0) / largest
    scaled = weight * _reciprocal(scales)[None]
    if kind == "int8":
        scaled = jnp.round(scaled)
    return jnp.clip(scaled, -largest, largest).astype(dtype), scales


def block_codes(weight: Float[Array, "I O"], kind: str) -> tuple[UInt8[Array, "C 32 O"], Float[Array, "C O"]]:
    """Codes and absmax of the C blocks of each channel, for nf4 or int4. Needs whole blocks, no more."""
    num_inputs, num_outputs = weight.shape
    num_blocks = -(-num_inputs // BLOCK)
    padded = jnp.pad(weight.astype(jnp.float32), [(0, num_blocks * BLOCK - num_inputs), (0, 0)])
    blocks = padded.reshape(num_blocks, BLOCK, num_outputs)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks * _reciprocal(absmax)[:, None]
    # The nearest level, in the middle the lower one: as many as there are midpoints below.
    codes = jnp.zeros(scaled.shape, jnp.uint8)
    for bound in _midpoints(LEVELS[kind]):
        codes += (scaled > bound).astype(jnp.uint8)
    return codes[:, : BLOCK // 2] | codes[:, BLOCK // 2 :] << 4, absmax


def unpack(codes: UInt8[Array, "C 32 *outputs"]) -> UInt8[Array, "C 64 *outputs"]:
    """The 4-bit codes of each block, in order."""
    num_blocks, _, *outputs = codes.shape
    # By broadcasting, which fuses with what follows: [C 1 32 ...] shifted by [1 2 1 ...].
    shifts = jnp.array([0, 4], jnp.uint8).reshape(1, 2, 1, *(1 for _ in outputs))
    return ((codes[:, None] >> shifts) & 15).reshape(num_blocks, BLOCK, *outputs)


def quantize_absmax(
    absmax: Float[Array, "C O"],
) -> tuple[UInt8[Array, "C O"], Float[Array, "S O"], Float[Array, ""]]:
    """Double quantisation: (codes, second absmax, offset) of a whole weight's absmax (arXiv:2305.14314, section 3).

    Groups of 256 run along Hugging Face's order, outputs first, as in bitsandbytes. A group's absmax is repeated for
    each of its parts that are alike in every channel, S parts a channel, so that outputs can lie on several devices.
    """
    num_blocks, num_outputs = absmax.shape
    offset = _mean(absmax)
    centered = (absmax.T - offset).reshape(-1)
    num_groups = -(-centered.size // SECOND_BLOCK)
    groups = jnp.pad(centered, (0, num_groups * SECOND_BLOCK - centered.size)).reshape(num_groups, SECOND_BLOCK)
    second = jnp.max(jnp.abs(groups), axis=1)
    scaled = groups * _reciprocal(second)[:, None]
    codes = jnp.searchsorted(jnp.asarray(_midpoints(DYNAMIC_MAP)), scaled, side="left").astype(jnp.uint8)

    def by_channel(x: Array) -> Array:
        return x.reshape(-1)[: centered.size].reshape(num_outputs, num_blocks).T

    second = by_channel(jnp.broadcast_to(second[:, None], groups.shape))
    return by_channel(codes), second[:: math.gcd(num_blocks, SECOND_BLOCK)], offset


def dequantize(leaf: Weight, dtype: jnp.dtype) -> Float[Array, "*weight"]:
    """One layer's weight [*inputs, *outputs] in `dtype`; the arithmetic is in float32. An array is only cast."""
    if not isinstance(leaf, Quantized):
        return leaf.astype(dtype)
    if leaf.kind in CHANNEL_TYPES:
        scales = leaf.scales.reshape((1,) * len(leaf.inputs) + leaf.scales.shape)
        return (leaf.codes.astype(jnp.float32) * scales).astype(dtype)
    (num_blocks, *outputs), segments = leaf.scales.shape, leaf.second.shape[0]
    by_segment = _look_up(DYNAMIC_MAP, leaf.scales).reshape(segments, -1, *outputs)
    absmax = (by_segment * leaf.second[:, None] + leaf.offset).reshape(num_blocks, 1, *outputs)
    blocks = (_look_up(LEVELS[leaf.kind], unpack(leaf.codes)) * absmax).astype(dtype)
    return blocks.reshape(-1, *outputs)[: math.prod(leaf.inputs)].reshape(*leaf.inputs, *outputs)


def unfinished(leaf: Any) -> Any:
    """The shapes of a stacked leaf before `finish`, from those after it; an array's are its own."""
    if not isinstance(leaf, Quantized) or leaf.kind in CHANNEL_TYPES:
        return leaf
    absmax = jax.ShapeDtypeStruct(leaf.scales.shape, jnp.float32)
    return replace(leaf, scales=absmax, second=None, offset=None)


def map_axes(function: Callable[[Any, tuple], Any], leaf: Any, axes: tuple[str, ...]) -> Any:
    """`function(array, its logical axes)` of the array, or of each array of a stacked quantised leaf.

    Args:
      axes: the weight's own, the first of them `layers`.
    """
    if not isinstance(leaf, Quantized):
        return function(leaf, axes)
    layers, first, outputs = axes[0], axes[1], axes[1 + len(leaf.inputs) :]
    if leaf.kind in CHANNEL_TYPES:
        return replace(leaf, codes=function(leaf.codes, axes), scales=function(leaf.scales, (layers, *outputs)))
    leaf = replace(
        leaf,
        codes=function(leaf.codes, (layers, first, None, *outputs)),
        scales=function(leaf.scales, (layers, first, *outputs)),
    )
    if leaf.offset is None:
        return leaf
    # Small, and rarely as divisible as the blocks: whole on every device that has its outputs.
    second = function(leaf.second, (layers, None, *outputs))
    return replace(leaf, second=second, offset=function(leaf.offset, (layers,)))


def bytes_held(kind: str | None, dtype: jnp.dtype) -> float:
    """About what one weight takes, those of a base without quantisation being of `dtype`."""
    if kind is None:
        return dtype.itemsize
    return 1.0 if kind in CHANNEL_TYPES else 0.5 + 1.0 / BLOCK


def divides(kind: str | None, num_inputs: int, shards: int) -> bool:
    """Whether `num_inputs` inputs cut into `shards` runs of whole blocks: no block may lie on two devices."""
    return kind not in LEVELS or shards == 1 or num_inputs % (BLOCK * shards) == 0


def check_shards(kind: str | None, name: str, num_inputs: int, shards: int) -> None:
    """As `divides`, of projection `name`.

    Raises:
      ConfigError: they do not, and into how many they do.
    """
    if not divides(kind, num_inputs, shards):
        sizes = [n for n in range(1, max(1, num_inputs // BLOCK) + 1) if divides(kind, num_inputs, n)]
        raise ConfigError(
            f"model.quantization={kind} keeps the {num_inputs} inputs of {name} in blocks of {BLOCK}, which do not "
            f"divide over {shards} devices; over {', '.join(map(str, sizes))} they do, so change the mesh, or set "
            "model.quantization=int8"
        )


def check_device(kind: str | None, device: jax.Device) -> None:
    """fp8 wants hardware that converts it; the other kinds run anywhere, and a CPU computes all of them.

    Args:
      device: one of those that the run is for, here or absent.

    Raises:
      ConfigError: fp8 elsewhere.
    """
    if kind != "fp8" or device.platform == "cpu":
        return
    if device.platform in ("gpu", "cuda") and float(getattr(device, "compute_capability", 0)) >= 8.9:
        return
    raise ConfigError(
        f"model.quantization=fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper and later), not "
        f"{device.device_kind}; set model.quantization=int8, which takes as many bytes"
    )


def _reciprocal(x: Array) -> Array:
    """1 / x, and 0 where a block or channel is all zero."""
    return jnp.where(x > 0.0, 1.0 / jnp.where(x > 0.0, x, 1.0), 0.0)


def _mean(x: Array) -> Array:
    """The mean, added up in one fixed order: a last bit of it moves codes, which must not depend on the mesh."""
    total = jnp.pad(x.reshape(-1), (0, (1 << (x.size - 1).bit_length()) - x.size))
    while total.size > 1:
        total = total[: total.size // 2] + total[total.size // 2 :]
    return total[0] / x.size


def _midpoints(levels: np.ndarray) -> np.ndarray:
    return (levels[:-1] + levels[1:]) / np.float32(2.0)


def _look_up(table: np.ndarray, codes: Array) -> Array:
    """table[codes]. A gather, which XLA turns into a chain of selects on TPUs; selects written out by hand keep one
    array as large as the weight for each level, hoisted out of the scan."""
    return jnp.asarray(table).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")


def in_turn(leaf: Weight, y: Array, x: Array) -> tuple[Array, Array]:
    """`y`, made with `leaf`, and `x`, to be used after it: else the compiler dequantises two weights for one input
    at once. The backward pass goes the other way. Nothing changes where the leaf is an array."""
    return jax.lax.optimization_barrier((y, x)) if isinstance(leaf, Quantized) else (y, x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_einsum(equation: str, x: Float[Array, "B T *inputs"], leaf: Quantized) -> Float[Array, "B T *outputs"]:
    """`einsum(equation, x, dequantize(leaf))` in the dtype of `x`; the leaf has no gradient.

    The backward pass dequantises anew and needs nothing else, so that under no rematerialisation policy a dequantised
    weight waits for it.
    """
    # Else the compiler dequantises what comes later in the layer along with what comes now.
    leaf, x = jax.lax.optimization_barrier((leaf, x))
    return jnp.einsum(equation, x, dequantize(leaf, x.dtype))


def _forward(equation: str, x: Array, leaf: Quantized) -> tuple[Array, Quantized]:
    return quantized_einsum(equation, x, leaf), leaf


def _backward(equation: str, leaf: Quantized, dy: Array) -> tuple[Array, None]:
    # Else the compiler finds the weight that the recomputed forward pass dequantised, and keeps it until here.
    leaf, dy = jax.lax.optimization_barrier((leaf, dy))
    x_dims, w_dims, y_dims = equation.replace("->", ",").split(",")
    return jnp.einsum(f"{y_dims},{w_dims}->{x_dims}", dy, dequantize(leaf, dy.dtype)), None


quantized_einsum.defvjp(_forward, _backward)
