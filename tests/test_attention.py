"""Attention kernels against the reference, as far as a CPU can run them, and what is chosen where.

splash runs here in Pallas's interpreter. cuDNN does not run without a GPU: what it would be told is
replayed in NumPy, and the program is compiled for an absent one where JAX's CUDA plugin is installed.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import attention
from jlora.config import MAX_SEGMENTS
from jlora.errors import ConfigError

ROOT = Path(__file__).parents[1]


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


# Segment offsets


@pytest.mark.parametrize("seed", range(5))
def test_segment_bounds_are_those_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    num = 9
    segments, _ = packed_rows(rng, 7, 50, num - 1)
    starts, lengths = map(np.asarray, jax.jit(attention.segment_bounds, static_argnums=1)(segments, num))
    assert starts.dtype == lengths.dtype == np.int32
    for row in range(7):
        runs = []
        for t in range(50):
            if t == 0 or segments[row, t] != segments[row, t - 1]:
                runs.append([t, 0])
            runs[-1][1] += 1
        runs += [[-1, -1]] * (num - len(runs))
        np.testing.assert_array_equal(np.stack([starts[row], lengths[row]], 1), runs)


def test_segment_bounds_at_the_edges():
    bounds = attention.segment_bounds(jnp.array([[0, 0, 0], [1, 1, 1], [1, 2, 3]]), 3)
    np.testing.assert_array_equal(bounds[0], [[0, -1, -1], [0, -1, -1], [0, 1, 2]])
    np.testing.assert_array_equal(bounds[1], [[3, -1, -1], [3, -1, -1], [1, 1, 1]])
    # More places than tokens.
    np.testing.assert_array_equal(attention.segment_bounds(jnp.array([[1, 2]]), 5)[0], [[0, 1, -1, -1, -1]])


def test_what_cudnn_is_told_gives_attention_over_packed_rows(monkeypatch):
    """Replays the sequence lengths and element offsets that reach cuDNN over flat buffers."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    rng = np.random.default_rng(0)
    segments, positions = packed_rows(rng, 3, 64, 6)
    q, k, v = random_qkv(rng, 3, 64, 4, 2, 8)
    told = {}

    def record(q, k, v, **arguments):
        told.update(arguments, q=q, k=k, v=v)
        return q

    monkeypatch.setattr(fused, "dot_product_attention", record)
    attention.cudnn(*map(jnp.asarray, (q, k, v)), segments, segments, positions, positions)
    assert told["mask_type"] is fused.MaskType.PADDING_CAUSAL and told["q_offsets"].shape == (3, MAX_SEGMENTS + 2)
    lengths, _, starts, kv_starts = (
        np.asarray(x).ravel()
        for x in fused._fix_seqlen_offsets(
            *(told[n] for n in ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")), told["q"], told["k"]
        )
    )
    np.testing.assert_array_equal(starts, kv_starts)
    flat_q, flat_k, flat_v = (np.asarray(told[n]).ravel() for n in "qkv")
    out, written = np.zeros_like(flat_q), np.zeros_like(flat_q)
    for start, length in zip(starts, lengths, strict=False):
        here = slice(start, start + length * 4 * 8)
        one_q, one_k, one_v = (x[here].reshape(length, 4, 8) for x in (flat_q, flat_k, flat_v))
        scores = np.einsum("tnh,snh->nts", one_q, one_k) * told["scale"]
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        weights = np.asarray(jax.nn.softmax(scores, axis=-1))
        out[here] = np.einsum("nts,snh->tnh", weights, one_v).ravel()
        written[here] += 1
    assert (written == 1).all()  # no output is left as it was found, and none is written twice
    expected = attention.reference(*map(jnp.asarray, (q, k, v)), segments, segments, positions, positions)
    trained = segments > 0
    np.testing.assert_allclose(out.reshape(q.shape)[trained], np.asarray(expected)[trained], atol=1e-5)


# Splash


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 128), (2, 2, 64)], ids=["grouped", "head dim 64"])
def test_splash_equals_the_reference_forward_and_backward(heads, kv_heads, head_dim, monkeypatch):
    monkeypatch.setattr(attention, "MAX_SPLASH_BLOCK", 128)  # several blocks
    rng = np.random.default_rng(1)
    segments, positions = packed_rows(rng, 2, 256, 5)
    segments[1], positions[1] = 1, np.arange(256)  # one whole row
    qkv = random_qkv(rng, 2, 256, heads, kv_heads, head_dim)
    weights = rng.standard_normal(qkv[0].shape).astype(np.float32) * (segments > 0)[:, :, None, None]

    def run(kernel):
        def loss(q, k, v):
            out = kernel(q, k, v)
            return jnp.sum(out * weights), out

        (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
        return out, *gradients

    ours = run(partial(attention._splash_rows, segments=jnp.asarray(segments), interpret=True))
    rows = dict(q_segments=segments, kv_segments=segments, q_positions=positions, kv_positions=positions)
    theirs = run(partial(attention.reference, **rows))
    for name, found, expected in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        found, expected = np.asarray(found), np.asarray(expected)
        assert np.isfinite(found).all(), name
        np.testing.assert_allclose(found[segments > 0], expected[segments > 0], atol=1e-4, err_msg=name)


# Choice

CPU = SimpleNamespace(platform="cpu")
TPU = SimpleNamespace(platform="tpu")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0")
BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


@pytest.mark.parametrize(
    ("device", "head_dim", "length", "dtype", "expected"),
    [
        (CPU, 128, 4096, BF16, attention.reference),
        (TPU, 128, 4096, BF16, attention.splash),
        (TPU, 64, 128, F32, attention.splash),
        (TPU, 128, 4000, BF16, attention.reference),
        (TPU, 80, 4096, BF16, attention.reference),
        (H100, 128, 4096, BF16, attention.cudnn),
        (H100, 64, 320, jnp.dtype("float16"), attention.cudnn),
        (A100, 128, 4096, BF16, attention.cudnn_masked),
        (H100, 128, 4096, F32, attention.reference),
        (H100, 256, 4096, BF16, attention.reference),
        (H100, 100, 4096, BF16, attention.reference),
        (H100, 128, 100, BF16, attention.reference),
    ],
)
def test_auto_takes_what_runs(device, head_dim, length, dtype, expected):
    shown, kernel = attention.choose("auto", device, head_dim, length, dtype)
    assert kernel is expected
    fell_back = device is not CPU and expected is attention.reference
    assert ("because" in shown) == fell_back and "\n" not in shown
    assert attention.choose("reference", device, head_dim, length, dtype) == ("reference", attention.reference)


@pytest.mark.parametrize(
    ("name", "device", "length", "dtype", "says"),
    [
        ("splash", CPU, 4096, BF16, "needs a TPU (here cpu"),
        ("cudnn", CPU, 4096, BF16, "needs a GPU (here cpu"),
        ("cudnn", TPU, 4096, BF16, "set model.attention to auto or splash or reference"),
        ("splash", H100, 4096, BF16, "set model.attention to auto or cudnn or reference"),
        ("cudnn", H100, 4096, F32, "needs model.dtype bfloat16"),
        ("splash", TPU, 100, BF16, "length that is a multiple of 128"),
    ],
)
def test_by_name_what_does_not_run_is_refused(name, device, length, dtype, says):
    with pytest.raises(ConfigError) as error:
        attention.choose(name, device, 128, length, dtype)
    assert says in str(error.value)


# The program for a GPU

GPU = """
import os, sys
os.environ.update(JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", XLA_FLAGS="--xla_gpu_autotune_level=0")
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jax._src import xla_bridge
from jax._src.cudnn import fused_attention_stablehlo as fused
from jlora import attention
import numpy as np
target = '''gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 9 }
device_description_str: "H100"'''
devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x4").devices
alias, canonical = xla_bridge.expand_platform_alias, xla_bridge.canonicalize_platform
xla_bridge.expand_platform_alias = lambda p: ["cuda"] if p == "gpu" else alias(p)
xla_bridge.canonicalize_platform = lambda p: "cuda" if p == "gpu" else canonical(p)
packs = sys.argv[1] == "packed"
fused.check_compute_capability = lambda _: packs
mesh = Mesh(np.array(devices).reshape(1, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
kernel = attention.cudnn if packs else attention.cudnn_masked
def grads(q, k, v, segments):
    def loss(q, k, v):
        return kernel(q, k, v, segments, segments, segments, segments).astype(jnp.float32).sum()
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
def arg(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
spec = P("fsdp", None, "tensor", None)
q, k = (arg((4, 512, n, 128), jnp.bfloat16, spec) for n in (8, 2))
with jax.set_mesh(mesh):
    text = jax.jit(grads).lower(q, k, k, arg((4, 512), jnp.int32, P("fsdp", None))).compile().as_text()
print(text.count('custom_call_target="__cudnn$fmha'), "all-gather" in text, "[2,512,4,128]" in text)
"""


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="JAX's CUDA plugin is not here")
@pytest.mark.parametrize("kind", ["packed", "masked"])
def test_cudnn_compiles_for_an_absent_gpu(kind):
    """Forward and backward over a mesh become cuDNN calls on each device's own rows and heads."""
    done = subprocess.run(
        [sys.executable, "-c", GPU, kind],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["2", "False", "True"]
