"""Attention over rows whose tokens lie over several devices: here each is a lane of `jax.vmap`, so one device does.

What the model, its loss and its gradients are over real devices is in tests/training/test_context.py.
"""

from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jlora.errors import ConfigError
from jlora.model import attention
from jlora.model.attention import context, gpu, tiles
from jlora.model.sharding import CONTEXT, MESH_AXES


def over(devices):
    """The mesh in force is one of so many devices for each row."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, devices, 1), MESH_AXES))


def by_device(x, devices):
    """[B T ...] -> [devices B T/devices ...]."""
    return jnp.stack(jnp.split(jnp.asarray(x), devices, axis=1))


def whole(x):
    """The inverse of `by_device`."""
    return jnp.concatenate(list(x), axis=1)


def rows_of(rng, length):
    """A row in one segment, one of several segments and padding, one that is all padding; and positions."""
    segments, positions = np.zeros((3, length), np.int32), np.zeros((3, length), np.int32)
    segments[0], positions[0] = 1, np.arange(length)
    cuts = [0, *np.sort(rng.choice(np.arange(1, length), 4, replace=False))]
    for number, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False), 1):
        segments[1, start:end], positions[1, start:end] = number, np.arange(end - start)
    return segments, positions


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_each_device_answers_an_early_chunk_and_a_late_one(devices):
    """Every query once, in the order of the row, and as many keys as any other device."""
    tokens = jnp.arange(4 * devices, dtype=jnp.float32)[None, :, None]
    with over(devices):
        there = jax.vmap(context.to_answering, axis_name=CONTEXT)(by_device(tokens, devices))
        numbers = jax.vmap(lambda _: context.answered(2), axis_name=CONTEXT)(jnp.arange(devices))
        back = jax.vmap(context.to_holding, axis_name=CONTEXT)(there)
    np.testing.assert_array_equal(there[:, 0, :, 0], numbers)  # blocks of one token, two of them a chunk
    assert sorted(numbers.ravel().tolist()) == list(range(4 * devices))
    assert len(set((numbers + 1).sum(axis=1).tolist())) == 1 and (jnp.diff(numbers, axis=1) > 0).all()
    np.testing.assert_array_equal(whole(back), tokens)


@pytest.mark.parametrize(
    ("devices", "heads", "kv_heads", "length", "window", "softcap"),
    [(2, 4, 2, 128, None, None), (2, 2, 2, 44, 30, None), (4, 4, 1, 128, 7, None), (3, 2, 1, 96, None, 0.7)],
    ids=["grouped", "window and odd tiles", "window within a chunk", "three devices and a soft cap"],
)
def test_tiles_over_devices_equal_the_reference(devices, heads, kv_heads, length, window, softcap, monkeypatch):
    """Several tiles a chunk, segments that begin and end in any chunk, padding, windows."""
    monkeypatch.setattr(tiles, "TILE", 8)
    kernel = partial(tiles._blocked_over_context, fine=False)
    require_the_reference(kernel, devices, heads, kv_heads, length, window, softcap)


@pytest.mark.parametrize(
    ("devices", "window", "longest"), [(2, None, 256), (2, 40, 128), pytest.param(3, None, 128, marks=pytest.mark.long)]
)
def test_cudnn_over_devices_equals_the_reference(devices, window, longest, monkeypatch):
    """One mask a chunk, or blocks of its queries. What cuDNN is asked for is answered by XLA."""
    monkeypatch.setattr(gpu, "MAX_MASKED_LENGTH", longest)
    monkeypatch.setattr(gpu, "QUERY_BLOCK", 32)
    ask, asked = jax.nn.dot_product_attention, set()

    def answer(q, k, v, *, implementation, **how):
        assert implementation == "cudnn"
        asked.add((q.shape[1], k.shape[1]))
        return ask(q, k, v, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    require_the_reference(gpu._cudnn_over_context, devices, 4, 2, 128 * devices, window, None)
    size = 64 if 128 * devices <= longest else 32
    keys = range(size, 128 * devices + 1, size)  # of causality no key is asked for that no query sees
    assert asked == {(size, end if window is None else end - max(0, end - size - 39) // 64 * 64) for end in keys}


def require_the_reference(kernel, devices, heads, kv_heads, length, window, softcap):
    """Forward and backward."""
    rng = np.random.default_rng(length)
    segments, positions = rows_of(rng, length)
    q, k, v = (jnp.asarray(rng.standard_normal((3, length, n, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    weights = jnp.asarray(rng.standard_normal(q.shape) * (segments > 0)[:, :, None, None], jnp.float32)
    places = attention.Places(*map(jnp.asarray, (segments, segments, positions, positions)))

    kernel = partial(kernel, window=window, softcap=softcap)

    def of_device(q, k, v, weights):
        def loss(*qkv):
            return (kernel(*qkv, segments=jnp.asarray(segments)) * weights).sum()

        # What it answers for others is in their losses, and comes back as the gradients of its keys and values.
        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    with over(devices):
        losses, parts = jax.jit(jax.vmap(of_device, axis_name=CONTEXT))(
            *(by_device(x, devices) for x in (q, k, v, weights))
        )

    def reference(*qkv):
        return (attention.reference(*qkv, places, window, softcap) * weights).sum()

    expected, right = jax.jit(jax.value_and_grad(reference, argnums=(0, 1, 2)))(q, k, v)
    np.testing.assert_allclose(losses.sum(), expected, rtol=1e-5)
    gradients = map(whole, parts)
    for name, found, true in zip("qkv", gradients, right, strict=True):
        seen = segments > 0  # what padding sees is its own affair
        np.testing.assert_allclose(np.asarray(found)[seen], np.asarray(true)[seen], rtol=0, atol=1e-5, err_msg=name)


CPU = Mock(jax.Device, platform="cpu")
TPU = Mock(jax.Device, platform="tpu")
GPU = Mock(jax.Device, platform="gpu", compute_capability="9.0")
BF16 = jnp.dtype("bfloat16")


def test_what_is_taken_for_parts_of_rows():
    """A kernel where a chunk is whole blocks of it."""
    choose = partial(attention.choose, head_dim=128, dtype=BF16, one_segment=False, context=8)
    assert choose("auto", CPU, length=131_072)[1] is attention.blocked_finely
    for device, asked, kernel, step in ((GPU, "cudnn", attention.cudnn, 1024), (TPU, "splash", attention.splash, 2048)):
        assert choose("auto", device, length=131_072) == (asked, kernel)
        needs = f"{asked} needs a length that is a multiple of {step}"
        said, other = choose("auto", device, length=131_072 - step // 2)
        assert other is attention.blocked and said.startswith(f"blocked, because {needs} (here")
        assert said.endswith("mesh.context=8)")
        with pytest.raises(ConfigError, match=f"model.attention={needs} .*; set model.attention to auto or "):
            choose(asked, device, length=131_072 - step // 2)
