"""LoRA: initialisation, the product, dropout, and the way to PEFT and back, with PEFT as the judge."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_close, hidden, logits, open_base, random_tokens, torch_logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, needs_data
from tiny import copy_folder, make_llama
from transformers import LlamaForCausalLM

from jlora.config import ATTENTION_PROJECTIONS, PROJECTIONS, LoraSection
from jlora.errors import ModelError
from jlora.files.atomic import new_folder
from jlora.hf.adapter_config import CONFIG
from jlora.hf.peft import WEIGHTS, load_adapter, save_adapter
from jlora.hf.source import open_source
from jlora.hf.weights import Merged, Stored, save_checkpoint
from jlora.model.adapter import Adapter, Lora, layer_scales, project, without_scales
from jlora.model.adapter_init import new_adapter
from jlora.model.config import projection_shapes
from jlora.training.step import count_parameters


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder)
    return folder


@pytest.fixture(scope="module")
def base_and_hash(llama):
    return open_base(llama)


@pytest.fixture(scope="module")
def base(base_and_hash):
    return base_and_hash[0]


def fresh(base, **options: Any) -> Adapter:
    section = LoraSection(**({"rank": 4, "alpha": 8, "target_modules": "all-linear"} | options))
    return new_adapter(section, base.cfg, 7)


def randomised(adapter: Adapter, seed: int = 0) -> Adapter:
    """The adapter as training might leave it: B is not zero."""
    draw = np.random.default_rng(seed)
    return {
        name: dataclasses.replace(lora, lora_b=jnp.asarray(draw.normal(0, 0.1, lora.lora_b.shape), jnp.float32))
        for name, lora in adapter.items()
    }


# Initialisation


def test_init(base):
    shapes = projection_shapes(base.cfg)
    wide = fresh(base, rank=64)
    for name, lora in wide.items():
        inputs, outputs = shapes[name]
        bound = 1 / math.sqrt(math.prod(inputs))
        a = np.asarray(lora.lora_a)
        assert a.shape == (3, *inputs, 64) and lora.lora_b.shape == (3, 64, *outputs)
        assert a.dtype == np.float32 and lora.lora_b.dtype == jnp.float32
        assert not np.asarray(lora.lora_b).any()
        assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
        # Uniform: its standard deviation, and a quarter of the draws in each quarter of the range.
        assert abs(a.std() * math.sqrt(3) / bound - 1) < 0.03
        shares = np.histogram(a, bins=4, range=(-bound, bound))[0] / a.size
        assert np.abs(shares - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / a.size)
        assert len({a[i].tobytes() for i in range(3)}) == 3  # layers differ
    draws = [np.asarray(lora.lora_a).ravel()[:8].tobytes() for lora in wide.values()]
    assert len(set(draws)) == len(PROJECTIONS)


def test_init_follows_peft(base, llama):
    """The bound of A is that of PEFT's own layers."""
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(llama),
        LoraConfig(r=64, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"),
    )
    for name, lora in fresh(base, rank=64).items():
        theirs = [p for key, p in model.named_parameters() if f"{name}.lora_A" in key]
        largest = max(p.detach().abs().max().item() for p in theirs)
        assert abs(largest / float(jnp.abs(lora.lora_a).max()) - 1) < 0.02
    assert count_parameters(without_scales(fresh(base, rank=64))[0]) == sum(
        p.numel() for key, p in model.named_parameters() if "lora_" in key
    )


def test_init_depends_on_seed_and_name_alone(base):
    whole, again = fresh(base), fresh(base)
    one = fresh(base, target_modules=["up_proj"])
    assert set(whole) == set(PROJECTIONS) and set(one) == {"up_proj"}
    np.testing.assert_array_equal(whole["up_proj"].lora_a, one["up_proj"].lora_a)
    for name in whole:
        np.testing.assert_array_equal(whole[name].lora_a, again[name].lora_a)
    section = LoraSection(rank=4, target_modules=["up_proj"])
    other = new_adapter(section, base.cfg, 8)
    assert (np.asarray(other["up_proj"].lora_a) != np.asarray(one["up_proj"].lora_a)).all()


def test_fresh_adapter_changes_nothing(base):
    tokens = random_tokens(300)
    np.testing.assert_array_equal(logits(base, fresh(base), tokens), logits(base, {}, tokens))


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 12 / 16), (True, 12 / 4)])
def test_scale(base, use_rslora, expected):
    section = LoraSection(rank=16, alpha=12, use_rslora=use_rslora)
    np.testing.assert_array_equal(layer_scales(section, "q_proj", base.cfg), np.float32([expected] * 3))
    for lora in fresh(base, rank=16, alpha=12, use_rslora=use_rslora).values():
        np.testing.assert_array_equal(lora.scale, np.float32(expected))


# The product

EQUATIONS = {name: "btd,dnh->btnh" for name in ("q_proj", "k_proj", "v_proj")} | {
    "o_proj": "btnh,nhd->btd",
    "gate_proj": "btd,df->btf",
    "up_proj": "btd,df->btf",
    "down_proj": "btf,fd->btd",
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_project_equals_the_dense_product(name, base):
    lora = jax.tree.map(lambda leaf: leaf[1], randomised(fresh(base, alpha=12))[name])
    weight = np.asarray(getattr(base.layers, name)[...][1], np.float64)
    inputs, outputs = projection_shapes(base.cfg)[name]
    x = np.random.default_rng(1).normal(size=(2, 5, *inputs)).astype(np.float32)
    a = np.asarray(lora.lora_a, np.float64).reshape(-1, 4)
    b = np.asarray(lora.lora_b, np.float64).reshape(4, -1)
    dense = weight.reshape(a.shape[0], b.shape[1]) + 12 / 4 * a @ b
    expected = (x.reshape(10, -1) @ dense).reshape(2, 5, *outputs)
    found = project(EQUATIONS[name], jnp.asarray(x), jnp.asarray(weight, jnp.float32), lora, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    bare = project(EQUATIONS[name], jnp.asarray(x), jnp.asarray(weight, jnp.float32), None, None)
    assert np.abs(np.asarray(bare) - expected).max() > 0.1


def test_equations_are_the_models(base):
    """Each projection's adapter reaches the logits; so do both factors of every layer, by their gradients."""
    tokens = random_tokens(300, rows=1)
    plain, whole = logits(base, {}, tokens), randomised(fresh(base))
    zero = jax.tree.map(jnp.zeros_like, whole)
    for name in PROJECTIONS:
        assert np.abs(logits(base, zero | {name: whole[name]}, tokens) - plain).max() > 1e-3, name
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    gradients = jax.grad(lambda a: hidden(base, a, tokens, positions, np.ones_like(tokens), "none")[..., 0].sum())(
        whole
    )
    for leaf in jax.tree.leaves(gradients):
        assert (np.abs(np.asarray(leaf)).reshape(3, -1).max(axis=1) > 0).all()


# Dropout


def test_dropout_keeps_the_expectation():
    """Inverted dropout on the adapter's input alone: the base's share is untouched."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(1, 3, 16)), jnp.float32)
    weight = jnp.asarray(draw.normal(size=(16, 8)), jnp.float32)
    lora = Lora(
        jnp.asarray(draw.normal(size=(16, 2)), jnp.float32),
        jnp.asarray(draw.normal(size=(2, 8)), jnp.float32),
        jnp.float32(0.5),
        0.3,
    )
    clean = project("btd,df->btf", x, weight, lora, None)
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = np.asarray(jax.vmap(lambda key: project("btd,df->btf", x, weight, lora, key))(keys))
    error = draws.std(axis=0) / math.sqrt(len(keys))
    assert (error > 0).all()
    assert (np.abs(draws.mean(axis=0) - clean) < 5 * error).all()
    # The variance that dropping each input with probability 0.3 and scaling by 1 / 0.7 gives.
    variance = (
        0.3 / 0.7 * np.einsum("btd,df->btf", np.square(x), np.square(0.5 * np.asarray(lora.lora_a @ lora.lora_b)))
    )
    np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.1)
    silent = dataclasses.replace(lora, lora_b=jnp.zeros_like(lora.lora_b))
    np.testing.assert_array_equal(
        project("btd,df->btf", x, weight, silent, keys[0]), project("btd,df->btf", x, weight, None, None)
    )


def test_dropout_is_for_training_only(base):
    tokens = random_tokens(300)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    args = (tokens, positions, np.ones_like(tokens), "none")
    dropping, plain = randomised(fresh(base, dropout=0.5)), randomised(fresh(base))
    without = np.asarray(hidden(base, plain, *args))
    np.testing.assert_array_equal(hidden(base, dropping, *args), without)
    np.testing.assert_array_equal(hidden(base, plain, *args, jax.random.key(0)), without)
    first, again, other = (np.asarray(hidden(base, dropping, *args, jax.random.key(k))) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - without).max() > 1e-2 and np.abs(first - other).max() > 1e-2


def test_dropout_differs_by_projection_and_layer(base, monkeypatch):
    """What is dropped where, read off the inputs that are zero afterwards."""
    masks: list[np.ndarray] = []
    real = jax.random.bernoulli

    def spy(key, p, shape):
        mask = real(key, p, shape)
        jax.debug.callback(lambda m: masks.append(np.asarray(m)), mask)
        return mask

    monkeypatch.setattr("jlora.model.adapter.jax.random.bernoulli", spy)
    adapter = fresh(base, dropout=0.4)
    tokens = random_tokens(300, rows=2, length=7)
    args = (tokens, np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7)), np.ones_like(tokens), "none")
    jax.block_until_ready(hidden(base, adapter, *args, jax.random.key(0)))
    jax.effects_barrier()
    assert len(masks) == len(PROJECTIONS) * 3
    assert abs(np.concatenate([m.ravel() for m in masks]).mean() - 0.6) < 0.02
    # q, k, v, gate and up share an input of one shape; all of them and their layers must differ.
    assert len({(m.shape, m.tobytes()) for m in masks}) == len(masks)


# To PEFT

VARIANTS: dict[str, dict[str, Any]] = {
    "all_linear": {},
    "attention": {"target_modules": list(ATTENTION_PROJECTIONS)},
    "one_target": {"target_modules": ["down_proj"]},
    "rslora": {"use_rslora": True},
    "fractional_alpha": {"alpha": 2.7, "rank": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_loads_in_peft(variant, llama, base_and_hash, tmp_path):
    base, base_hash = base_and_hash
    options = {"rank": 4, "alpha": 8, "target_modules": "all-linear"} | VARIANTS[variant]
    section = LoraSection(**options)
    adapter = randomised(fresh(base, **options))
    save_adapter(tmp_path / "adapter", adapter, section, str(llama), base_hash)
    tokens = random_tokens(300)
    ours = logits(base, adapter, tokens)
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), tmp_path / "adapter").eval()
    assert_close(ours, torch_logits(model, tokens), 1e-4)
    assert np.abs(ours - logits(base, {}, tokens)).max() > 1e-2
    back = load_adapter(tmp_path / "adapter", base.cfg, base_hash, dropout=0.0)
    chex.assert_trees_all_equal(back, adapter)  # the structure holds scale and dropout


def test_files_are_readable_and_no_other_stays(base_and_hash, tmp_path):
    base, base_hash = base_and_hash
    section = LoraSection(rank=4, alpha=8, target_modules="all-linear")
    old = os.umask(0o022)
    try:
        for seed in (0, 1):  # the second replaces the first
            with new_folder(tmp_path / "deep" / "adapter", ours=(CONFIG, WEIGHTS)) as folder:
                save_adapter(folder, randomised(fresh(base), seed), section, "base", base_hash)
    finally:
        os.umask(old)
    folder = tmp_path / "deep" / "adapter"
    assert {file.name for file in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    assert list((tmp_path / "deep").iterdir()) == [folder]
    found = load_adapter(folder, base.cfg, base_hash, 0.0)
    np.testing.assert_array_equal(found["q_proj"].lora_b, randomised(fresh(base), 1)["q_proj"].lora_b)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_non_finite_adapter_is_not_written(value, factor, base_and_hash, tmp_path):
    base, base_hash = base_and_hash
    adapter = fresh(base)
    bad = getattr(adapter["up_proj"], factor).at[1].set(value)
    adapter["up_proj"] = dataclasses.replace(adapter["up_proj"], **{factor: bad})
    section = LoraSection(rank=4, alpha=8, target_modules="all-linear")
    with pytest.raises(ModelError, match="up_proj is not finite"):
        save_adapter(tmp_path / "out" / "adapter", adapter, section, "base", base_hash)
    assert not list(tmp_path.iterdir())


# From PEFT


def write_peft(llama: Path, folder: Path, *, spread: float = 0.1, **options: Any) -> PeftModel:
    """An adapter of PEFT with random factors, saved by PEFT."""
    torch.manual_seed(0)
    config = LoraConfig(
        **({"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options)
    )
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=spread)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3},
        {"lora_alpha": 2.5, "r": 3, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_import_from_peft(options, llama, base_and_hash, tmp_path):
    base, base_hash = base_and_hash
    model = write_peft(llama, tmp_path, **options)
    tokens = random_tokens(300)
    adapter = load_adapter(tmp_path, base.cfg, base_hash, dropout=0.0)
    assert_close(logits(base, adapter, tokens), torch_logits(model, tokens), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_import_of_half_precision(dtype, llama, base_and_hash, tmp_path):
    base, base_hash = base_and_hash
    write_peft(llama, tmp_path / "whole").to(dtype).save_pretrained(tmp_path / "half")
    adapter = load_adapter(tmp_path / "half", base.cfg, base_hash, dropout=0.0)
    whole = load_adapter(tmp_path / "whole", base.cfg, base_hash, dropout=0.0)
    for ours, exact in zip(jax.tree.leaves(adapter), jax.tree.leaves(whole), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_array_equal(ours, torch.from_numpy(np.array(exact)).to(dtype).float())


@needs_data
def test_trained_adapter_round_trips(tmp_path):
    base, base_hash = open_base(SHARED / "stories260K")
    folder = SHARED / "stories260K_lora_reviews"
    adapter = load_adapter(folder, base.cfg, base_hash, dropout=0.0)
    raw = json.loads((folder / CONFIG).read_text())
    options = {"rank": raw["r"], "alpha": raw["lora_alpha"], "target_modules": raw["target_modules"]}
    section = LoraSection(**options, use_rslora=raw["use_rslora"])
    save_adapter(tmp_path / "again", adapter, section, "base", base_hash)
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


# Merging


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "target_modules": ["o_proj", "gate_proj"]}], ids=str)
def test_merged_weights_equal_the_adapter(options, llama, base_and_hash, tmp_path):
    base, _ = base_and_hash
    adapter = randomised(fresh(base, **options))
    source = open_source(llama)
    weights = Merged(Stored(source), adapter)
    save_checkpoint(tmp_path / "merged", base.cfg, weights, source.config, "float32", lambda folder: None)
    tokens = random_tokens(300)
    expected = logits(base, adapter, tokens)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(torch_logits(model, tokens), expected, 1e-4)
    assert_close(logits(open_base(tmp_path / "merged")[0], {}, tokens), expected, 1e-4)


# Refusals


@pytest.fixture(scope="module")
def good(base_and_hash, tmp_path_factory) -> Path:
    base, base_hash = base_and_hash
    folder = tmp_path_factory.mktemp("good") / "adapter"
    section = LoraSection(rank=4, alpha=8, target_modules="all-linear")
    save_adapter(folder, randomised(fresh(base)), section, "base", base_hash)
    return folder


KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"


def put(tensors: dict[str, np.ndarray], name: str, value: np.ndarray | None) -> dict[str, np.ndarray]:
    rest = {key: tensor for key, tensor in tensors.items() if key != name}
    return rest if value is None else rest | {name: value}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (KEY, lambda t: t[:2].copy(), "[2, 48] instead of [4, 48]"),
        (KEY, lambda t: t.T.copy(), "[48, 4] instead of [4, 48]"),
        (KEY, lambda t: None, "is missing"),
        (KEY, lambda t: np.where(np.arange(48) == 5, np.nan, t).astype(np.float32), "NaN"),
        (KEY, lambda t: np.where(np.arange(48) == 5, np.inf, t).astype(np.float32), "infinity"),
        (KEY, lambda t: np.ones(t.shape, np.int8), "only 16, 32 and 64-bit floats"),
        (KEY.replace("layers.1", "layers.3"), lambda t: np.zeros((4, 48), np.float32), "is not known"),
        ("base_model.model.lm_head.lora_A.weight", lambda t: np.zeros((4, 48), np.float32), "is not known"),
    ],
)
def test_wrong_tensors(name, change, says, good, base_and_hash, tmp_path):
    folder = copy_folder(good, tmp_path / "bad")
    tensors = load_file(folder / WEIGHTS)
    save_file(put(tensors, name, change(tensors.get(name))), folder / WEIGHTS)
    refused(folder, base_and_hash, name, says)


def refused(folder: Path, base_and_hash, *says: str) -> None:
    """One sentence of ModelError with all of `says`."""
    base, base_hash = base_and_hash
    with pytest.raises(ModelError) as caught:
        load_adapter(folder, base.cfg, base_hash, dropout=0.0)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for text in says:
        assert text in message, message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "most"),
        ("modules_to_save", ["norm"]),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", ["a"]),
        ("use_something_of_next_year", True),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("r", 0),
        ("r", "four"),
        ("r", None),
        ("lora_alpha", None),
        ("target_modules", ["lm_head"]),
        ("target_modules", 7),
    ],
)
def test_unusable_options(key, value, good, base_and_hash, tmp_path):
    folder = copy_folder(good, tmp_path / "bad")
    config = json.loads((folder / CONFIG).read_text()) | {key: value}
    (folder / CONFIG).write_text(json.dumps(config))
    named = {"r": "rank", "lora_alpha": "alpha"}.get(key, key)
    refused(folder, base_and_hash, CONFIG, named)


def test_options_that_are_off_are_no_obstacle(good, base_and_hash, tmp_path):
    base, base_hash = base_and_hash
    folder = copy_folder(good, tmp_path / "fine")
    off = {"use_dora": False, "rank_pattern": {}, "modules_to_save": None, "layer_replication": [], "new": False}
    config = json.loads((folder / CONFIG).read_text()) | off | {"init_lora_weights": "eva"}
    (folder / CONFIG).write_text(json.dumps(config))
    assert set(load_adapter(folder, base.cfg, base_hash, 0.25)) == set(PROJECTIONS)
    assert load_adapter(folder, base.cfg, base_hash, 0.25)["q_proj"].dropout == 0.25


def test_another_base(good, base_and_hash):
    base, base_hash = base_and_hash
    refused(good, (base, "0" * 64), "another base", base_hash[:12])
    deeper = dataclasses.replace(base.cfg, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"layers\.3\..* is missing \(and 13 more\)"):
        load_adapter(good, deeper, base_hash, 0.0)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_damaged_file(size, good, base_and_hash, tmp_path):
    folder = copy_folder(good, tmp_path / "bad")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])
    refused(folder, base_and_hash, WEIGHTS)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(name, good, base_and_hash, tmp_path):
    folder = copy_folder(good, tmp_path / "bad")
    (folder / name).unlink()
    refused(folder, base_and_hash, name, "missing")
