"""Sizes of published models by name, for a plan without any file of the model: keys of their config.json."""

from typing import Any

_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)


def _sizes(*values: int) -> dict[str, Any]:
    return dict(zip(_KEYS, values, strict=True))


_LLAMA2 = {"model_type": "llama", "rms_norm_eps": 1e-5}
_GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_PHI4 = {"model_type": "phi3", "rms_norm_eps": 1e-5, "rope_theta": 250000.0, "max_position_embeddings": 16384}
_QWEN3 = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "head_dim": 128, "rope_theta": 1e6}


def _gpt2(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "vocab_size": 50257}


SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": _LLAMA2 | _sizes(4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": _LLAMA2 | _sizes(5120, 13824, 40, 40, 40, 32000),
    "llama2-70b": _LLAMA2 | _sizes(8192, 28672, 80, 64, 8, 32000),
    "qwen3-8b": _QWEN3 | _sizes(4096, 12288, 36, 32, 8, 151936),
    "qwen3-32b": _QWEN3 | _sizes(5120, 25600, 64, 64, 8, 151936),
    "gemma3-12b": _GEMMA3 | _sizes(3840, 15360, 48, 16, 8, 262208) | {"head_dim": 256},
    "gemma3-27b": _GEMMA3 | _sizes(5376, 21504, 62, 32, 16, 262208) | {"head_dim": 128, "query_pre_attn_scalar": 168},
    "phi4-14b": _PHI4 | _sizes(5120, 17920, 40, 40, 10, 100352),
    "distilgpt2": _gpt2(768, 6, 12),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}
