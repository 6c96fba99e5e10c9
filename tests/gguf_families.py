"""Models of transformers in GGUF files, written by the `gguf` package as llama.cpp's converter writes each family."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import LONG, PLAIN
from gguf import MODEL_ARCH, GGUFWriter
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from gguf.tensor_mapping import get_tensor_name_map
from gguf_files import SPM, permute
from tiny import OFF_DEFAULT, save_random
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = len(SPM["tokens"])
# Widths of whole blocks of Q8_0.
WIDE = OFF_DEFAULT | {
    **{"vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 160, "head_dim": 32},
    **{"initializer_range": 0.1},
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 523.0}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "sliding_window": 7}
GPT2 = {"vocab_size": VOCAB, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 90, "initializer_range": 0.1}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "layer_norm_epsilon": 3e-4}
PHI3 = WIDE | {"pad_token_id": 0, "head_dim": 16, "num_key_value_heads": 3}

# Every numerics field off its default that a file of the family can hold.
MODELS: dict[str, PreTrainedConfig] = {
    "llama3": LlamaConfig(**WIDE | {"rope_parameters": LLAMA3}),
    "mistral": MistralConfig(**WIDE | {"sliding_window": None, "rope_parameters": LINEAR}),
    "qwen2_tied": Qwen2Config(**WIDE | {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "qwen3": Qwen3Config(**WIDE | {"rope_parameters": LINEAR}),
    "gpt2": GPT2Config(**GPT2 | {"n_inner": 160, "tie_word_embeddings": False}),
    "gpt2_tied": GPT2Config(**GPT2),
    "gemma2": Gemma2Config(
        **WIDE | GEMMA | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
    ),
    # Of its largest size the scores are scaled otherwise.
    "gemma2_of_46_layers": Gemma2Config(**WIDE | GEMMA | {"query_pre_attn_scalar": 16, "num_hidden_layers": 46}),
    "gemma3": Gemma3TextConfig(
        **WIDE
        | GEMMA
        | {"query_pre_attn_scalar": 32, "final_logit_softcapping": 9.0, "tie_word_embeddings": False}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        | {"rope_parameters": {"sliding_attention": PLAIN | {"rope_theta": 91.0}, "full_attention": LINEAR}}
    ),
    "phi3": Phi3Config(
        **PHI3 | {"sliding_window": 7, "rope_parameters": PLAIN | {"rope_theta": 91.0, "partial_rotary_factor": 0.75}}
    ),
    "phi3_longrope": Phi3Config(
        **PHI3
        | {"sliding_window": None, "original_max_position_embeddings": 20}
        | {
            "rope_parameters": LONG
            | {"short_factor": [1.0, 1.1, 1.3, 1.4, 1.6, 1.9], "long_factor": [1.1, 2.0, 3.7, 5.0, 7.0, 9.0]}
            | {"rope_theta": 91.0, "partial_rotary_factor": 0.75}
        }
    ),
}
ARCHES = {"gemma3_text": "gemma3", "mistral": "llama"}


def make(path: Path, name: str, **others: Any) -> PreTrainedModel:
    """The model of that name with random weights, its matrices as Q8_0 holds them, and its GGUF file at `path`.

    Args:
      others: keys of the architecture, with __ for dots, that the file has otherwise.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="eager")
    model = save_random(model, path.parent / f"{name}-saved")
    convert(path, model, {key.replace("__", "."): value for key, value in others.items()})
    return model


def convert(path: Path, model: PreTrainedModel, others: dict[str, Any]) -> None:
    """Writes the file, and gives the model what is read from it again."""
    config, arch = model.config, ARCHES.get(model.config.model_type, model.config.model_type)
    numbered = {name: number for number, name in ((a, a.name.lower()) for a in MODEL_ARCH)}[arch]
    writer = GGUFWriter(path, arch)
    for key, value in (metadata(config) | others).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{arch}.{key}", value)
    scaling = {} if arch in ("gpt2", "phi3") else getattr(config, "rope_parameters", {})
    scaling = scaling.get("full_attention", scaling)
    if scaling.get("rope_type") == "linear":
        writer.add_string(f"{arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{arch}.rope.scaling.factor", scaling["factor"])
    for key, value in SPM.items():
        add = writer.add_string if isinstance(value, str) else writer.add_array
        add(f"tokenizer.ggml.{key}", value)
    table, state = get_tensor_name_map(numbered, config.num_hidden_layers), model.state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value, stored = tensor.numpy(), table.get_name(name, (".weight", ".bias"))
        turned = arch == "gpt2" and ".h." in name and value.ndim == 2  # Conv1D's
        value = np.ascontiguousarray(value.T) if turned else value
        kind = Type.Q8_0 if value.ndim == 2 else Type.F32
        held = dequantize(quantize(value, kind), kind)
        tensor.copy_(torch.from_numpy((held.T if turned else held).copy()))
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            value = permute(value, value.shape[0] // config.head_dim)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        writer.add_tensor(stored, quantize(value, kind), raw_dtype=kind)
    for name, values in divisors(config).items():
        writer.add_tensor(f"{name}.weight", np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(config: PreTrainedConfig) -> dict[str, Any]:
    """Numbers of the architecture, as `set_gguf_parameters` of each of the converter's classes writes them."""
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    if config.model_type == "gpt2":
        inner = config.n_inner or 4 * config.n_embd
        return found | {"feed_forward_length": inner, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    found |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
    }
    if config.model_type == "phi3":
        found["rope.dimension_count"] = int(rope["partial_rotary_factor"] * config.hidden_size) // 6
        found["rope.scaling.original_context_length"] = config.original_max_position_embeddings
        found["attention.sliding_window"] = config.sliding_window or 0
        if "long_factor" in rope:
            growth = config.max_position_embeddings / config.original_max_position_embeddings
            factor = math.sqrt(1 + math.log(growth) / math.log(config.original_max_position_embeddings))
            found["rope.scaling.attn_factor"] = factor
        return found
    found |= dict.fromkeys(("attention.key_length", "attention.value_length"), config.head_dim)
    if config.model_type in ("gemma2", "gemma3_text"):
        found["attention.sliding_window"] = config.sliding_window
        if config.final_logit_softcapping:
            found["final_logit_softcapping"] = config.final_logit_softcapping
    if config.model_type == "gemma2":
        found["attn_logit_softcapping"] = config.attn_logit_softcapping
    if config.model_type == "gemma3_text":
        found["attention.sliding_window_pattern"] = 1 + config.layer_types.index("full_attention")
        found["rope.freq_base_swa"] = config.rope_parameters["sliding_attention"]["rope_theta"]
    return found


def divisors(config: PreTrainedConfig) -> dict[str, list[float]]:
    """Of rotary frequencies, as `generate_extra_tensors` writes them."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "long_factor" in rope:
        return {"rope_factors_long": rope["long_factor"], "rope_factors_short": rope["short_factor"]}
    if rope.get("rope_type") != "llama3":
        return {}
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    found = []
    for place in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (place / config.head_dim)
        if wavelength < original / rope["high_freq_factor"]:
            found.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            found.append(factor)
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs": found}
