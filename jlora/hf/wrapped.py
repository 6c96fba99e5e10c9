"""Models that read images, too: the text model within one, under the names that it has there.

Its config is `text_config`, its tensors are those of the module `language_model`; nothing else of it is read.
"""

from dataclasses import replace
from typing import Any

from jlora.errors import ModelError
from jlora.hf.families import FAMILIES
from jlora.model.config import ModuleNames

# Class in transformers -> families that its text model may be of.
WRAPPERS: dict[str, tuple[str, ...]] = {
    "Gemma3ForConditionalGeneration": ("gemma3_text",),
    "Mistral3ForConditionalGeneration": ("mistral",),
    "LlavaForConditionalGeneration": ("llama", "mistral", "qwen2"),
}
# What the text model of a family is where `text_config` does not say it, as its class in transformers assumes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
    "mistral": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}  # fmt: skip
# Of the whole model's config, what holds for the text model as well.
SHARED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings"),
    *("quantization_config", "transformers_version", "transformers_weights"),
)
# The key of a text model's config that names what it was taken from.
WRAPPED_IN = "wrapped_in"
BODY, BESIDE = "model.language_model", ("vision_tower", "multi_modal_projector")


def text_of(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The config of the text model within a model; of a text model, its own.

    Raises:
      ModelError: there is no text model, or one of another family than the class has.
    """
    named = raw.get("architectures")
    whole = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(whole, str) or whole not in WRAPPERS:
        return raw
    text, families = raw.get("text_config"), WRAPPERS[whole]
    if not isinstance(text, dict):
        raise ModelError(
            f"{where}: {whole} without a text_config has no text model to train; get its config.json again"
        )
    family = text.get("model_type")
    if family not in families:
        raise ModelError(
            f"{where}: text_config.model_type={family!r} is not supported in {whole}, only {', '.join(families)}"
        )
    if (
        text.get("final_logit_softcapping") is not None
    ):  # which the whole model's class does not apply, and the text's does
        raise ModelError(f"{where}: text_config.final_logit_softcapping changes the numerics and is not supported")
    shared = {key: raw[key] for key in SHARED if raw.get(key) is not None}
    own = {key: value for key, value in text.items() if value is not None or key not in shared}
    architecture = FAMILIES[family].architecture
    return DEFAULTS.get(family, {}) | shared | own | {"architectures": [architecture], WRAPPED_IN: whole}


def names_in(names: ModuleNames, config: dict[str, Any]) -> ModuleNames:
    """What the modules of a text model are called where it was found."""
    return replace(names, body=BODY, beside=BESIDE) if WRAPPED_IN in config else names


def tensor_in(name: str) -> str | None:
    """The name of a text model's tensor in the whole model, whichever way the file has it; None for other tensors."""
    for prefix, own in (("language_model.model.", f"{BODY}."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None if name.removeprefix("model.").startswith(tuple(f"{module}." for module in BESIDE)) else name
