"""Tiny random Llamas, written as Hugging Face folders by transformers itself, and rows to train them on."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jlora.hf.architecture import parse_config
from jlora.model.config import ModelConfig

# No numerics field has its default here, and no two dims are equal.
OFF_DEFAULT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 3e-4,
    "rope_theta": 523.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_llama(folder: Path, *, shard: str | None = None, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama in float32, saved to `folder`; norm weights are random too, so that they matter.

    Args:
      shard: largest shard, such as "50KB", for a sharded checkpoint with an index.
    """
    torch.manual_seed(seed)
    return save_random(LlamaForCausalLM(LlamaConfig(**(OFF_DEFAULT | overrides))), folder, shard)


def make_mistral(folder: Path, *, seed: int = 0, **overrides: Any) -> MistralForCausalLM:
    """As `make_llama`, a Mistral; its window is shorter than the tests' rows."""
    torch.manual_seed(seed)
    return save_random(MistralForCausalLM(MistralConfig(**(OFF_DEFAULT | {"sliding_window": 7} | overrides))), folder)


def make_qwen2(folder: Path, *, seed: int = 0, **overrides: Any) -> Qwen2ForCausalLM:
    """As `make_llama`, a Qwen2, whose q, k and v have biases."""
    torch.manual_seed(seed)
    return save_random(Qwen2ForCausalLM(Qwen2Config(**(OFF_DEFAULT | overrides))), folder)


def make_qwen3(folder: Path, *, seed: int = 0, **overrides: Any) -> Qwen3ForCausalLM:
    """As `make_llama`, a Qwen3, whose heads have norms."""
    torch.manual_seed(seed)
    return save_random(Qwen3ForCausalLM(Qwen3Config(**(OFF_DEFAULT | overrides))), folder)


def shape_of(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, **keys: Any
) -> ModelConfig:
    """The shape of a Llama without any files."""
    raw = {"model_type": "llama", "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    raw |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return parse_config(raw | {"rms_norm_eps": 1e-5} | keys, "here")


def save_random(model: PreTrainedModel, folder: Path, shard: str | None = None) -> Any:
    """The fresh model in float32, its norms and biases random too, as it was saved to `folder`."""
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and any(norm in name for norm in ("norm", "ln_")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model


def make_tokenizer(
    folder: Path, vocab_size: int = 300, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with <s> and </s> as 1 and 2, that adds <s>, saved to `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<unk>", "<s>", "</s>", *alphabet, *map("".join, merges)]
    pieces += [f"<extra_{i}>" for i in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def make_rows(path: Path, count: int = 24, first: int = 0) -> Path:
    """Alpaca rows of very unequal lengths, numbered from `first`."""
    rows = [
        {
            "instruction": f"Say {word} {first + i} times.",
            "input": "" if i % 3 else "Politely.",
            "output": " ".join([word] * (1 + i % 7)) + ".",
        }
        for i, word in zip(range(count), ["blue", "tree", "a", "mountain", "so"] * count, strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_completions(path: Path, count: int = 24, first: int = 0) -> Path:
    """Short rows of format `completion`, of very unequal lengths, so that several fit in a packed row."""
    words = ["blue", "tree", "a", "mountain", "so"] * count
    rows = [
        {"prompt": f"{word} {first + i}:", "completion": " " + " ".join([word] * (1 + i % 7))}
        for i, word in zip(range(count), words, strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(path: Path, model: Path, train: Path, output_dir: Path, **sections: Any) -> Path:
    """A YAML config for a tiny float32 run; sections are merged over small defaults."""
    import yaml

    tree: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32", "remat": "none"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(train), "max_length": 320},
        "training": {"batch_size": 4, "max_steps": 4},
        "optimizer": {"learning_rate": 5e-3},
        "output_dir": str(output_dir),
    }
    for name, values in sections.items():
        tree[name] = tree[name] | values if isinstance(values, dict) else values
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def copy_folder(source: Path, target: Path) -> Path:
    """A writable copy of a folder of test data."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    target.chmod(0o755)
    return target
