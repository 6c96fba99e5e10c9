"""A tiny model of each family beside Llama, no numerics field at its default, as transformers makes it."""

from pathlib import Path
from typing import Any

import torch
from tiny import LLAMA3_ROPE, OFF_DEFAULT, save_random
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 523.0}
PLAIN = {"rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 523.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.3, 1.9], "long_factor": [1.1, 3.7, 9.0]}
WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}

# Shorter than what is decoded in tests, and the windows shorter than both.
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama_biased": LlamaConfig(
        **OFF_DEFAULT | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 9.0}}
    ),
    "qwen2_tied": Qwen2Config(**OFF_DEFAULT | {"tie_word_embeddings": True}),
    "qwen2_windowed_yarn": Qwen2Config(**OFF_DEFAULT | WINDOWED | {"rope_parameters": YARN}),
    "qwen2_window_that_is_off": Qwen2Config(**OFF_DEFAULT | WINDOWED | {"max_window_layers": 3}),
    "qwen3": Qwen3Config(**OFF_DEFAULT | WINDOWED | {"max_window_layers": 1, "rope_parameters": YARN}),
    "qwen3_biased_tied": Qwen3Config(**OFF_DEFAULT | {"attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": GPT2Config(
        **{"vocab_size": 300, "n_embd": 48, "n_inner": 88, "n_layer": 3, "n_head": 6, "n_positions": 90},
        **{"layer_norm_epsilon": 3e-4, "activation_function": "gelu", "initializer_range": 0.2},
        **{"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0},
        **{"attn_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "gpt2_tied": GPT2Config(
        **{"vocab_size": 300, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 90, "initializer_range": 0.2},
        **{"bos_token_id": 1, "eos_token_id": 2},
    ),
    "gemma3": Gemma3TextConfig(
        **OFF_DEFAULT
        | {"sliding_window": 7, "query_pre_attn_scalar": 23, "attention_bias": True}
        | {"final_logit_softcapping": 9.0, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"rope_parameters": {"sliding_attention": PLAIN | {"rope_theta": 91.0}, "full_attention": LINEAR}},
        hidden_activation="gelu",
    ),
    "gemma3_pattern_tied": Gemma3TextConfig(
        **OFF_DEFAULT | {"tie_word_embeddings": True, "sliding_window": 9, "sliding_window_pattern": 2},
    ),
    "gemma2": Gemma2Config(
        **OFF_DEFAULT
        | {"sliding_window": 7, "query_pre_attn_scalar": 23, "attn_logit_softcapping": 3.0}
        | {"final_logit_softcapping": 5.0, "hidden_activation": "gelu"}
    ),
    "phi3": Phi3Config(
        **OFF_DEFAULT
        | {"sliding_window": 7, "hidden_act": "gelu", "pad_token_id": 0, "head_dim": 8, "num_key_value_heads": 3}
        | {"rope_parameters": PLAIN | {"rope_theta": 91.0, "partial_rotary_factor": 0.75}}
    ),
    # Rows and answers of the tests are shorter and longer than its first context.
    "phi3_longrope": Phi3Config(
        **OFF_DEFAULT
        | {"sliding_window": None, "pad_token_id": 0, "head_dim": 8, "original_max_position_embeddings": 40}
        | {"rope_parameters": LONG | {"rope_theta": 91.0, "partial_rotary_factor": 0.75}}
    ),
}
# One of each family, its windows, ropes and biases there.
ONE_EACH = ("llama_biased", "qwen2_windowed_yarn", "qwen3", "gpt2", "gemma3", "gemma2", "phi3")


def make_family(folder: Path, name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The model of that name with random weights, float32, saved to `folder`."""
    torch.manual_seed(seed)
    config = FAMILIES[name]
    config = type(config)(**config.to_dict() | overrides) if overrides else config
    return save_random(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), folder)
