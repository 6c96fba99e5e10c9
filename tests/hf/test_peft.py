"""Adapters written for readers that know less than PEFT does."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import OFF_DEFAULT, make_llama

from jlora.config import LoraSection
from jlora.hf.adapter_config import read_adapter_config
from jlora.hf.adapter_forms import scaled_to
from jlora.hf.architecture import parse_config
from jlora.hf.peft import factor_name, load_adapter, save_adapter
from jlora.hf.source import open_source
from jlora.model.adapter import Lora, layer_ranks, layer_scales
from jlora.model.adapter_init import new_adapter
from jlora.model.config import LLAMA

PATTERNS = {
    "ranks": {"rank_pattern": {"layers.0.self_attn.q_proj": 3, "down_proj": 7}},
    "alphas": {"alpha_pattern": {"layers.0.self_attn.v_proj": 3.5, "down_proj": 16.0}},
    "both": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"q_proj": 5.0, "layers.1": 1.5}},
    "rslora": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5.0}, "use_rslora": True},
    "a layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5.0}, "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_llama(folder, **OFF_DEFAULT)
    return parse_config(open_source(folder).config, "base")


def drawn(section: LoraSection, model):
    rng = np.random.default_rng(0)
    return {
        name: dataclasses.replace(part, lora_b=jnp.asarray(rng.normal(size=part.lora_b.shape), jnp.float32))
        for name, part in new_adapter(section, model, 0).items()
    }


@pytest.mark.parametrize("name", PATTERNS)
def test_a_reader_that_knows_one_scale_has_the_adapter_right(model, name, tmp_path):
    """vLLM multiplies every module by `lora_alpha / r`, or with rsLoRA by `lora_alpha / sqrt(r)`."""
    section = LoraSection(rank=4, alpha=8.0, target_modules="all-linear", **PATTERNS[name])
    adapter = drawn(section, model)
    save_adapter(tmp_path, adapter, section, "base", "hash")
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    one = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    read = read_adapter_config(tmp_path, model)
    for projection in section.targets:
        scales = layer_scales(section, projection, model)
        peft = layer_scales(read, projection, model)
        for layer, rank in enumerate(layer_ranks(section, projection, model)):
            if not rank:
                assert factor_name(LLAMA, projection, layer, "lora_A.weight") not in tensors
                continue
            a, b = (tensors[factor_name(LLAMA, projection, layer, f"lora_{x}.weight")] for x in "AB")
            part = adapter[projection]
            ours_a = np.asarray(part.lora_a[layer]).reshape(-1, part.lora_a.shape[-1])[:, :rank]
            ours_b = np.asarray(part.lora_b[layer]).reshape(part.lora_b.shape[1], -1)[:rank]
            np.testing.assert_allclose(one * (b @ a).T, scales[layer] * ours_a @ ours_b, rtol=1e-5, atol=1e-6)
            assert peft[layer] == pytest.approx(one, rel=1e-6)  # PEFT, which reads the patterns, comes to the same


def test_another_scale_is_made_up_for_by_b(model, tmp_path):
    """What `lora.init_from` does with an adapter whose alphas differ from the config's."""
    section = LoraSection(rank=4, alpha=8.0, **PATTERNS["both"])
    save_adapter(tmp_path, drawn(section, model), section, "base", "hash")
    read = load_adapter(tmp_path, model, "hash", 0.0)
    for name, part in read.items():
        assert isinstance(part, Lora)
        scales = layer_scales(section, name, model)
        back = scaled_to(part, scales)
        np.testing.assert_array_equal(back.scale, scales)
        np.testing.assert_allclose(back.lora_b, drawn(section, model)[name].lora_b, rtol=1e-6, atol=0)
