"""Adapters with every option, here and in PEFT, on bases that differ in what an adapter sees."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from jlora.config import PROJECTIONS, LoraSection
from jlora.model.adapter import Adapter, Saved
from jlora.model.adapter_init import new_adapter

RANKS = {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 7}}
ALPHAS = {"alpha_pattern": {"layers.0.self_attn.v_proj": 3.5, "down_proj": 16.0}}
# Options by our names; PEFT's are the same but for these.
PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
COMMON: dict[str, Any] = {"rank": 4, "alpha": 6.0, "target_modules": list(PROJECTIONS)}
OPTIONS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora_rslora_some_layers": {"use_dora": True, "use_rslora": True, "layers_to_transform": [0, 2]},
    "patterns": RANKS | ALPHAS,
    "patterns_rslora_dora": RANKS | ALPHAS | {"use_rslora": True, "use_dora": True},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_patterns": {"init_lora_weights": "pissa"} | RANKS | ALPHAS,
    "pissa_rslora_dora": {"init_lora_weights": "pissa", "use_rslora": True, "use_dora": True},
    "olora": {"init_lora_weights": "olora"},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": ["q_proj", "v_proj"]},
    "saved_head": {"modules_to_save": ["lm_head"], "layers_to_transform": [0, 1]},
    "bias_all": {"bias": "all", "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2]},
    "bias_lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
}


def needed(name: str, bases: dict[str, Path]) -> Path:
    if not bases[name].is_dir():
        pytest.skip("the test data are not here (JLORA_TEST_DATA)")
    return bases[name]


def section_of(name: str) -> LoraSection:
    return LoraSection(**(COMMON | OPTIONS[name]))


def peft_config(section: LoraSection) -> LoraConfig:
    keys = ("rank", "alpha", "dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern")
    keys += ("layers_to_transform", "bias")
    options = {PEFT_NAMES.get(key, key): getattr(section, key) for key in keys}
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=list(section.targets),
        modules_to_save=section.modules_to_save or None,
        **options,
    )


# How far training might move an entry; A is drawn smaller than B. With 0.05 for both, one draw in four of OLoRA's on
# stories260K is 1.3e-4 off on a CPU without AVX-512: PEFT's converted factors subtract what the start added, and both
# roundings add up on logits of 16. With these it is 4e-5 to 5e-5 on each of four draws.
SPREAD_A, SPREAD = 0.03, 0.05


def grown(adapter: Adapter, seed: int = 0) -> Adapter:
    """The adapter as training might leave it: every trained number moved, what is zero for good still zero."""
    draw = np.random.default_rng(seed)

    def moved(array: Any, spread: float) -> Any:
        return jnp.asarray(np.asarray(array) + draw.normal(0, spread, array.shape), jnp.float32)

    found: Adapter = {}
    for name, part in adapter.items():
        if isinstance(part, Saved):
            found[name] = Saved(moved(part.weight, SPREAD))
            continue
        ranks = np.array(part.ranks or (part.lora_b.shape[1],) * len(part.lora_b))
        held = np.arange(part.lora_b.shape[1])[None] < ranks[:, None]
        a, b = moved(part.lora_a, SPREAD_A), moved(part.lora_b, SPREAD)
        a = jnp.where(held.reshape(len(held), *(1 for _ in a.shape[2:]), -1), a, 0.0)
        b = jnp.where(held.reshape(*held.shape, *(1 for _ in b.shape[2:])), b, 0.0)
        magnitude = None if part.magnitude is None else moved(part.magnitude, 0.2)
        found[name] = dataclasses.replace(part, lora_a=a, lora_b=b, magnitude=magnitude)
    return found


def fresh(section: LoraSection, base) -> Adapter:
    return new_adapter(section, base.cfg, 7, base)


def torch_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
