"""Decoding with a cache, against transformers; and sampling, against the probabilities asked for."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from grown_adapters import random_adapter
from parity import hidden, open_base, random_tokens
from ropes import DYNAMIC
from tiny import copy_folder, make_llama, make_mistral, make_tokenizer
from transformers import LlamaForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from jlora.hf.pretrained import Pretrained, load_pretrained, open_pretrained, stop_tokens, tokenizer_of
from jlora.inference.generate import GREEDY, Sampling, generate, sample
from jlora.inference.model import Adapted
from jlora.model import attention
from jlora.model.llama import empty_cache
from jlora.model.sharding import one_device_mesh


def test_cached_equals_uncached(llama):
    """Left-padded rows of unequal lengths, prefilled in two pieces, then token by token."""
    base, _ = open_base(llama[0])
    adapter = random_adapter(base)
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


def continuations(pretrained, prompts, sampling=GREEDY, seed=0) -> list[list[list[int]]]:
    return list(
        generate(
            Adapted(pretrained, {}, jnp.dtype("float32")),
            prompts,
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
    told = copy.copy(pretrained.source)
    told.config = told.config | {"eos_token_id": stops}
    source = dataclasses.replace(pretrained, source=told)
    ours = continuations(source, PROMPTS)[-1]
    assert ours == [greedy(llama[1], prompt, [2, *stops]) for prompt in PROMPTS]
    assert len(ours[0]) <= 3 and ours[1] == [] and max(map(len, ours)) > 3


def test_stops_at_what_the_generation_config_names(llama, pretrained, tmp_path):
    """As in transformers: chat models end a turn by ids that their config.json lacks."""
    *_, free = continuations(pretrained, PROMPTS)
    folder = copy_folder(llama[0], tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[0][3], free[1][0]]}))
    told = load_pretrained(open_pretrained(str(folder), None, None), jnp.dtype("float32"), one_device_mesh())
    *_, ours = continuations(told, PROMPTS)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert ours == [greedy(model, prompt, model.generation_config.eos_token_id) for prompt in PROMPTS]
    assert ours != free and ours[1] == []
    assert {2, free[0][3], free[1][0]} <= {*stop_tokens(*tokenizer_of(str(folder), None, None))}


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
