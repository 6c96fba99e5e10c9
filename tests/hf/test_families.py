"""Model families beside Llama: what their config.json says, and the way out to transformers and PEFT."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import ONE_EACH, WINDOWED, make_family
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny import make_completions, make_tokenizer, write_config
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, Phi3Config, Qwen2Config, Qwen3Config

from jlora.config import LoraSection, load_config
from jlora.errors import ConfigError, ModelError
from jlora.hf.architecture import parse_config
from jlora.hf.peft import load_adapter, read_options, save_adapter
from jlora.hf.pretrained import load_pretrained, open_pretrained
from jlora.hf.source import open_source
from jlora.inference.generate import generate
from jlora.inference.model import Adapted
from jlora.model.adapter import targets
from jlora.model.adapter_init import check_options
from jlora.model.sharding import one_device_mesh
from jlora.planning.compiled import abstract_step
from jlora.training.export import export
from jlora.training.run import train
from jlora.training.step import count_parameters, make_forward


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_defaults_are_those_of_transformers(config):
    raw = {"model_type": config.model_type, "hidden_size": 256, "num_attention_heads": 32, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "vocab_size": 100, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    for more in ({}, {"sliding_window": 5}, {"num_key_value_heads": 4}, WINDOWED, WINDOWED | {"sliding_window": None}):
        ours, theirs = parse_config(raw | more, "here"), config(**(raw | more))
        for field in ("num_key_value_heads", "tie_word_embeddings"):
            assert getattr(ours, field) == getattr(theirs, field), (field, more)
        assert ours.head_dim == getattr(theirs, "head_dim", 256 // 32)
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.windows == (theirs.sliding_window,)
        (rope,) = ours.ropes
        assert rope.theta == theirs.rope_parameters["rope_theta"] and rope.dim == ours.head_dim
        assert rope.scaling.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize("config", [Gemma2Config, Gemma3TextConfig, Phi3Config])
def test_what_gemma_and_phi_leave_unsaid(config):
    """A config.json as transformers 4 wrote it, with nothing that its class knows by itself."""
    raw = {"model_type": config.model_type, "hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 14, "vocab_size": 100}
    told = {"sliding_window": 5, "sliding_window_pattern": 3, "rope_theta": 9.0, "tie_word_embeddings": False}
    for more in ({}, told, {"sliding_window": None, "rope_scaling": None}):
        ours, theirs = parse_config(raw | more, "here"), config(**(raw | more))
        kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 14
        windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        assert list(ours.windows * (14 // len(ours.windows))) == windows, more
        settings = theirs.rope_parameters
        thetas = [(settings.get(kind) or settings)["rope_theta"] for kind in kinds]
        assert [rope.theta for rope in ours.ropes * (14 // len(ours.ropes))] == thetas, more
        assert ours.norm_eps == theirs.rms_norm_eps and ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.num_key_value_heads == theirs.num_key_value_heads
        assert ours.head_dim == getattr(theirs, "head_dim", 32)
        assert ours.attention_softcap == (50.0 if config is Gemma2Config else None)
        assert ours.logits_softcap == getattr(theirs, "final_logit_softcapping", None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers"),
        ({"use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "the nearest is Qwen3ForCausalLM"),
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True",
        ),
        (
            {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "rope_scaling": {"rope_type": "longrope"}},
            "rope_scaling.short_factor must be a list of",
        ),
        (
            {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention=True",
        ),
        (
            {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": {}},
            "the nearest is Gemma3ForConditionalGeneration",
        ),
        ({"hidden_act": "relu2"}, "hidden_act='relu2'"),
    ],
)
def test_what_is_not_supported_is_named(changes, says):
    raw = {"model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "vocab_size": 100, "num_key_value_heads": 2, "sliding_window": 9}
    parse_config(raw, "here")
    with pytest.raises(ModelError) as caught:
        parse_config(raw | changes, "here")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("name", ONE_EACH)
def test_from_import_to_merge(name, tmp_path):
    """Trained, planned, exported as an adapter that PEFT reads, and merged into a folder that transformers reads."""
    base = tmp_path / "base"
    model = make_family(base, name)
    make_tokenizer(base)
    rows = make_completions(tmp_path / "rows.jsonl")
    data = {"format": "completion", "max_length": 64}
    cfg = load_config(write_config(tmp_path / "run.yaml", base, rows, tmp_path / "run", data=data))
    summary = train(cfg, quiet=True)
    result = export(tmp_path / "run", tmp_path / "adapter", None, False, None, True)
    assert result["peft_relative_difference"] < 1e-4
    export(tmp_path / "run", tmp_path / "merged", None, True, "float32", False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(merged) is type(model) and merged.state_dict().keys() == model.state_dict().keys()
    tokens = random_tokens(300)
    assert_close(logits(open_base(tmp_path / "merged")[0], {}, tokens), torch_logits(merged, tokens), 1e-4)
    assert np.abs(torch_logits(merged, tokens) - logits(open_base(base)[0], {}, tokens)).max() > 1e-3

    shape, mesh = parse_config(open_source(base).config, "base"), one_device_mesh()
    _, (state, frozen, *_), _ = abstract_step(cfg, shape, mesh, make_forward(cfg, shape, mesh)[1])
    assert count_parameters(frozen["base"]) == summary["frozen_params"]
    assert count_parameters(state.trained) == summary["trainable_params"]


def test_gpt2_as_it_is_published(tmp_path):
    """Without the body's name, with the masks of old versions as tensors, and with a head that is not stored."""
    model = make_family(tmp_path / "base", "gpt2_tied")
    expected = logits(open_base(tmp_path / "base")[0], {}, random_tokens(300))
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    assert "wte.weight" in tensors and "lm_head.weight" not in tensors
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 90, 90), np.float32))
        tensors[f"h.{layer}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    found = logits(open_base(tmp_path / "base")[0], {}, random_tokens(300))
    np.testing.assert_array_equal(found, expected)
    assert_close(found, torch_logits(model, random_tokens(300)), 1e-4)


def test_gpt2_adapters_both_ways(tmp_path):
    """PEFT's names of modules that are called alike, its fan_in_fan_out, and its modules_to_save."""
    make_family(tmp_path / "base", "gpt2")
    base, base_hash = open_base(tmp_path / "base")
    options = {"r": 4, "target_modules": ["c_attn", "mlp.c_proj"], "modules_to_save": ["wte"], "fan_in_fan_out": True}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(**options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "theirs")
    section = read_options(tmp_path / "theirs", base.cfg)
    assert section.targets == ("down_proj", "qkv_proj") and section.modules_to_save == ["embed_tokens"]
    adapter = load_adapter(tmp_path / "theirs", base.cfg, base_hash, 0.0)
    tokens = random_tokens(300)
    assert_close(logits(base, adapter, tokens), torch_logits(model, tokens), 1e-4)
    save_adapter(tmp_path / "ours", adapter, section, "base", base_hash, base.cfg.names)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True and config["target_modules"] == ["mlp.c_proj", "attn.c_attn"]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours").eval()
    assert_close(torch_logits(again, tokens), torch_logits(model, tokens), 1e-5)


@pytest.mark.parametrize(
    ("named", "means"),
    [
        ("all-linear", ("qkv_proj", "o_proj", "up_proj", "down_proj")),
        (["q_proj", "k_proj", "v_proj", "o_proj"], ("qkv_proj", "o_proj")),
        (["qkv_proj"], ("qkv_proj",)),
        (["q_proj", "o_proj"], "names q_proj"),
        (["gate_proj", "up_proj"], "names gate_proj"),
    ],
)
def test_targets_of_fused_projections(named, means, tmp_path):
    make_family(tmp_path, "gpt2")
    model, section = open_source(tmp_path).model, LoraSection(target_modules=named)
    if isinstance(means, tuple):
        check_options(section, model)
        assert targets(section, model) == means
        return
    with pytest.raises(ConfigError, match=f"lora.target_modules {means}, which this model has no projection for"):
        check_options(section, model)


def test_positions_end_where_gpt2_learned_none(tmp_path):
    make_family(tmp_path / "base", "gpt2")
    make_tokenizer(tmp_path / "base")
    rows = make_completions(tmp_path / "rows.jsonl")
    data = {"format": "completion", "max_length": 91}
    with pytest.raises(ConfigError, match="data.max_length of 91 tokens is beyond the 90 positions"):
        train(load_config(write_config(tmp_path / "c.yaml", tmp_path / "base", rows, tmp_path / "run", data=data)))
    pretrained = load_pretrained(
        open_pretrained(str(tmp_path / "base"), None, None), jnp.dtype("float32"), one_device_mesh()
    )
    with pytest.raises(ConfigError, match="a prompt with its answer of 91 tokens is beyond the 90 positions"):
        next(generate(Adapted(pretrained, {}, jnp.dtype("float32")), [[1] * 50], max_new_tokens=41))
