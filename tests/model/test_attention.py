"""Attention kernels against the reference, as far as a CPU can run them, and what is chosen where.

splash runs here in Pallas's interpreter. cuDNN does not run without a GPU: the call is answered by XLA, and
the program is compiled for an absent GPU where JAX's CUDA plugin is installed.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_gpu_compiler

from jlora.errors import ConfigError
from jlora.model import attention
from jlora.model.attention import gpu, tiles, tpu

ROOT = Path(__file__).parents[2]


def packed_rows(rng, batch, length, most):
    """Segment ids [B T] of rows of up to `most` examples, most of them with padding; and positions."""
    segments, positions = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for row in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, length + 1), rng.integers(0, most + 1), replace=False))
        for number, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=False), 1):
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    for row in range(batch):  # padding: the model gives it position 0 throughout
        positions[row, segments[row] == 0] = 0
    return segments, positions


def random_qkv(rng, batch, length, heads, kv_heads, head_dim):
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def outputs_and_gradients(kernel, qkv, weights):
    """out, dq, dk and dv of a loss over the weighted outputs."""

    def loss(q, k, v):
        out = kernel(q, k, v)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return out, *gradients


def assert_equals_reference(kernel, qkv, segments, positions, window, tolerance, softcap=None):
    """Forward and backward, float32, wherever there is a token."""
    draw = np.random.default_rng(2)
    weights = draw.standard_normal(qkv[0].shape).astype(np.float32) * (segments > 0)[:, :, None, None]
    rows = attention.Places(*map(jnp.asarray, (segments, segments, positions, positions))), window, softcap
    ours = outputs_and_gradients(lambda q, k, v: kernel(q, k, v, *rows), qkv, weights)
    theirs = outputs_and_gradients(lambda q, k, v: attention.reference(q, k, v, *rows), qkv, weights)
    for name, found, expected in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        found, expected = np.asarray(found), np.asarray(expected)
        assert np.isfinite(found).all(), name
        np.testing.assert_allclose(found[segments > 0], expected[segments > 0], atol=tolerance, err_msg=name)


class Attention(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_reference_and_tiles_are_softmax_over_a_segment(self):
        rng = np.random.default_rng(3)
        segments, positions = packed_rows(rng, 2, 150, 4)
        qkv = random_qkv(rng, 2, 150, 4, 2, 8)
        q, k, v = (np.repeat(x, 4 // x.shape[2], axis=2).astype(np.float64) for x in qkv)
        unseen = (segments[:, :, None] != segments[:, None]) | (np.arange(150)[:, None] < np.arange(150))
        scores = np.einsum("btnh,bsnh->bnts", q, k) * 8**-0.5 - 1e9 * unseen[:, None]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
        places = attention.Places(*map(jnp.asarray, (segments, segments, positions, positions)))
        arguments = [*map(jnp.asarray, qkv), places]
        for kernel in (attention.reference, attention.blocked):
            found = np.asarray(self.variant(partial(kernel, window=None))(*arguments))
            np.testing.assert_allclose(found[segments > 0], expected[segments > 0], rtol=0, atol=1e-5)


# cuDNN


@pytest.fixture
def asked(monkeypatch):
    """What cuDNN is asked for, answered by XLA: (queries, keys, whether causal, its window, whether masked)."""
    calls = []
    ask = jax.nn.dot_product_attention

    def answer(q, k, v, *, implementation, mask=None, local_window_size=None, is_causal):
        assert implementation == "cudnn"
        calls.append((q.shape[1], k.shape[1], is_causal, local_window_size, mask is not None))
        return ask(
            *(q, k, v), mask=mask, local_window_size=local_window_size, is_causal=is_causal, implementation="xla"
        )

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return calls


@pytest.mark.parametrize(
    ("window", "longest", "expected"),
    [
        (None, 192, {(192, 192, True, None, True)}),
        (40, 192, {(192, 192, True, None, True)}),
        (None, 128, {(64, 64, True, None, True), (64, 128, False, None, True), (64, 192, False, None, True)}),
        # With a window of 60 queries from 128 on look back no farther than 69: 64, a whole step.
        (60, 128, {(64, 64, True, None, True), (64, 128, False, None, True)}),
    ],
    ids=["one mask", "one mask, window", "blocks", "blocks, window"],
)
def test_cudnn_equals_the_reference_over_packed_rows(window, longest, expected, asked, monkeypatch):
    monkeypatch.setattr(gpu, "MAX_MASKED_LENGTH", longest)
    monkeypatch.setattr(gpu, "QUERY_BLOCK", 64)
    rng = np.random.default_rng(0)
    segments, positions = packed_rows(rng, 3, 192, 6)
    segments[1], positions[1] = 1, np.arange(192)  # one whole row
    qkv = random_qkv(rng, 3, 192, 4, 2, 8)
    assert_equals_reference(attention.cudnn, qkv, segments, positions, window, 1e-5)
    assert set(asked) == expected


@pytest.mark.parametrize("window", [None, 1, 20, 64, 65])
def test_cudnn_needs_no_mask_where_a_row_is_one_segment(window, asked):
    rng = np.random.default_rng(3)
    lengths = np.array([64, 33, 1, 0])
    segments = (np.arange(64)[None] < lengths[:, None]).astype(np.int32)
    positions = np.arange(64, dtype=np.int32)[None] * segments
    qkv = random_qkv(rng, 4, 64, 4, 2, 8)
    assert_equals_reference(attention.cudnn_one_segment, qkv, segments, positions, window, 1e-5)
    assert set(asked) == {(64, 64, True, (window - 1, 0) if window and window < 64 else None, False)}


# Splash


@pytest.mark.long
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "softcap"),
    [(4, 2, 128, None, None), (2, 2, 64, None, None), (4, 2, 64, 100, None), (2, 1, 64, 1, None), (2, 1, 256, 60, 2.0)],
    ids=["grouped", "head dim 64", "window", "window of one", "head dim 256 and a soft cap"],
)
def test_splash_equals_the_reference_forward_and_backward(heads, kv_heads, head_dim, window, softcap, monkeypatch):
    monkeypatch.setattr(tpu, "MAX_SPLASH_BLOCK", 128)  # several blocks
    rng = np.random.default_rng(1)
    segments, positions = packed_rows(rng, 2, 256, 5)
    segments[1], positions[1] = 1, np.arange(256)  # one whole row
    qkv = random_qkv(rng, 2, 256, heads, kv_heads, head_dim)

    def splash(q, k, v, places, window, softcap):
        return tpu._splash_rows(q, k, v, jnp.asarray(places.q_segments), window, softcap, interpret=True)

    assert_equals_reference(splash, qkv, segments, positions, window, 1e-4, softcap)


# Tile by tile


@pytest.mark.parametrize("window", [None, 2, 40])
@pytest.mark.parametrize("heads, kv_heads, length", [(4, 2, 128), (3, 3, 101), (4, 1, 20)])
def test_blocked_equals_the_reference_forward_and_backward(heads, kv_heads, length, window, monkeypatch):
    """Several tiles, a length that they do not divide, a row in one segment, one that is all padding, a window."""
    monkeypatch.setattr(tiles, "TILE", 32)
    rng = np.random.default_rng(length)
    segments, positions = packed_rows(rng, 5, length, 6)
    segments[1], positions[1] = 1, np.arange(length)
    segments[2], positions[2] = 0, 0
    qkv = random_qkv(rng, 5, length, heads, kv_heads, 8)
    assert_equals_reference(attention.blocked, qkv, segments, positions, window, 1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_blocked_has_soft_caps(window, monkeypatch):
    """Tight enough to bend most scores."""
    monkeypatch.setattr(tiles, "TILE", 32)
    rng = np.random.default_rng(5)
    segments, positions = packed_rows(rng, 2, 101, 3)
    qkv = random_qkv(rng, 2, 101, 4, 2, 8)
    assert_equals_reference(attention.blocked, qkv, segments, positions, window, 1e-5, softcap=0.7)
    places = attention.Places(*map(jnp.asarray, (segments, segments, positions, positions)))
    capped, free = (attention.reference(*map(jnp.asarray, qkv), places, window, cap) for cap in (0.7, None))
    assert np.abs(capped - free)[segments > 0].max() > 0.1


def test_blocked_does_not_visit_tiles_that_see_nothing(monkeypatch):
    """NaN in another segment's keys, two tiles away, is never read."""
    monkeypatch.setattr(tiles, "TILE", 16)
    segments = np.repeat([[1, 2, 3, 3]], 16, axis=1)
    q, k, v = random_qkv(np.random.default_rng(2), 1, 64, 2, 2, 8)
    k[:, :16] = v[:, :16] = np.nan

    def run(window, weights):
        rows = attention.Places(*[jnp.asarray(segments)] * 4), window
        return outputs_and_gradients(lambda q, k, v: attention.blocked(q, k, v, *rows), (q, k, v), weights)

    out, dq, dk, _ = run(None, (segments > 2).astype(np.float32)[..., None, None])
    assert np.isnan(out[:, :16]).all() and np.isfinite(out[:, 16:]).all()
    assert np.isfinite(dq[:, 16:]).all() and np.isfinite(dk[:, 32:]).all()
    # The same by the window: keys of two tiles before are out of sight.
    segments[:] = 1
    out, *_ = run(16, 1.0)
    assert np.isfinite(out[:, 32:]).all() and np.isnan(out[:, 16:31]).all()


def test_blocked_holds_no_scores_of_a_long_row():
    """32,768 tokens: the scores of one head alone are 4 GiB; what is held grows with the tokens, not their square."""

    def temporary(length: int) -> int:
        shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.bfloat16)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(q, k, v, segments):
            rows = attention.Places(segments, segments, segments, segments), None
            return attention.blocked(q, k, v, *rows).astype(jnp.float32).sum()

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, segments)
        return gradient.compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(4096), temporary(32768)
    assert long < 8 * short + 2**20 and long < 2**26


# Choice

CPU = Mock(jax.Device, platform="cpu")
TPU = Mock(jax.Device, platform="tpu")
GPU = Mock(jax.Device, platform="gpu", compute_capability="8.9")
TURING = Mock(jax.Device, platform="gpu", compute_capability="7.5")  # a T4's
BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


@pytest.mark.parametrize(
    ("device", "head_dim", "length", "dtype", "expected"),
    [
        (CPU, 128, 4096, BF16, attention.blocked_finely),
        (TPU, 128, 4096, BF16, attention.splash),
        (TPU, 64, 128, F32, attention.splash),
        (TPU, 128, 4000, BF16, attention.blocked),
        (TPU, 80, 4096, BF16, attention.blocked),
        (GPU, 128, 4096, BF16, attention.cudnn),
        (GPU, 64, 320, jnp.dtype("float16"), attention.cudnn),
        (GPU, 128, 4096, F32, attention.blocked),
        (GPU, 256, 4096, BF16, attention.blocked),
        (GPU, 100, 4096, BF16, attention.blocked),
        (GPU, 128, 100, BF16, attention.blocked),
        (TURING, 128, 4096, BF16, attention.blocked),
    ],
)
def test_auto_takes_what_runs(device, head_dim, length, dtype, expected):
    shown, kernel = attention.choose("auto", device, head_dim, length, dtype, False)
    assert kernel is expected
    fell_back = device is not CPU and expected is attention.blocked
    assert ("because" in shown) == fell_back and "\n" not in shown
    assert attention.choose("reference", device, head_dim, length, dtype, False) == ("reference", attention.reference)


def test_tiles_on_a_cpu_are_fine_but_for_long_rows_of_one_segment():
    for length, one_segment, expected in ((1024, True, "finely"), (1025, True, ""), (4096, False, "finely")):
        kernel = attention.blocked_finely if expected else attention.blocked
        assert attention.choose("auto", CPU, 64, length, F32, one_segment)[1] is kernel
        assert attention.choose("auto", GPU, 64, length, F32, one_segment)[1] is attention.blocked


def test_only_kernels_with_soft_caps_are_taken_for_them():
    for device, kernel in ((GPU, attention.blocked), (TPU, attention.splash), (CPU, attention.blocked_finely)):
        assert attention.choose("auto", device, 256, 4096, BF16, False, 50.0)[1] is kernel
    with pytest.raises(ConfigError, match="cudnn needs a model whose attention has no soft cap"):
        attention.choose("cudnn", GPU, 128, 4096, BF16, False, 50.0)


def test_rows_of_one_segment_need_no_mask():
    for name in ("auto", "cudnn"):
        assert attention.choose(name, GPU, 128, 4096, BF16, one_segment=False) == ("cudnn", attention.cudnn)
        chosen = attention.choose(name, GPU, 128, 4096, BF16, one_segment=True)
        assert chosen == ("cudnn", attention.cudnn_one_segment)


@pytest.mark.parametrize(
    ("name", "device", "length", "dtype", "says"),
    [
        ("splash", CPU, 4096, BF16, "needs a TPU (here cpu"),
        ("cudnn", CPU, 4096, BF16, "needs a GPU (here cpu"),
        ("cudnn", TPU, 4096, BF16, "set model.attention to auto or splash or blocked or reference"),
        ("splash", GPU, 4096, BF16, "set model.attention to auto or cudnn or blocked or reference"),
        ("cudnn", GPU, 4096, F32, "needs model.dtype bfloat16"),
        ("cudnn", TURING, 4096, BF16, "needs compute capability 8.0"),
        ("splash", TPU, 100, BF16, "length that is a multiple of 128"),
    ],
)
def test_by_name_what_does_not_run_is_refused(name, device, length, dtype, says):
    with pytest.raises(ConfigError) as error:
        attention.choose(name, device, 128, length, dtype, False)
    assert says in str(error.value)


# The program for a GPU

GPU_PROGRAM = """
import os
os.environ.update(JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", XLA_FLAGS="--xla_gpu_autotune_level=0")
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jlora.model import attention
from jlora.model.sharding import MESH_AXES
from jlora.planning.program import Program
from jlora.runtime import private_jax
import numpy as np
target = '''gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "H100"'''
devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x4").devices
mesh = Mesh(np.array(devices).reshape(1, 2, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
def grads(q, k, v, segments):
    def loss(q, k, v):
        return attention.cudnn(q, k, v, attention.Places(*[segments] * 4), None).astype(jnp.float32).sum()
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
def arg(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
def compiled(rows, length):
    spec = P("fsdp", "context", "tensor", None)
    q, k = (arg((rows, length, n, 128), jnp.bfloat16, spec) for n in (8, 2))
    with jax.set_mesh(mesh), private_jax.gpu_is_cuda():
        return jax.jit(grads).lower(q, k, k, arg((rows, length), jnp.int32, P("fsdp", None))).compile().as_text()
text = compiled(4, 512)
of_the_mask = "bf16[2,1,512,512]{3,2,1,0}, u8[0]" in text  # its gradient, before the workspace
print(text.count('custom_call_target="__cudnn$fmha'), "all-gather" in text, "[2,512,4,128]" in text, of_the_mask)
mesh = Mesh(mesh.devices.reshape(1, 1, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
text = compiled(16, 8192)  # so large that XLA makes no one collective of two
names = [each.name for each in Program(text).operations() if each.sent == 16 * 8192 * 128 * 2 / 2]
print(text.count('custom_call_target="__cudnn$fmha'), *(str(names).count(kind) for kind in ("gather", "scatter")))
"""


@needs_gpu_compiler
def test_cudnn_compiles_for_an_absent_gpu():
    """Forward and backward over a mesh become cuDNN calls on a device's own rows and heads; no mask has a gradient.

    Where two devices have parts of each row, either's branch has calls for its two chunks, keys and values are gathered
    in either pass, and their gradients scattered. The planner counts each.
    """
    done = subprocess.run(
        [sys.executable, "-c", GPU_PROGRAM],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, split = map(str.split, done.stdout.splitlines())
    assert whole == ["2", "False", "True", "False"]
    assert split == [str(2 * 2 * 2), "4", "2"]
