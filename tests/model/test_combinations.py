"""Every attention x every rematerialisation x base: one loss, one gradient.

Splash runs in Pallas's interpreter, and what cuDNN is asked for is answered by XLA: it needs a GPU.
"""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr, tree_leaves_with_path
from tiny import make_llama

from jlora.config import LoraSection
from jlora.hf.load import load_base
from jlora.hf.source import open_source
from jlora.model import attention, quant
from jlora.model.adapter_init import new_adapter
from jlora.model.attention import gpu, tiles, tpu
from jlora.model.remat import LADDER
from jlora.model.sharding import one_device_mesh
from jlora.training.step import Forward

FLOAT32 = jnp.dtype("float32")
LENGTH = 256
# Splash's rows are multiples of 128 and its heads of 64; nf4's blocks are of 64.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.08,
}


def splash(q, k, v, places, window, softcap):
    return tpu._splash_rows(q, k, v, places.q_segments, window, softcap, interpret=True)


ATTENTION = {
    "reference": attention.reference,
    "blocked": attention.blocked,
    "splash": splash,
    "cudnn": attention.cudnn,
}
# The default suite has the attention of CPUs with each policy, and the others with the default one, over the base
# that asks more of a policy.
CASES = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case[2] is None or (case[0] != "blocked" and case[1] != "full")))
    for case in itertools.product(ATTENTION, LADDER, (None, "nf4"))
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(attention, remat, quantization or "dequantised") -> loss and gradients of the adapter, as NumPy arrays."""
    folder = tmp_path_factory.mktemp("combinations")
    make_llama(folder, **SHAPE)
    mesh = one_device_mesh()
    bases = {kind: load_base(open_source(folder), "base", FLOAT32, mesh, kind)[0] for kind in (None, "nf4")}
    bases["dequantised"] = jax.tree.map(
        lambda leaf: jax.vmap(lambda one: quant.dequantize(one, FLOAT32))(leaf) if quant.is_quantized(leaf) else leaf,
        bases["nf4"],
        is_leaf=quant.is_quantized,
    )
    draw = np.random.default_rng(0)
    section = LoraSection(rank=4, target_modules="all-linear")
    adapter = new_adapter(section, bases[None].cfg, 0)
    adapter = jax.tree.map(lambda x: x + 0.05 * draw.standard_normal(x.shape).astype(np.float32), adapter)
    segments = np.repeat([[1, 1, 2, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1, 2]], LENGTH // 8, axis=1).astype(np.int32)
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    at = np.arange(LENGTH)[None]
    positions = (at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)).astype(np.int32) * (segments > 0)
    tokens, targets = draw.integers(0, 300, (2, *segments.shape), dtype=np.int32)
    batch = {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions}
    batch["weights"] = (draw.random(segments.shape) < 0.6).astype(np.float32) * (segments > 0)
    batch = jax.tree.map(jnp.asarray, batch)

    def of_adapter(kernel, remat, base, adapter):
        def loss(adapter):
            total, count, _ = Forward(ATTENTION[kernel], remat, FLOAT32).loss(base, adapter, batch, None)
            return total / count

        return jax.value_and_grad(loss)(adapter)

    ask = jax.nn.dot_product_attention

    def ask_xla(*qkv, implementation, **how):
        assert implementation == "cudnn"
        return ask(*qkv, **how, implementation="xla")

    @cache
    def answer(kernel, remat, base):
        with pytest.MonkeyPatch.context() as patch:
            # Several of each in a row.
            patch.setattr(tiles, "TILE", 64)
            patch.setattr(tpu, "MAX_SPLASH_BLOCK", 128)
            patch.setattr(gpu, "MAX_MASKED_LENGTH", 128)
            patch.setattr(gpu, "QUERY_BLOCK", 128)
            patch.setattr(jax.nn, "dot_product_attention", ask_xla)
            return jax.tree.map(np.asarray, jax.jit(partial(of_adapter, kernel, remat))(bases[base], adapter))

    return answer


@pytest.mark.long
@pytest.mark.parametrize(("kernel", "remat", "base"), CASES)
def test_loss_and_gradients_are_those_of_the_reference(run, kernel, remat, base):
    """In float32 within 1e-4, and that of each gradient's own size, of reference attention without
    rematerialisation, over a base that is dequantised."""
    loss, gradients = run(kernel, remat, base)
    right, expected = run("reference", "none", "dequantised" if base else None)
    assert abs(loss - right) < 1e-5
    for (path, found), wanted in zip(tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True):
        most = np.abs(wanted).max()
        assert most > 1e-3
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * min(1.0, most), err_msg=keystr(path))


@pytest.mark.long
def test_quantising_changes_what_is_computed(run):
    """So that equal figures above are not those of one and the same base."""
    assert abs(run("reference", "none", None)[0] - run("reference", "none", "nf4")[0]) > 1e-3
