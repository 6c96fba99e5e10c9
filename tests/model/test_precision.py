"""Every product of a float32 model, proof or norm is asked for in float32, whatever the device would make of it.

What is traced is looked at: no device here multiplies float32 in TF32 or bfloat16.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from tiny import shape_of

from jlora.config import Config
from jlora.hf import verify
from jlora.inference.generate import GREEDY, decode, prefill
from jlora.model import attention
from jlora.model.adapter import Lora, weight_norm
from jlora.model.adapter_init import principal
from jlora.model.llama import abstract_decoder
from jlora.model.sharding import one_device_mesh
from jlora.planning.compiled import abstract_step
from jlora.planning.flops import subjaxprs
from jlora.training.step import Forward, make_eval_step, make_forward

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
IN_FULL = (jax.lax.Precision.HIGHEST,) * 2
# Splash's rows are multiples of 128 and its heads of 64; nf4's blocks are of 64.
LENGTH = 128
MODEL = replace(shape_of(64, 128, layers=2, heads=2, kv_heads=1, head_dim=64, vocab_size=64), biased=("q_proj",))


def products(jaxpr):
    """(operands' dtypes, whether it is asked for in full) of every product, those of loops and kernels included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            dtypes = frozenset(variable.aval.dtype for variable in equation.invars)
            yield dtypes, equation.params["precision"] == IN_FULL
        for inner in subjaxprs(equation.params):
            yield from products(inner)


def traced(function, *arguments):
    """How many products a function has of each sort."""
    with jax.set_mesh(one_device_mesh()):
        return Counter(products(jax.make_jaxpr(function)(*arguments).jaxpr))


def assert_precise(found, dtype):
    """Of float32 all products are in full, of bfloat16 none is."""
    assert found
    assert {in_full for _, in_full in found} == {dtype == FLOAT32}, found


KERNELS = {"reference": attention.reference, "blocked": attention.blocked, "splash": attention.splash}
STEPS = {
    "lora": {},
    "full": {"method": "full"},
    "nf4": {"model": {"quantization": "nf4"}},
    "pairs": {"data": {"format": "preference"}, "objective": {"name": "dpo"}},
    "tables": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"], "bias": "all"}},
    "rows": {"lora": {"trainable_tokens": [5, 7]}},
    "dora": {"lora": {"use_dora": True}},
}


def config(dtype, **changes):
    tree = {
        "model": {"path": "base", "dtype": dtype.name},
        "lora": {"rank": 2, "target_modules": "all-linear"},
        "data": {"train": "rows.jsonl", "max_length": LENGTH},
        "training": {"batch_size": 2},
        "output_dir": "run",
    }
    for name, value in changes.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return Config(**tree)


def step_of(cfg, kernel):
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        forward = replace(make_forward(cfg, MODEL, mesh)[1], attention=kernel)
        step, arguments, _ = abstract_step(cfg, MODEL, mesh, forward)
    return traced(step, *arguments)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_product_of_a_step_and_its_kernel(kernel, dtype):
    assert_precise(step_of(config(dtype), KERNELS[kernel]), dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)
def test_every_product_of_each_kind_of_step(changes, dtype):
    """A DoRA's norms are float32's in bfloat16, too: two products of rank R for each projection."""
    found = step_of(config(dtype, **changes), attention.blocked)
    if dtype == BFLOAT16 and "use_dora" in changes.get("lora", {}):
        norms = found.pop((frozenset([FLOAT32]), True))
        assert norms >= 2 * 7
    assert_precise(found, dtype)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_every_product_of_proofs_evaluation_and_generation(dtype):
    base = abstract_decoder(MODEL, dtype)
    rows = {name: jax.ShapeDtypeStruct((2, LENGTH), jnp.int32) for name in ("tokens", "targets", "segments")}
    rows |= {"positions": rows["tokens"], "weights": jax.ShapeDtypeStruct((2, LENGTH), FLOAT32)}
    forward = Forward(attention.reference, "none", dtype, token_accuracy=True)
    assert_precise(traced(lambda base: verify._probed(base, {}, dtype), base), dtype)
    assert_precise(traced(make_eval_step(forward), base, {}, None, rows), dtype)
    assert_precise(traced(forward.by_token, base, {}, rows), dtype)

    begin = partial(prefill, sampling=GREEDY, max_new_tokens=4, dtype=dtype)
    numbers = jnp.ones(2, jnp.int32)
    arguments = base, {}, (rows["tokens"], numbers), numbers, jax.random.key(0)
    assert_precise(traced(begin, *arguments), dtype)
    with jax.set_mesh(one_device_mesh()):
        state = jax.eval_shape(begin, *arguments)
    assert_precise(traced(partial(decode, sampling=GREEDY), base, {}, state, jnp.ones((), jnp.int32)), dtype)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_every_product_of_an_initialisation(init):
    make = partial(principal, init=init, rank=2, num_outputs=1, key=jax.random.key(0), scale=jnp.float32(2.0))
    found = traced(make, jnp.zeros((8, 12), BFLOAT16))
    assert (init == "pissa_niter_2") == bool(found) and all(in_full for _, in_full in found)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_every_product_of_a_norm(dtype):
    """In float32, but of a bfloat16 weight, whose product with A is one of bfloat16."""
    weight, a, b = jnp.zeros((8, 12), dtype), jnp.zeros((8, 2)), jnp.zeros((2, 12))
    found = traced(lambda w, a, b: weight_norm(w, Lora(a, b, jnp.float32(1.0), 0.0), dtype), weight, a, b)
    in_full, not_in_full = (frozenset([FLOAT32]), True), (frozenset([BFLOAT16]), False)
    assert found == ({in_full: 3} if dtype == FLOAT32 else {in_full: 2, not_in_full: 1})
