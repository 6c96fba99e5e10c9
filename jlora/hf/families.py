"""Families of models: what each computes differently, what its config.json leaves unsaid, and where one is a part."""

from dataclasses import dataclass, replace
from typing import Any

from jlora.errors import ModelError
from jlora.model.config import GPT2, LLAMA, ModuleNames


@dataclass(frozen=True)
class Family:
    """A model type: its class in transformers, and what its config assumes where config.json is silent.

    Attributes:
      kv_heads, head_dim, sliding_window: None where there are as many as attention heads, as the hidden size has
        for each, and no window.
      windowed: config.json's `sliding_window` is read at all; with a switch, only where `use_sliding_window` is true,
        and then from layer `max_window_layers` on.
      biased: projections with a bias, whatever config.json says.
      bias_keys: those of config.json that give projections a bias.
      keys: of config.json, where they are not called as Llama's: ours -> theirs.
      full_every: of so many layers the last has no window, where config.json does not say which; or as many as its
        `full_every_key` says.
      local_theta: of layers with a window, where these turn by settings of their own; theta: of the others then.
      soft_caps: config.json's `attn_logit_softcapping` and `final_logit_softcapping` are read.
      longrope_names: other types of rotary settings that are LongRoPE here; original_positions: for it, where
        config.json does not say.
      scaled_queries: scores are divided by the root of config.json's `query_pre_attn_scalar`.
      required: keys that change the numerics, with the value that is computed, which is also the default.
    The others are fields of `ModelConfig`, or defaults of a key of that name.
    """

    architecture: str
    max_position_embeddings: int
    norm_eps: float = 1e-6
    tied: bool = False
    activation: str = "silu"
    gated: bool = True
    layer_norm: bool = False
    fused: bool = False
    learned_positions: bool = False
    norm_offset: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    scaled_queries: bool = False
    partial_rotary: bool = False
    longrope_names: tuple[str, ...] = ()
    original_positions: int | None = None
    soft_caps: bool = False
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    full_every: int | None = None
    full_every_key: str | None = None
    local_theta: float | None = None
    theta: float = 10000.0
    kv_heads: int | None = None
    head_dim: int | None = None
    windowed: bool = False
    switch: bool = False
    sliding_window: int | None = None
    biased: tuple[str, ...] = ()
    bias_keys: tuple[str, ...] = ()
    qk_norm: bool = False
    names: ModuleNames = LLAMA
    keys: tuple[tuple[str, str], ...] = ()
    required: tuple[tuple[str, Any], ...] = ()


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", 2048, bias_keys=("attention_bias", "mlp_bias")),
    "mistral": Family("MistralForCausalLM", 4096 * 32, kv_heads=8, windowed=True, sliding_window=4096),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        32768,
        kv_heads=32,
        windowed=True,
        switch=True,
        sliding_window=4096,
        biased=("q_proj", "k_proj", "v_proj"),
    ),
}
FAMILIES["qwen3"] = replace(
    FAMILIES["qwen2"],
    architecture="Qwen3ForCausalLM",
    head_dim=128,
    biased=(),
    bias_keys=("attention_bias",),
    qk_norm=True,
)
FAMILIES["gpt2"] = Family(
    "GPT2LMHeadModel",
    1024,
    norm_eps=1e-5,
    tied=True,
    activation="gelu_new",
    gated=False,
    layer_norm=True,
    fused=True,
    learned_positions=True,
    biased=("qkv_proj", "o_proj", "up_proj", "down_proj"),
    names=GPT2,
    keys=(
        *(("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")),
        *(("intermediate_size", "n_inner"), ("max_position_embeddings", "n_positions")),
        *(("hidden_act", "activation_function"), ("rms_norm_eps", "layer_norm_epsilon")),
    ),
    required=(
        *(("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False)),
    ),
)
FAMILIES["gemma3_text"] = Family(
    "Gemma3ForCausalLM",
    131072,
    tied=True,
    activation="gelu_pytorch_tanh",
    kv_heads=4,
    head_dim=256,
    windowed=True,
    sliding_window=4096,
    full_every=6,
    full_every_key="sliding_window_pattern",
    local_theta=10_000.0,
    theta=1_000_000.0,
    bias_keys=("attention_bias",),
    qk_norm=True,
    norm_offset=True,
    post_norms=True,
    scaled_embedding=True,
    scaled_queries=True,
    keys=(("hidden_act", "hidden_activation"),),
    soft_caps=True,
    # Its class in transformers takes a soft cap of scores, and does not apply it.
    required=(("use_bidirectional_attention", False), ("attn_logit_softcapping", None)),
)
FAMILIES["gemma2"] = replace(
    FAMILIES["gemma3_text"],
    architecture="Gemma2ForCausalLM",
    max_position_embeddings=8192,
    full_every=2,
    full_every_key=None,
    local_theta=None,
    qk_norm=False,
    required=(("use_bidirectional_attention", False),),
    attention_softcap=50.0,
    logits_softcap=30.0,
)
FAMILIES["phi3"] = Family(
    "Phi3ForCausalLM",
    4096,
    norm_eps=1e-5,
    windowed=True,
    fused=True,
    partial_rotary=True,
    original_positions=4096,
    longrope_names=("su", "yarn"),
)

# Models that read images, too, hold a text model under other names: its config is `text_config`, its tensors are those
# of the module `language_model`; nothing else of them is read.
# Class in transformers -> families that its text model may be of.
WRAPPERS: dict[str, tuple[str, ...]] = {
    "Gemma3ForConditionalGeneration": ("gemma3_text",),
    "Mistral3ForConditionalGeneration": ("mistral",),
    "LlavaForConditionalGeneration": ("llama", "mistral", "qwen2"),
}
# What the text model of a family is where `text_config` does not say it, as its class in transformers assumes.
WRAPPED_DEFAULTS: dict[str, dict[str, Any]] = {
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
    # The whole model's class does not apply it, and the text's does.
    if text.get("final_logit_softcapping") is not None:
        raise ModelError(f"{where}: text_config.final_logit_softcapping changes the numerics and is not supported")
    shared = {key: raw[key] for key in SHARED if raw.get(key) is not None}
    own = {key: value for key, value in text.items() if value is not None or key not in shared}
    architecture = FAMILIES[family].architecture
    return WRAPPED_DEFAULTS.get(family, {}) | shared | own | {"architectures": [architecture], WRAPPED_IN: whole}


def names_in(names: ModuleNames, config: dict[str, Any]) -> ModuleNames:
    """What the modules of a text model are called where it was found."""
    return replace(names, body=BODY, beside=BESIDE) if WRAPPED_IN in config else names


def tensor_in(name: str) -> str | None:
    """The name of a text model's tensor in the whole model, whichever way the file has it; None for other tensors."""
    for prefix, own in (("language_model.model.", f"{BODY}."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return None if name.removeprefix("model.").startswith(tuple(f"{module}." for module in BESIDE)) else name
