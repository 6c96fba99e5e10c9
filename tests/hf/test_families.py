"""Model families beside Llama: what their config.json says, their logits, and the way out to transformers and PEFT."""

from typing import Any

import numpy as np
import pytest
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from tiny import LLAMA3_ROPE, make_completions, make_llama, make_qwen2, make_tokenizer, write_config
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from jlora.config import load_config
from jlora.errors import ModelError
from jlora.hf.architecture import parse_config
from jlora.hf.source import open_source
from jlora.model.sharding import one_device_mesh
from jlora.planning.compiled import abstract_step
from jlora.training.export import export
from jlora.training.run import train
from jlora.training.step import count_parameters, make_forward

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 523.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2_tied": (make_qwen2, {"tie_word_embeddings": True}),
    "qwen2_windowed_yarn": (make_qwen2, WINDOWED | {"rope_parameters": YARN}),
    "qwen2_window_that_is_off": (make_qwen2, WINDOWED | {"max_window_layers": 3}),
    "llama_biased": (
        make_llama,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 9.0}},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tmp_path):
    make, options = MODELS[name]
    model = make(tmp_path, **options)
    base, _ = open_base(tmp_path)
    tokens = random_tokens(300)
    assert_close(logits(base, {}, tokens), torch_logits(model, tokens), 1e-4)
    biases = [param for leaf, param in vars(base.layers).items() if leaf.endswith("_bias")]
    assert len(biases) == (7 if name == "llama_biased" else 3)
    assert all(np.abs(np.asarray(bias[...])).min(axis=-1).max() > 0 for bias in biases)


def test_defaults_of_qwen2_are_those_of_transformers():
    raw = {"model_type": "qwen2", "hidden_size": 256, "num_attention_heads": 32, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "vocab_size": 100, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    for more in ({}, {"sliding_window": 5}, {"num_key_value_heads": 4}, WINDOWED, WINDOWED | {"sliding_window": None}):
        ours, theirs = parse_config(raw | more, "here"), Qwen2Config(**(raw | more))
        for field in ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "sliding_window"):
            assert getattr(ours, field) == getattr(theirs, field), (field, more)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.rope_scaling.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers=1"),
        ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"model_type": "qwen3"}, "model_type='qwen3'"),
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


def test_qwen2_from_import_to_merge(tmp_path):
    """Trained, planned, exported as an adapter that PEFT reads, and merged into a folder that transformers reads."""
    base = tmp_path / "base"
    make_qwen2(base, tie_word_embeddings=True)
    make_tokenizer(base)
    rows = make_completions(tmp_path / "rows.jsonl")
    data = {"format": "completion", "max_length": 64}
    cfg = load_config(write_config(tmp_path / "run.yaml", base, rows, tmp_path / "run", data=data))
    summary = train(cfg, quiet=True)
    result = export(tmp_path / "run", tmp_path / "adapter", None, False, None, True)
    assert result["peft_relative_difference"] < 1e-4
    export(tmp_path / "run", tmp_path / "merged", None, True, "float32", False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(merged) is Qwen2ForCausalLM
    tokens = random_tokens(300)
    assert_close(logits(open_base(tmp_path / "merged")[0], {}, tokens), torch_logits(merged, tokens), 1e-4)
    assert np.abs(torch_logits(merged, tokens) - logits(open_base(base)[0], {}, tokens)).max() > 1e-3

    model, mesh = parse_config(open_source(base).config, "base"), one_device_mesh()
    _, (state, frozen, *_), _ = abstract_step(cfg, model, mesh, make_forward(cfg, model, mesh)[1])
    assert count_parameters(frozen["base"]) == summary["frozen_params"]
    assert count_parameters(state.trained) == summary["trainable_params"]
