"""Model families beside Llama: what their config.json says, and the way out to transformers and PEFT."""

import numpy as np
import pytest
from families import ONE_EACH, WINDOWED, make_family
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from tiny import make_completions, make_tokenizer, write_config
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from jlora.config import load_config
from jlora.errors import ModelError
from jlora.hf.architecture import parse_config
from jlora.hf.source import open_source
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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers"),
        ({"use_sliding_window": True, "layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "the nearest is Qwen3ForCausalLM"),
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ],
)
def test_what_is_not_supported_is_named(changes, says):
    raw = {"model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "vocab_size": 100, "num_key_value_heads": 2, "sliding_window": 9}
    parse_config(raw, "here")
    with pytest.raises(ModelError) as caught:
        parse_config(raw | changes, "here")
    assert says in str(caught.value) and "\n" not in str(caught.value)


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
