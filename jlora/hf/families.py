"""Families of models: what each computes differently, and what its config.json leaves unsaid."""

from dataclasses import dataclass, replace
from typing import Any

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

    @property
    def by_layer(self) -> bool:
        """Whether layers differ."""
        return self.switch or self.full_every is not None


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
    "qwen3": Family(
        "Qwen3ForCausalLM",
        32768,
        kv_heads=32,
        head_dim=128,
        windowed=True,
        switch=True,
        sliding_window=4096,
        bias_keys=("attention_bias",),
        qk_norm=True,
    ),
}
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
FAMILIES["phi3"] = Family("Phi3ForCausalLM", 4096, norm_eps=1e-5, windowed=True, fused=True, partial_rotary=True)
