"""Tiny models that read images, too, each around a text model with no numerics field at its default."""

from pathlib import Path
from typing import Any

import torch
from families import FAMILIES
from tiny import OFF_DEFAULT, save_random
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
)

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
GEMMA3 = Gemma3TextConfig(**FAMILIES["gemma3"].to_dict() | {"final_logit_softcapping": None})
TEXT = {"gemma3": GEMMA3, "mistral3": MistralConfig(**OFF_DEFAULT | {"sliding_window": 9})}
TEXT |= {"llava": LlamaConfig(**OFF_DEFAULT)}
CLASSES = {
    "gemma3": (Gemma3Config, Gemma3ForConditionalGeneration, {"mm_tokens_per_image": 4, "image_token_index": 299}),
    "mistral3": (Mistral3Config, Mistral3ForConditionalGeneration, {"image_token_index": 299}),
    "llava": (LlavaConfig, LlavaForConditionalGeneration, {"image_token_index": 299}),
}


def make(folder: Path, name: str, **overrides: Any) -> PreTrainedModel:
    """A model of random weights that takes images, saved as transformers saves it.

    Args:
      overrides: fields of the text model's config.
    """
    config, model, more = CLASSES[name]
    torch.manual_seed(0)
    text = TEXT[name].to_dict() | overrides
    whole = config(text_config=text, vision_config=VISION, tie_word_embeddings=text["tie_word_embeddings"], **more)
    whole._attn_implementation = "eager"
    return save_random(model(whole), folder)
