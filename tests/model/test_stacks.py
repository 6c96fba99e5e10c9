"""A base in one stack of layers, in several, or layer by layer: one model, with the same products and gradients."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import hidden, random_tokens
from tiny import make_completions, make_qwen2, make_tokenizer, write_config

from jlora.config import LoraSection, load_config
from jlora.errors import ConfigError
from jlora.hf.load import load_base
from jlora.hf.source import open_source
from jlora.model import attention
from jlora.model.adapter import lowest_adapted
from jlora.model.adapter_init import new_adapter
from jlora.model.llama import empty_cache
from jlora.model.sharding import one_device_mesh
from jlora.planning.flops import count_flops
from jlora.training.run import train
from jlora.training.step import stack_sizes

FLOAT32 = jnp.dtype("float32")
SIZES = [(1, 1, 1), (2, 1)]
TOKENS = random_tokens(300)
POSITIONS = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
ONES = np.ones_like(TOKENS)
OPTIONS = {
    "lora": {"dropout": 0.3},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "pissa": {"init_lora_weights": "pissa"},
    "biases": {"bias": "lora_only", "modules_to_save": ["embed_tokens", "lm_head"]},
    "upper": {"layers_to_transform": [2], "modules_to_save": ["lm_head"]},
    "ranks": {"rank_pattern": {"layers.0": 2}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacks")
    make_qwen2(folder, tie_word_embeddings=False, initializer_range=0.05)
    make_tokenizer(folder)
    return folder


def load(folder, sizes, kind=None):
    """With another window in each layer, so that a layer's number counts."""
    base, digest = load_base(open_source(folder), "base", FLOAT32, one_device_mesh(), kind, sizes)
    base.cfg = replace(base.cfg, windows=(5, None, 9))
    return base, digest


def moved(adapter):
    """A fresh adapter with every number away from where it began, but for the zeros of a layer that has none."""
    draw = np.random.default_rng(3)

    def away(part):
        has = np.array([rank > 0 for rank in getattr(part, "ranks", None) or (1,)])
        return jax.tree.map(
            lambda x: (
                x + 0.02 * draw.standard_normal(x.shape).astype(np.float32) * has.reshape(-1, *[1] * (x.ndim - 1))
            ),
            part,
        )

    return {name: away(part) for name, part in adapter.items()}


def assert_same(found, expected):
    """To float32's rounding, by the norm of all of it."""
    ours, theirs = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (found, expected))
    assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


def loss_and_gradients(base, adapter, remat):
    wanted = jnp.asarray(np.random.default_rng(1).normal(size=(*TOKENS.shape, 48)), FLOAT32)

    def loss(adapter):
        states = hidden(base, adapter, TOKENS, POSITIONS, ONES, remat, jax.random.key(5))
        return jnp.mean(jnp.square(states - wanted)) + jnp.mean(jnp.square(base.logits(states, adapter)))

    return jax.value_and_grad(loss)(adapter)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "remat"), [*((name, "lean") for name in OPTIONS), ("lora", "none"), ("lora", "full")]
)
def test_loss_and_gradients_are_those_of_one_stack(folder, options, remat):
    whole, digest = load(folder, None)
    adapter = new_adapter(LoraSection(rank=4, **OPTIONS[options]), whole.cfg, 0, whole)
    expected = loss_and_gradients(whole, moved(adapter), remat)
    assert np.abs(jax.tree.leaves(expected[1])[0]).max() > 1e-4
    for sizes in SIZES:
        base, same = load(folder, sizes)
        assert same == digest and [stack.size for stack in base.stacks] == list(sizes)
        made = new_adapter(LoraSection(rank=4, **OPTIONS[options]), base.cfg, 0, base)
        assert_same(made, adapter)
        found = loss_and_gradients(base, moved(adapter), remat)
        assert_same(found, expected)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_is_the_same_in_stacks(folder, kind):
    (whole, _), (parts, _) = load(folder, None, kind), load(folder, (1, 2), kind)
    for name, param in vars(whole.layers).items():
        if hasattr(param, "get_raw_value"):
            pieces = [getattr(stack, name).get_raw_value() for stack in parts.stacks]
            jax.tree.map(
                lambda leaf, *cut: np.testing.assert_array_equal(np.concatenate(cut), leaf),
                param.get_raw_value(),
                *pieces,
            )


def test_decoding_goes_through_the_stacks(folder):
    found = []
    for sizes in (None, (1, 1, 1), (2, 1)):
        base, _ = load(folder, sizes)
        adapter = moved(new_adapter(LoraSection(rank=4), base.cfg, 0))
        cache = empty_cache(base.cfg, *TOKENS.shape, FLOAT32)
        step = jax.jit(partial(base.hidden_cached, adapter=adapter, attention=attention.reference))
        first, cache = step(TOKENS[:, :20], POSITIONS[:, :20], ONES[:, :20], cache)
        last, cache = step(TOKENS[:, 20:], POSITIONS[:, 20:], ONES[:, 20:], cache)
        found.append((first, last, cache))
    for other in found[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), other, found[0])


def test_layers_below_every_adapter_have_no_backward_pass(folder):
    """Forward and backward of the last layer, forward alone of the others; the gradient is what it was."""
    section = LoraSection(rank=4, layers_to_transform=[2])
    flops, gradients = [], []
    for sizes in (None, (2, 1), (1, 1, 1)):
        base, _ = load(folder, sizes)
        adapter = moved(new_adapter(section, base.cfg, 0))
        assert lowest_adapted(adapter) == 2
        gradients.append(loss_and_gradients(base, adapter, "full"))
        jaxpr = jax.make_jaxpr(lambda a, base=base: loss_and_gradients(base, a, "full"))(adapter)
        flops.append(count_flops(jaxpr.jaxpr))
    assert flops[1] < 0.6 * flops[0] and flops[2] <= flops[1]
    for other in gradients[1:]:
        assert_same(other, gradients[0])


def test_stacks_of_a_config(folder, tmp_path):
    rows = make_completions(tmp_path / "rows.jsonl")
    config = write_config(tmp_path / "c.yaml", folder, rows, tmp_path / "run")
    model = open_source(folder).model

    def sizes(*overrides):
        return stack_sizes(load_config(config, overrides), model)

    assert sizes() == sizes("method=full") == (3,)
    assert sizes("model.scan_layers=false") == (1, 1, 1)
    assert sizes("lora.layers_to_transform=[1,2]") == (1, 2)
    assert sizes("lora.layers_to_transform=[1]", "lora.modules_to_save=[embed_tokens]") == (3,)
    with pytest.raises(ConfigError, match="model.scan_layers=false is for a frozen base"):
        sizes("method=full", "model.scan_layers=false")


@pytest.mark.long
def test_a_run_that_began_scanned_goes_on_unrolled(folder, tmp_path):
    rows = make_completions(tmp_path / "rows.jsonl")
    config = write_config(
        tmp_path / "c.yaml", folder, rows, tmp_path / "run", data={"eval": 0.2, "format": "completion"}
    )
    whole = train(load_config(config, [f"output_dir={tmp_path / 'whole'}"]), quiet=True)
    first = load_config(config)
    assert train(first, quiet=True, until=2)["status"] == "preempted"
    summary = train(load_config(config, ["model.scan_layers=false"]), quiet=True)
    assert summary["steps"] == whole["steps"] == 4
    assert summary["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["history"] == []
