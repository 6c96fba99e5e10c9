"""The forms that an adapter is written in, which compute the same: plain LoRA, of one scale for all modules."""

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.config import LoraSection
from jlora.model.adapter import Adapter, Lora, Rows, Saved, scaling


def plain(section: LoraSection) -> LoraSection:
    """The options of an export: of an adapter that took its start from the base (PiSSA, OLoRA), twice the rank.

    As PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)`, the scale stays as it was.
    """
    if not section.takes_from_base:
        return section
    times = math.sqrt(2.0) if section.use_rslora else 2.0
    changed = {
        "rank": 2 * section.rank,
        "alpha": times * section.alpha,
        "rank_pattern": {key: 2 * rank for key, rank in section.rank_pattern.items()},
        "alpha_pattern": {key: times * alpha for key, alpha in section.alpha_pattern.items()},
        "init_lora_weights": True,
    }
    return section.model_copy(update=changed)


def of_one_scale(adapter: Adapter, section: LoraSection) -> tuple[Adapter, LoraSection]:
    """The same adapter, and its options, with every module's product multiplied by `alpha / rank` of the whole.

    vLLM and TensorRT-LLM know one scale, and no patterns. So what a module's own is beyond it goes into B, and
    `alpha_pattern` keeps what PEFT has to be told for it to come to the same.
    """
    if not section.rank_pattern and not section.alpha_pattern:
        return adapter, section
    scale = scaling(section, section.alpha, section.rank)
    alphas = {
        key: scale * (math.sqrt(rank) if section.use_rslora else rank) for key, rank in section.rank_pattern.items()
    }
    folded = {name: scaled_to(part, np.float32(scale)) for name, part in adapter.items()}
    return folded, section.model_copy(update={"alpha_pattern": alphas})


def scaled_to(part: Lora | Saved | Rows, scale: Any) -> Lora | Saved | Rows:
    """The same part with another scale, a number or [L], and B to match; layers without an adapter stay without."""
    if not isinstance(part, Lora):
        return part
    ratio = jnp.where(part.scale == 0, 0, part.scale / jnp.where(part.scale == 0, 1, scale))
    over = (len(ratio), *(1,) * (part.lora_b.ndim - 1))

    def fold(b: Any) -> Any:
        return b * ratio.reshape(over)

    initial = None if part.initial is None else (part.initial[0], fold(part.initial[1]))
    new = jnp.where(part.scale == 0, 0, jnp.asarray(scale, jnp.float32))
    return replace(part, lora_b=fold(part.lora_b), scale=new, initial=initial)
