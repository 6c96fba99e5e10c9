"""Quantised weights: the published codes, the layout, how far off they are, gradients, and the refusals."""

import dataclasses
import math
from functools import partial
from unittest.mock import Mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import shape_of

from jlora.config import LoraSection
from jlora.errors import ConfigError
from jlora.model import quant
from jlora.model.adapter import project
from jlora.model.adapter_init import new_adapter
from jlora.model.attention import reference
from jlora.model.config import projection_shapes
from jlora.model.llama import abstract_decoder
from jlora.training.step import Forward

KINDS = ("int8", "fp8", "nf4", "int4")
FLOAT32 = jnp.dtype("float32")


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def coarse(*shape: int) -> np.ndarray:
    """Weights on a grid of 1/1024, so that float32 sums of them are exact whatever their order."""
    return (np.round(np.random.default_rng(1).standard_normal(shape) * 64) / 1024).astype(np.float32)


@partial(jax.jit, static_argnums=(1, 2))
def quantized(array, kind: str, num_inputs: int) -> quant.Quantized:
    return quant.quantize(array, kind, num_inputs)


def codes_of(leaf: quant.Quantized) -> np.ndarray:
    """The 4-bit codes in Hugging Face's layout [out, in]."""
    return np.asarray(quant.unpack(leaf.codes)).reshape(-1, leaf.codes.shape[-1])[: leaf.inputs[0]].T


def test_nf4_levels_are_the_papers():
    """Appendix E of arXiv:2305.14314, and made as its section 3 says: quantiles of N(0, 1), normalised."""
    paper = """-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0"""
    np.testing.assert_array_equal(quant.NF4_LEVELS, np.array([float(x) for x in paper.split(",")], np.float32))
    quantile = torch.distributions.Normal(0.0, 1.0).icdf
    offset = 0.9677083
    positive = quantile(torch.linspace(offset, 0.5, 9)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive.flip(0)])
    np.testing.assert_allclose(quant.NF4_LEVELS, levels / levels.max(), atol=2e-6)


def reference_nf4(hf: np.ndarray, offset: np.float32 | None = None) -> dict[str, np.ndarray]:
    """Independent NumPy of what QLoRA's code publishes: blocks of 64 in row-major order, nested blocks of 256."""
    blocks = hf.reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    levels = quant.NF4_LEVELS.astype(np.float64)
    codes = np.abs((blocks / absmax[:, None])[..., None] - levels).argmin(-1).astype(np.uint8)
    offset = absmax.mean() if offset is None else offset
    centered = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
    second = np.abs(centered).max(1)
    dynamic = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2**decade + 1)
        means = (edges[:-1] + edges[1:]) / 2
        dynamic += [*(10.0 ** (decade - 6) * means), *(-(10.0 ** (decade - 6)) * means)]
    dynamic = np.sort(np.array(dynamic))
    scaled = centered / second[:, None]
    scales = np.abs(scaled[..., None] - dynamic).argmin(-1)
    nested = (dynamic[scales] * second[:, None]).reshape(-1)[: len(absmax)] + offset
    distance = np.abs(scaled[..., None] - (dynamic[1:] + dynamic[:-1]) / 2).min(-1).reshape(-1)[: len(absmax)]
    return {
        "codes": codes.reshape(hf.shape),
        "scales": scales.reshape(-1)[: len(absmax)],
        "second": second,
        "offset": offset,
        "distance": distance,
        "dequantized": (levels[codes] * nested[:, None]).reshape(hf.shape),
    }


@pytest.mark.long
@pytest.mark.parametrize("shape", [(128, 64), (1024, 576), (96, 11008), (512, 1536), (10, 8192)])
def test_nf4_equals_an_independent_reading_of_the_definition(shape):
    hf = coarse(*shape)
    ours, right = quantized(hf.T, "nf4", 1), reference_nf4(hf)
    np.testing.assert_array_equal(codes_of(ours), right["codes"])
    np.testing.assert_allclose(ours.offset, right["offset"], rtol=1e-6)
    # On a midpoint of the dynamic map, the last bit of the offset decides.
    clear = right["distance"] > 1e-6
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(ours.scales).T.reshape(-1)[clear], right["scales"][clear])
    blocks = shape[1] // 64
    second = np.repeat(np.asarray(ours.second).T.reshape(shape[0], -1), blocks // ours.second.shape[0], 1)
    np.testing.assert_allclose(second.reshape(-1), np.repeat(right["second"], 256)[: second.size], rtol=1e-5)
    whole = np.repeat(clear.reshape(shape[0], blocks), 64, 1)
    found = np.asarray(quant.dequantize(ours, FLOAT32)).T
    np.testing.assert_allclose(found[whole], right["dequantized"][whole], rtol=1e-5, atol=1e-8)


class Nf4(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_codes_are_the_same_compiled_and_op_by_op(self):
        hf = coarse(128, 64)
        ours = self.variant(partial(quant.quantize, kind="nf4", num_inputs=1))(jnp.asarray(hf.T))
        right = reference_nf4(hf)
        np.testing.assert_array_equal(codes_of(ours), right["codes"])
        found = self.variant(partial(quant.dequantize, dtype=FLOAT32))(ours)
        np.testing.assert_allclose(np.asarray(found).T, right["dequantized"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("shape", [(128, 64), (1024, 576), (96, 11008), (512, 1536)])
def test_nf4_equals_bitsandbytes(shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    hf = coarse(*shape)
    packed, state = functional.quantize_4bit(
        torch.from_numpy(hf), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    packed = packed.numpy().reshape(-1)
    ours = quantized(hf.T, "nf4", 1)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(shape)
    np.testing.assert_array_equal(codes_of(ours), codes)
    np.testing.assert_array_equal(quant.DYNAMIC_MAP, state.state2.code.numpy())
    np.testing.assert_allclose(ours.offset, state.offset, rtol=1e-6)
    # Its kernel for CPUs looks the nested codes up in a coarser table, and misses the nearest very near a midpoint.
    scales, theirs = np.asarray(ours.scales).T.reshape(-1), state.absmax.numpy()
    near = reference_nf4(hf)["distance"] < 2e-5
    np.testing.assert_array_equal(scales[~near], theirs[~near])
    assert np.abs(scales.astype(int) - theirs).max() <= 1 and (scales != theirs).mean() < 0.005
    equal = np.repeat((scales == theirs).reshape(shape[0], -1), 64, 1)
    found = np.asarray(quant.dequantize(ours, FLOAT32)).T
    dequantized = functional.dequantize_4bit(packed_tensor(packed), state).numpy()
    np.testing.assert_allclose(found[equal], dequantized[equal], rtol=1e-6, atol=1e-9)


def packed_tensor(packed: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(packed.copy()).reshape(-1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_error_is_bounded_by_the_levels(kind):
    w = weight(576, 384)
    found = np.asarray(quant.dequantize(quantized(w, kind, 1), FLOAT32))
    error = np.abs(found - w)
    channel = np.abs(w).max(0)
    block = np.repeat(np.abs(w).reshape(9, 64, -1).max(1), 64, 0)
    if kind == "int8":
        assert (error <= channel / 254 * 1.0001).all()
    elif kind == "fp8":  # three bits of mantissa, subnormals of 2^-9 of a scale of channel / 448
        assert (error <= np.maximum(np.abs(w) / 16, channel / 448 * 2**-10) * 1.0001).all()
    else:
        levels = quant.LEVELS[kind]
        # Half the widest gap, and the second quantisation of the absmax: at most a dynamic-map step of their spread.
        spread = block.max() - block.min()
        assert (error <= block * np.diff(levels).max() / 2 + spread / 64).all()
    ratio = {"int8": 0.008, "fp8": 0.03, "nf4": 0.1, "int4": 0.12}[kind]
    assert ratio / 2 < np.sqrt((error**2).mean()) / w.std() < ratio


def test_round_trip_error_of_nf4_is_the_published_one():
    """Of N(0, 1) in blocks of 64: mean absolute error 0.072792, mean relative error 0.203299, which bitsandbytes
    publishes as the averages of 1,000 samples in tests/test_functional.py, test_4bit_quant."""
    w = np.random.default_rng(0).standard_normal((1024, 2048)).astype(np.float32)
    codes, absmax = jax.jit(quant.block_codes, static_argnums=1)(w, "nf4")
    levels = quant.NF4_LEVELS[np.asarray(quant.unpack(codes))]
    error = np.abs((levels * np.asarray(absmax)[:, None]).reshape(w.shape) - w)
    assert error.mean() == pytest.approx(0.072792, abs=1e-4)
    assert (error / (np.abs(w) + 1e-8)).mean() == pytest.approx(0.203299, abs=1e-3)
    # Quantising the absmax too costs next to nothing.
    nested = np.abs(np.asarray(quant.dequantize(quantized(w, "nf4", 1), FLOAT32)) - w)
    assert error.mean() < nested.mean() < 1.005 * error.mean()


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind):
    w = weight(128, 96)
    w[64:, :7] = 0.0
    w[:, 50] = 0.0
    found = np.asarray(quant.dequantize(quantized(w, kind, 1), FLOAT32))
    assert np.isfinite(found).all() and not found[:, 50].any() and not found[64:, :7].any()
    assert not np.asarray(quant.dequantize(quantized(np.zeros((64, 4), np.float32), kind, 1), FLOAT32)).any()


def test_round_trip_error_of_nf4_is_what_follows_from_its_levels():
    """Of N(0, 1): RMS 0.0920, and mean absolute 0.0728, which bitsandbytes publishes (0.072792, the average of 1,000
    samples in blocks of 64, tests/test_functional.py, test_4bit_quant).

    The distribution of what a code is chosen for depends on the block's size (arXiv:2306.06965): integrated here over
    the density of the largest of 64 normals and that of the other 63, which are truncated there; the largest is exact.
    """
    levels, x, largest = quant.NF4_LEVELS.astype(float), np.linspace(-1, 1, 8001), np.linspace(0.8, 7, 621)[:, None]
    cell = (x[1] - x[0]) * (largest[1] - largest[0])
    error = np.abs(x[:, None] - levels).min(1) * largest
    density = lambda z: np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)  # noqa: E731
    inside = np.vectorize(math.erf)(largest / np.sqrt(2))
    # 64 places for the largest of either sign, and a share of 63 / 64 for the others.
    weights = cell * 63 * inside**62 * 2 * density(largest) * density(largest * x) * largest
    rms, mean = np.sqrt((weights * error**2).sum()), (weights * error).sum()
    assert mean == pytest.approx(0.072792, abs=1e-5) and rms == pytest.approx(0.09198, abs=1e-5)
    w = np.random.default_rng(0).standard_normal((2048, 1024)).astype(np.float32)
    codes, absmax = jax.jit(quant.block_codes, static_argnums=1)(w, "nf4")
    once = (quant.NF4_LEVELS[np.asarray(quant.unpack(codes))] * np.asarray(absmax)[:, None]).reshape(w.shape) - w
    twice = np.asarray(quant.dequantize(quantized(w, "nf4", 1), FLOAT32)) - w
    for figure, right in ((lambda x: np.sqrt((x**2).mean()), rms), (lambda x: np.abs(x).mean(), mean)):
        assert figure(once) == pytest.approx(right, rel=5e-4)
        # Quantising the absmax too adds a little.
        assert figure(once) < figure(twice) < 1.002 * figure(once)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs, outputs", [((128,), (4, 10)), ((4, 32), (6,)), ((172,), (8,)), ((6, 10), (48,))])
def test_a_weight_projects_as_the_dequantised_hugging_face_tensor(kind, inputs, outputs):
    """Dims apart or together, blocks over head dims, and a short last block: the same numbers in the same places."""
    hf = weight(int(np.prod(outputs)), int(np.prod(inputs)))
    flat = np.asarray(quant.dequantize(quantized(hf.T, kind, 1), FLOAT32))
    leaf = quantized(hf.T.reshape(*inputs, *outputs), kind, len(inputs))
    x = weight(1, 3, *inputs, seed=5)
    ins, outs = "ijk"[: len(inputs)], "xyz"[: len(outputs)]
    y = project(f"bt{ins},{ins}{outs}->bt{outs}", jnp.asarray(x), leaf, None, None)
    np.testing.assert_allclose(np.asarray(y).reshape(3, -1), x.reshape(3, -1) @ flat, rtol=0, atol=1e-6)


def test_a_short_last_block_has_an_absmax_of_its_own():
    w = weight(172, 3)
    w[128:] *= 100.0
    found = np.asarray(quant.dequantize(quantized(w, "nf4", 1), FLOAT32))
    assert np.abs(found - w)[:128].max() < 0.05 and found[128:].max() > 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_the_projection(kind):
    """Of the input and of the adapter, as with the dequantised weight, under every rematerialisation."""
    leaf = quantized(weight(128, 4, 16), kind, 1)
    dense = quant.dequantize(leaf, FLOAT32)
    section = LoraSection(rank=4, target_modules=["q_proj"])
    small = dataclasses.replace(MID, hidden_size=128, num_attention_heads=4, head_dim=16, num_hidden_layers=1)
    lora = jax.tree.map(lambda x: x[0], new_adapter(section, small, 0)["q_proj"])
    lora = jax.tree.map(lambda x: x + 0.01, lora)
    x = jnp.asarray(weight(2, 5, 128, seed=3)) * 50

    def loss(x, lora, w):
        return jnp.sin(project("btd,dnh->btnh", x, w, lora, None)).sum()

    for wrap in (lambda f: f, jax.checkpoint):
        found = jax.jit(jax.grad(wrap(loss), argnums=(0, 1)))(x, lora, leaf)
        right = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, lora, dense)
        chex.assert_trees_all_close(found, right, rtol=1e-5, atol=1e-6)
        assert all(np.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(right))


def test_bits_a_weight():
    """4.13 with double quantisation at the widths of real models; four-bit codes are packed in device memory."""
    shape = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    bits = {}
    for kind in KINDS:
        out = jax.jit(quant.quantize, static_argnums=(1, 2)).lower(shape, kind, 1).compile().memory_analysis()
        bits[kind] = out.output_size_in_bytes * 8 / 4096**2
    assert bits["nf4"] == bits["int4"] == pytest.approx(4.13, abs=0.01)
    assert bits["int8"] == bits["fp8"] == pytest.approx(8.01, abs=0.01)


MID = shape_of(1024, 2816, layers=8, heads=8, kv_heads=4, vocab_size=512)


def temporary_bytes(kind: str | None, remat: str) -> int:
    """What the gradient of a step takes beside its arguments, as compiled for this CPU."""
    decoder = abstract_decoder(MID, FLOAT32, kind)
    section = LoraSection(rank=4)
    adapter = jax.eval_shape(lambda: new_adapter(section, MID, 0))
    batch = {name: jax.ShapeDtypeStruct((1, 64), jnp.int32) for name in ("tokens", "targets", "segments", "positions")}
    batch["weights"] = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    forward = Forward(reference, remat, FLOAT32)
    gradient = jax.grad(lambda a, base, batch: forward.loss(base, a, batch, None)[0])
    return jax.jit(gradient).lower(adapter, decoder, batch).compile().memory_analysis().temp_size_in_bytes


# Not fp8: a CPU has no such type, and XLA widens the whole stack for it before the scan. On GPUs it does not (docs).
@pytest.mark.long
@pytest.mark.parametrize(("kind", "remat"), [("nf4", "full"), ("int4", "none"), ("int8", "lean")])
def test_no_dequantised_weight_outlives_its_layer(kind, remat):
    inputs_outputs = projection_shapes(MID).values()
    layer = 4 * sum(int(np.prod(ins)) * int(np.prod(outs)) for ins, outs in inputs_outputs)
    assert temporary_bytes(kind, remat) <= temporary_bytes(None, remat) + layer


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError) as refused:
        quant.check_shards("nf4", "down_proj", 11008, 8)
    message = str(refused.value)
    assert all(part in message for part in ("nf4", "11008", "down_proj", "blocks of 64", "8 devices", "1, 2, 4, 43"))
    quant.check_shards("nf4", "down_proj", 11008, 4)
    quant.check_shards("int8", "down_proj", 11008, 8)
    quant.check_shards("nf4", "down_proj", 172, 1)


def test_fp8_is_refused_where_the_hardware_lacks_it():
    def device(platform: str, capability: str) -> Mock:
        return Mock(jax.Device, platform=platform, compute_capability=capability, device_kind="that card")

    for platform, capability in (("gpu", "8.0"), ("cuda", "7.5"), ("tpu", "0")):
        with pytest.raises(ConfigError, match="8.9 or more.*that card.*int8"):
            quant.check_device("fp8", device(platform, capability))
    quant.check_device("fp8", device("gpu", "8.9"))
    quant.check_device("fp8", device("cuda", "9.0"))
    quant.check_device("nf4", device("tpu", "0"))
