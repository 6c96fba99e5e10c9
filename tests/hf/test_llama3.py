"""Llama 3.1 and 3.2 by the values of their published config.json: rotary frequencies, logits far out, and ends."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_close, logits, open_base, random_tokens
from tiny import make_tokenizer, save_random
from transformers import LlamaConfig, LlamaForCausalLM

from jlora.hf.pretrained import load_pretrained, open_pretrained, stop_tokens
from jlora.inference.generate import GREEDY, generate
from jlora.inference.model import Adapted
from jlora.model.rope import rope_frequencies
from jlora.model.sharding import one_device_mesh

STOPS = [128001, 128008, 128009]
SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALING |= {"rope_type": "llama3"}
# As on the hub, but for widths, layers and the range that random weights are drawn from.
SHARED = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0},
    **{"bos_token_id": 128000, "eos_token_id": STOPS, "hidden_act": "silu", "max_position_embeddings": 131072},
    **{"mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "use_cache": True},
    **{"vocab_size": 128256, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"initializer_range": 0.1, "torch_dtype": "float32"},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "3.1-8B": SHARED
    | {"rope_scaling": SCALING | {"factor": 8.0}, "tie_word_embeddings": False}
    | {"num_attention_heads": 1, "num_key_value_heads": 1},
    "3.2-1B": SHARED
    | {"rope_scaling": SCALING | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 64}
    | {"num_attention_heads": 4, "num_key_value_heads": 1},
}
PROMPTS = [[128000, 17, 230, 44, 5], [128000, 9], [128000, *range(40, 59)]]


@pytest.fixture(scope="module", params=PUBLISHED)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose greedy answers to `PROMPTS` end at one of the three ids each, at the second to fourth token."""
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**PUBLISHED[request.param]))
    save_random(model, path)
    for place, (prompt, stop) in enumerate(zip(PROMPTS, STOPS, strict=True), 1):
        with torch.no_grad():
            answer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=4, eos_token_id=2)
            rows = [int(answer[0, len(prompt) + place]), stop]
            model.lm_head.weight[rows] = model.lm_head.weight[rows[::-1]]
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(PUBLISHED[request.param]))
    tokenizer = make_tokenizer(path, 128256)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(STOPS[0])
    tokenizer.save_pretrained(path)
    return path


def test_frequencies_and_logits_are_those_of_transformers(folder: Path) -> None:
    """At positions as far as the context reaches."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    base, _ = open_base(folder)
    (rope,) = base.cfg.ropes
    np.testing.assert_allclose(rope_frequencies(rope), model.model.rotary_emb.inv_freq.numpy(), rtol=2e-7)
    assert (rope.dim, rope.theta) == (model.config.head_dim, 500000.0)
    tokens = random_tokens(128256)
    places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32) * 5600, tokens.shape)
    with torch.no_grad():
        right = model(torch.from_numpy(tokens).long(), position_ids=torch.from_numpy(places.copy()).long()).logits
    assert_close(logits(base, {}, tokens, places), right.numpy(), 1e-4)


def test_each_of_several_ids_ends_an_answer(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    pretrained = load_pretrained(open_pretrained(str(folder), None, None), jnp.dtype("float32"), one_device_mesh())
    assert stop_tokens(pretrained.tokenizer, pretrained.source.config) == model.generation_config.eos_token_id == STOPS
    *_, found = generate(
        Adapted(pretrained, {}, jnp.dtype("float32")), PROMPTS, max_new_tokens=16, sampling=GREEDY, seed=0
    )
    for prompt, ours, stop in zip(PROMPTS, found, STOPS, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)[0]
        assert [*ours, stop] == theirs[len(prompt) :].tolist() and len(ours) in (1, 2, 3)
