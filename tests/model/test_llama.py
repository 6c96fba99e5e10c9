"""The model against transformers, by every field of its config; and rematerialisation, which changes nothing."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_close, hidden, logits, open_base, random_tokens, torch_logits
from ropes import CONFIGS, DYNAMIC, LINEAR_ROPE, LONG_ROPE, YARN_ROPE
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, needs_data
from tiny import LLAMA3_ROPE, OFF_DEFAULT, copy_folder, make_llama, make_mistral
from transformers import AutoModelForCausalLM

from jlora.errors import ModelError
from jlora.hf.architecture import parse_config
from jlora.hf.peft import load_adapter
from jlora.model import attention
from jlora.model.adapter import require_fits
from jlora.model.config import ModelConfig, block_weights, outer_weights
from jlora.model.remat import LADDER
from jlora.model.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, YarnRope, rotary_table

# Parity


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    model = make_llama(tmp_path, **CONFIGS[name])
    base, _ = open_base(tmp_path)
    tokens = random_tokens(300)
    assert_close(logits(base, {}, tokens), torch_logits(model, tokens), 1e-4)


def test_mistral_logits_equal_transformers(tmp_path):
    """Every position but the first few looks back no farther than the window."""
    model = make_mistral(tmp_path / "windowed")
    make_mistral(tmp_path / "whole", sliding_window=None)
    tokens = random_tokens(300)
    found = logits(open_base(tmp_path / "windowed")[0], {}, tokens)
    assert_close(found, torch_logits(model, tokens), 1e-4)
    whole = logits(open_base(tmp_path / "whole")[0], {}, tokens)
    moved = np.abs(found - whole).max(axis=(0, 2))
    assert (moved[:7] < 1e-4).all() and (moved[7:] > 1e-2).all()


@pytest.mark.parametrize("layer", [0, 2])
def test_block_equals_transformers(layer, llama, base):
    """Unit-scale inputs; one layer, so that an error cannot be washed out by the norm behind it."""
    _, model = llama
    x = np.random.default_rng(layer).normal(size=(2, 24, 48)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32)[None], (2, 24))
    ones = jnp.ones_like(positions)
    attend = partial(attention.reference, places=attention.Places(ones, ones, positions, positions), window=None)

    cfg = base.cfg

    @jax.jit
    def ours(stacked, x):
        rotary = rotary_table(positions, jnp.ones_like(positions), *cfg.ropes)
        return jax.tree.map(lambda leaf: leaf[layer], stacked)(x, rotary, attend, {}, None)

    mask = torch.full((24, 24), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        rotary = model.model.rotary_emb(torch.from_numpy(x), torch.arange(24)[None])
        theirs = model.model.layers[layer](torch.from_numpy(x), attention_mask=mask, position_embeddings=rotary)
    assert_close(ours(base.layers, x), theirs, 1e-5)


@needs_data
def test_real_model():
    reference = np.load(SHARED / "stories260K_reference.npz")
    base, base_hash = open_base(SHARED / "stories260K")
    tokens = reference["input_ids"][None].astype(np.int32)
    assert_close(logits(base, {}, tokens)[0], reference["base_logits"], 1e-4)
    adapter = load_adapter(SHARED / "stories260K_lora_reviews", base.cfg, base_hash, 0.0)
    found = logits(base, adapter, tokens)[0]
    assert_close(found, reference["lora_logits"], 1e-4)
    assert np.abs(found - reference["base_logits"]).max() > 1e-2


YARN_BY_MSCALE = {key: value for key, value in YARN_ROPE.items() if key != "attention_factor"}
YARN_BY_MSCALE |= {"mscale": 1.6, "mscale_all_dim": 0.7}
LLAMA3 = LLAMA3_ROPE | {"rope_theta": 523.0}
LINEAR = LINEAR_ROPE | {"rope_theta": 523.0}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7}
# A field of ModelConfig or of a scaling; the config.json that it stands in; and keys that give it another value.
PERTURBED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("norm_eps", {}, {"rms_norm_eps": 3e-2}),
    ("Rope.theta", {}, {"rope_parameters": LLAMA3 | {"rope_theta": 900.0}}),
    ("Rope.scaling", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 523.0}}),
    ("tie_word_embeddings", {}, {"tie_word_embeddings": True}),
    ("windows", MISTRAL, {"sliding_window": 11}),
    ("Llama3Rope.factor", {}, {"rope_parameters": LLAMA3 | {"factor": 2.0}}),
    ("Llama3Rope.low_freq_factor", {}, {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}),
    ("Llama3Rope.high_freq_factor", {}, {"rope_parameters": LLAMA3 | {"high_freq_factor": 8.0}}),
    (
        "Llama3Rope.original_max_position_embeddings",
        {},
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 40}},
    ),
    ("LinearRope.factor", {"rope_parameters": LINEAR}, {"rope_parameters": LINEAR | {"factor": 4.0}}),
    ("DynamicRope.factor", DYNAMIC, {"rope_parameters": DYNAMIC["rope_parameters"] | {"factor": 6.0}}),
    ("DynamicRope.max_position_embeddings", DYNAMIC, {"max_position_embeddings": 16}),
    *(
        (f"YarnRope.{field}", {"rope_parameters": YARN_ROPE}, {"rope_parameters": YARN_ROPE | {field: value}})
        for field, value in {
            "factor": 2.0,
            "attention_factor": None,
            "beta_fast": 8.0,
            "beta_slow": 1.5,
            "truncate": True,
            "original_max_position_embeddings": 128,
        }.items()
    ),
    # By which attention_factor is found where the config does not have it; and a key of the config itself goes first.
    *(
        ("YarnRope.attention_factor", {"rope_parameters": YARN_BY_MSCALE}, {"rope_parameters": YARN_BY_MSCALE | more})
        for more in ({"mscale": 2.5}, {"mscale_all_dim": 0.2}, {"mscale": None})
    ),
    (
        "YarnRope.original_max_position_embeddings",
        {"rope_parameters": YARN_ROPE},
        {"original_max_position_embeddings": 128},
    ),
    *(
        (f"LongRope.{field}", {"rope_parameters": LONG_ROPE | start}, {"rope_parameters": LONG_ROPE | start | more})
        for field, start, more in (
            ("long_factor", {}, {"long_factor": [9.0, 2.0, 3.5, 6.0, 11.0]}),
            ("short_factor", {"original_max_position_embeddings": 24}, {"short_factor": [4.0, 1.2, 1.5, 2.0, 3.0]}),
            ("original_max_position_embeddings", {"factor": 4.0}, {"original_max_position_embeddings": 24}),
            ("attention_factor", {}, {"attention_factor": 1.1}),
            ("attention_factor", {}, {"factor": 1.5}),  # by which it is found where the config does not have it
        )
    ),
]


def test_no_numerics_field_is_forgotten():
    """Every field of the config is a dim of some weight, or is perturbed below."""
    cfg = parse_config(OFF_DEFAULT | {"model_type": "llama"}, "here")
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    for part in (Rope, LinearRope, DynamicRope, Llama3Rope, YarnRope, LongRope):
        fields |= {f"{part.__name__}.{field.name}" for field in dataclasses.fields(part)}
    # What other families differ in, and what moves no number.
    elsewhere = {"names", "ropes", "Rope.dim", "activation", "norm_offset", "embedding_scale", "query_scale"}
    elsewhere |= {"attention_softcap", "logits_softcap"}
    for name in fields - elsewhere - {field for field, *_ in PERTURBED}:
        value = getattr(cfg, name)
        another = ("up_proj",) if name == "biased" else not value if isinstance(value, bool) else (value or 0) + 2
        changed = dataclasses.replace(cfg, **{name: another})
        before, after = (
            [c.num_hidden_layers, *(weight.shape for weight in (block_weights(c) | outer_weights(c)).values())]
            for c in (cfg, changed)
        )
        assert before != after, name


@pytest.fixture(scope="module")
def with_keys(llama, tmp_path_factory):
    """A folder whose config.json has other keys, and the logits that jlora finds in it; once for the same keys."""
    known: dict[str, tuple[Path, np.ndarray]] = {}

    def changed(keys: dict[str, Any]) -> tuple[Path, np.ndarray]:
        if (name := json.dumps(keys, sort_keys=True)) not in known:
            folder = copy_folder(llama[0], tmp_path_factory.mktemp("keys") / "base")
            if keys.get("tie_word_embeddings"):  # a head of its own in the file would be taken, as by transformers
                tensors = load_file(folder / "model.safetensors")
                del tensors["lm_head.weight"]
                save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((folder / "config.json").read_text()) | keys
            (folder / "config.json").write_text(json.dumps(config))
            known[name] = folder, logits(open_base(folder)[0], {}, random_tokens(300, rows=1))
        return known[name]

    return changed


@pytest.mark.long
@pytest.mark.parametrize(("field", "start", "change"), PERTURBED, ids=lambda value: value if type(value) is str else "")
def test_every_field_matters(field, start, change, with_keys):
    """A field of config.json that jlora drops would leave the logits; one that it misreads moves them elsewhere."""
    tokens = random_tokens(300, rows=1)
    _, before = with_keys(start)
    folder, after = with_keys(start | change)
    assert np.abs(after - before).max() > 1e-2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_close(after, torch_logits(model.eval(), tokens), 1e-4)


# Rematerialisation


def test_an_adapter_of_another_base_is_refused(base, adapter):
    require_fits(adapter, base.cfg)
    for change, named in ({"num_key_value_heads": 1}, "k_proj"), ({"num_hidden_layers": 2}, "q_proj"):
        with pytest.raises(ModelError, match=rf"adapter's {named} does not fit this base \(.* != .*\); give the base"):
            require_fits(adapter, dataclasses.replace(base.cfg, **change))


@pytest.mark.long
def test_remat_policies_agree(base, adapter):
    tokens = random_tokens(300)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    assert LADDER[0] == "none" and len(LADDER) == 6
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, tokens.shape[1], 48)), jnp.float32) / tokens.size

    def loss(adapter, remat):
        return jnp.sum(hidden(base, adapter, tokens, positions, np.ones_like(tokens), remat) * weights)

    found = {remat: jax.value_and_grad(loss)(adapter, remat) for remat in LADDER}
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found["none"][1]))
    for remat in LADDER:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), found[remat], found["none"])


def test_remat_policies_differ(base, adapter):
    """A policy that is not wired up would pass the test above: what is saved for the backward pass must shrink."""
    tokens = random_tokens(300)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    def saved(remat: str) -> int:
        def forward(adapter):
            return hidden(base, adapter, tokens, positions, np.ones_like(tokens), remat)

        backward = jax.eval_shape(lambda a: jax.vjp(forward, a)[1], adapter)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    # Where it is kept is the compiler's to show: here `offload` keeps what `full` does.
    sizes = [saved(remat) for remat in LADDER if remat != "offload"]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5, sizes
    assert saved("offload") == sizes[-1]
