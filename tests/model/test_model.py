"""The model against transformers, packing, rematerialisation, and decoding with a cache."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_close, hidden, logits, open_base, random_tokens, torch_logits
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, needs_data
from tiny import LLAMA3_ROPE, OFF_DEFAULT, copy_folder, make_llama, make_mistral, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from jlora.config import LoraSection
from jlora.hf.architecture import parse_config
from jlora.hf.peft import load_adapter
from jlora.hf.pretrained import Pretrained, load_pretrained, open_pretrained
from jlora.inference.generate import Sampling, generate, sample
from jlora.model import attention
from jlora.model.adapter import init_adapter
from jlora.model.llama import LlamaConfig, block_weights, empty_cache, outer_weights, projection_shapes
from jlora.model.remat import LADDER
from jlora.model.rope import DynamicRope, LinearRope, Llama3Rope, YarnRope, rotary_table
from jlora.model.sharding import one_device_mesh

LINEAR_ROPE = {"rope_type": "linear", "factor": 2.5}
YARN_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "attention_factor": 1.3,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": False,
    "original_max_position_embeddings": 64,
    "rope_theta": 523.0,
}
DYNAMIC = {
    "max_position_embeddings": 10,  # shorter than the tests' rows
    "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 523.0},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "multi_head_tied": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "llama3_rope": {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 523.0}},
    "linear_rope_tied": {"rope_parameters": LINEAR_ROPE | {"rope_theta": 523.0}, "tie_word_embeddings": True},
    "yarn_rope_tied": {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True},
    "dynamic_rope": DYNAMIC,
    "one_kv_head": {"num_key_value_heads": 1, "head_dim": 6},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    """A folder with a tiny model with llama3 rope, and that model."""
    folder = tmp_path_factory.mktemp("llama")
    model = make_llama(folder, **CONFIGS["llama3_rope"])
    make_tokenizer(folder)
    return folder, model


@pytest.fixture(scope="module")
def base(llama):
    return open_base(llama[0])[0]


@pytest.fixture(scope="module")
def adapter(base):
    """An adapter on every projection whose B is not zero."""
    cfg = LoraSection(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    fresh = init_adapter(cfg, projection_shapes(base.cfg), base.cfg.num_hidden_layers, seed=3)
    draw = np.random.default_rng(0)
    return {
        name: dataclasses.replace(lora, lora_b=jnp.asarray(draw.normal(0, 0.1, lora.lora_b.shape), jnp.float32))
        for name, lora in fresh.items()
    }


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
    """Unit-scale inputs; one layer, so that an error can not be washed out by the norm behind it."""
    _, model = llama
    x = np.random.default_rng(layer).normal(size=(2, 24, 48)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(24)[None], (2, 24))
    attend = partial(
        attention.reference,
        q_segments=jnp.ones_like(positions),
        kv_segments=jnp.ones_like(positions),
        q_positions=positions,
        kv_positions=positions,
        window=None,
    )

    cfg = base.cfg

    @jax.jit
    def ours(stacked, x):
        rotary = rotary_table(positions, jnp.ones_like(positions), cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
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

# A field of LlamaConfig or of a scaling; the config.json that it stands in; and keys that give it another value.
PERTURBED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("rms_norm_eps", {}, {"rms_norm_eps": 3e-2}),
    ("rope_theta", {}, {"rope_parameters": LLAMA3 | {"rope_theta": 900.0}}),
    ("rope_scaling", {}, {"rope_parameters": {"rope_type": "default", "rope_theta": 523.0}}),
    ("tie_word_embeddings", {}, {"tie_word_embeddings": True}),
    ("sliding_window", MISTRAL, {"sliding_window": 11}),
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
]


def test_no_numerics_field_is_forgotten():
    """Every field of the config is a dim of some weight, or is perturbed below."""
    cfg = parse_config(OFF_DEFAULT | {"model_type": "llama"}, "here")
    fields = {field.name for field in dataclasses.fields(LlamaConfig)}
    for scaling in (LinearRope, DynamicRope, Llama3Rope, YarnRope):
        fields |= {f"{scaling.__name__}.{field.name}" for field in dataclasses.fields(scaling)}
    for name in fields - {field for field, *_ in PERTURBED}:
        value = getattr(cfg, name)
        changed = dataclasses.replace(cfg, **{name: ("up_proj",) if name == "biased" else value + 2})
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


# Packing

LENGTHS = ((5, 9, 4), (11, 3))  # of the sequences of two rows; what is left of ROW is padding
ROW = 20


def packed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tokens, positions and segments, [B ROW]; no token stands twice in a row."""
    draw = np.random.default_rng(5)
    tokens = np.stack([draw.permutation(300)[:ROW] for _ in LENGTHS]).astype(np.int32)
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for segment, length in enumerate(lengths, 1):
            positions[row, start : start + length] = np.arange(length)
            segments[row, start : start + length] = segment
            start += length
    return tokens, positions, segments


def test_packed_rows_equal_separate_ones(llama, base, adapter):
    _, model = llama
    tokens, positions, segments = packed()
    for factors in ({}, adapter):
        together = logits(base, factors, tokens, positions, segments)
        for row, lengths in enumerate(LENGTHS):
            ends = np.cumsum(lengths)
            for start, end in zip(ends - lengths, ends, strict=True):
                alone = np.zeros((2, ROW), np.int32)  # one compiled shape; causality hides the rest
                alone[0, : end - start] = tokens[row, start:end]
                separate = logits(base, factors, alone)[0, : end - start]
                assert_close(together[row, start:end], separate, 1e-5)
                if not factors:
                    theirs = torch_logits(model, tokens[row : row + 1, start:end])[0]
                    assert_close(together[row, start:end], theirs, 1e-4)


def test_a_token_reaches_its_own_segment_and_no_earlier_position(base):
    """By gradients: tokens of a row are distinct, so a row of the embedding's gradient is one position."""
    tokens, positions, segments = packed()
    direction = np.random.default_rng(6).normal(size=48).astype(np.float32)

    @jax.jit
    def reach(base, tokens, positions, segments):
        def score(base, position):
            states = hidden(base, {}, tokens[None], positions[None], segments[None], "none")
            return states[0, position] @ direction

        gradients = jax.vmap(jax.grad(score), in_axes=(None, 0))(base, jnp.arange(ROW))
        return jnp.any(gradients.embed_tokens[...] != 0.0, axis=-1)  # [T, V]

    for row in range(len(LENGTHS)):
        found = np.asarray(reach(base, tokens[row], positions[row], segments[row]))
        other = np.setdiff1d(np.arange(300), tokens[row])
        assert not found[:, other].any()
        same = segments[row][:, None] == segments[row][None, :]
        expected = same & (positions[row][None, :] <= positions[row][:, None])
        real = segments[row] > 0
        np.testing.assert_array_equal(found[:, tokens[row]][real], expected[real])
        assert not found[:, tokens[row]][~real][:, real].any()


def test_dynamic_rope_of_a_segment_is_that_of_the_segment_alone(tmp_path):
    """Segments of 9 and 11 tokens are longer than the 8 positions, those beside them are not."""
    model = make_llama(tmp_path, **(DYNAMIC | {"max_position_embeddings": 8}))
    tokens, positions, segments = packed()
    together = logits(open_base(tmp_path)[0], {}, tokens, positions, segments)
    for row, lengths in enumerate(LENGTHS):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            # transformers goes on with the longest length that it has seen; a fresh one has seen none.
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
            theirs = torch_logits(model, tokens[row : row + 1, start:end])[0]
            assert_close(together[row, start:end], theirs, 1e-4)


# Decoding


def test_cached_equals_uncached(base, adapter):
    """Left-padded rows of unequal lengths, prefilled in two pieces, then token by token."""
    tokens = random_tokens(300, rows=2, length=12)
    positions = np.stack([np.arange(12), np.arange(12) - 3]).astype(np.int32)
    segments = (positions >= 0).astype(np.int32)
    positions = np.maximum(positions, 0)
    expected = hidden(base, adapter, tokens, positions, segments, "none")

    @jax.jit
    def step(cache, *piece):
        return base.hidden_cached(*piece, cache, adapter=adapter, attention=attention.reference)

    cache = empty_cache(base.cfg, 2, 15, jnp.dtype("float32"))
    pieces, start = [], 0
    for size in (4, 4, 1, 1, 1, 1):
        window = slice(start, start + size)
        states, cache = step(cache, tokens[:, window], positions[:, window], segments[:, window])
        pieces.append(states)
        start += size
    found, real = np.concatenate(pieces, axis=1), segments > 0
    np.testing.assert_allclose(found[real], np.asarray(expected)[real], rtol=0, atol=1e-5)
    assert int(cache.used) == 12 and not np.asarray(cache.segments)[:, 12:].any()


PROMPTS = [[1, 17, 230, 44, 5], [1, 9], [1, *range(40, 75)], [250]]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def pretrained(llama) -> Pretrained:
    return load_pretrained(open_pretrained(str(llama[0]), None, None), jnp.dtype("float32"), one_device_mesh())


def continuations(pretrained, prompts, sampling=Sampling(0.0, 1.0), seed=0) -> list[list[list[int]]]:  # noqa: B008
    return list(
        generate(
            pretrained,
            {},
            prompts,
            kernel=attention.reference,
            dtype=jnp.dtype("float32"),
            max_new_tokens=NEW_TOKENS,
            sampling=sampling,
            seed=seed,
        )
    )


def greedy(model, prompt: list[int], eos: int | list[int]) -> list[int]:
    """transformers' greedy continuation, without a stop token."""
    stops = eos if isinstance(eos, list) else [eos]
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=eos,
        pad_token_id=0,
    )
    new = out[0, len(prompt) :].tolist()
    return new[:-1] if new[-1] in stops else new


def test_greedy_equals_transformers(llama, pretrained):
    *parts, ours = continuations(pretrained, PROMPTS)
    assert ours == [greedy(llama[1], prompt, 2) for prompt in PROMPTS]
    assert [continuations(pretrained, [prompt])[-1][0] for prompt in PROMPTS] == ours
    assert len({tuple(ids) for ids in ours}) == len(PROMPTS)
    for part in parts:  # what is streamed only ever grows
        assert all(whole[: len(ids)] == ids for ids, whole in zip(part, ours, strict=True))


@pytest.mark.parametrize("name", ["window", "dynamic rope"])
def test_greedy_equals_transformers_beyond(name, tmp_path):
    """Prompts and continuations longer than a window, or than the positions that dynamic rope starts from."""
    model = make_mistral(tmp_path) if name == "window" else make_llama(tmp_path, **DYNAMIC)
    make_tokenizer(tmp_path)
    opened = load_pretrained(open_pretrained(str(tmp_path), None, None), jnp.dtype("float32"), one_device_mesh())
    ours = continuations(opened, PROMPTS[:3])[-1]
    for ids, prompt in zip(ours, PROMPTS, strict=False):
        if name == "dynamic rope":
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
        assert ids == greedy(model, prompt, 2)


def test_stops_at_eos(llama, pretrained):
    """Rows end at different tokens, one of them at once; the others go on undisturbed."""
    free = continuations(pretrained, PROMPTS)[-1]
    stops = [free[0][3], free[1][0]]
    config = pretrained.source.config | {"eos_token_id": stops}
    source = dataclasses.replace(pretrained, source=Mock(pretrained.source, config=config))
    ours = continuations(source, PROMPTS)[-1]
    assert ours == [greedy(llama[1], prompt, [2, *stops]) for prompt in PROMPTS]
    assert len(ours[0]) <= 3 and ours[1] == [] and max(map(len, ours)) > 3


PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 20_000


def frequencies(sampling: Sampling, seed: int = 0) -> np.ndarray:
    rows = jnp.asarray(np.tile(np.log(PROBABILITIES), (DRAWS, 1)), jnp.float32)
    return np.bincount(sample(rows, jax.random.key(seed), sampling), minlength=5) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(0.0, 1.0), [0, 1, 0, 0, 0]),
        (Sampling(1.0, 1.0), PROBABILITIES),
        (Sampling(2.0, 1.0), PROBABILITIES**0.5),
        (Sampling(0.5, 1.0), PROBABILITIES**2),
        (Sampling(1.0, 0.6), [0, 0.4, 0, 0.25, 0]),
        (Sampling(1.0, 0.7), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(1.0, 0.01), [0, 1, 0, 0, 0]),
        # The temperature comes first: squared, 0.4 and 0.25 have 0.82 of the mass.
        (Sampling(0.5, 0.8), [0, 0.4**2, 0, 0.25**2, 0]),
    ],
)
def test_sampling_frequencies(sampling, expected):
    expected = np.asarray(expected) / np.sum(expected)
    found = frequencies(sampling)
    assert (found[expected == 0] == 0).all()
    assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9).all(), found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.3), (0.7, 0.9), (1.5, 0.5)])
def test_nucleus_equals_transformers(temperature, top_p):
    scores = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 2
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores))
    for row in range(6):
        rows = jnp.tile(jnp.asarray(scores[row].numpy())[None], (4000, 1))
        drawn = np.unique(sample(rows, jax.random.key(row), Sampling(temperature, top_p)))
        allowed = np.flatnonzero(np.isfinite(warped[row].numpy()))
        assert set(drawn) <= set(allowed)
        likely = np.flatnonzero(torch.softmax(warped[row], 0).numpy() > 0.005)
        assert set(likely) <= set(drawn)


def test_sampling_depends_on_the_seed_alone(pretrained):
    assert (frequencies(Sampling(1.0, 0.9), 1) == frequencies(Sampling(1.0, 0.9), 1)).all()
    assert (frequencies(Sampling(1.0, 0.9), 1) != frequencies(Sampling(1.0, 0.9), 2)).any()
    twins = [PROMPTS[2]] * len(PROMPTS)
    first, again, other = (continuations(pretrained, twins, Sampling(1.0, 0.95), seed)[-1] for seed in (1, 1, 2))
    assert first == again and first != other
    assert len(set(map(tuple, first))) == len(twins)  # rows draw independently
