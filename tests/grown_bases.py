"""Tokenizers with more tokens than a base has rows for, and what transformers makes of the base with them."""

from pathlib import Path
from typing import Any

import torch
from tiny import make_completions, make_tokenizer, write_config
from transformers import AutoModelForCausalLM

from jlora.config import Config, load_config

ADDED = ["<|call|>", "<|result|>", "<|done|>", "<|more|>"]
VOCAB = 300
GROWN = VOCAB + len(ADDED)


def add_tokens(folder: Path, tokens: list[str] = ADDED) -> Path:
    """The tiny tokenizer with tokens of its user's."""
    fast = make_tokenizer(folder, VOCAB)
    fast.add_tokens(tokens)
    fast.save_pretrained(folder)
    return folder


def resized(folder: Path, rows: int = GROWN, mean_resizing: bool = True) -> Any:
    """The base as transformers resizes it, float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.resize_token_embeddings(rows, mean_resizing=mean_resizing)
    return model


def grown_config(folder: Path, base: Path, tokenizer: Path, *overrides: str, **sections: Any) -> Config:
    """A run of four steps on rows in which the added tokens stand."""
    rows = make_completions(folder / "rows.jsonl")
    rows.write_text(rows.read_text().replace("tree", ADDED[0]).replace("mountain", ADDED[2]))
    sections["data"] = {"format": "completion", "max_length": 64} | sections.get("data", {})
    path = write_config(folder / "run.yaml", base, rows, folder / "run", **sections)
    return load_config(path, [f"model.tokenizer={tokenizer}", "model.resize_embeddings=true", *overrides])
