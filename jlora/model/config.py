"""The shape and numerics of a model, as its config.json says them, and the weights that follow from them.

A family of models is values of these fields: nothing that computes asks for its name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from jlora.config import ATTENTION_PROJECTIONS
from jlora.errors import ConfigError
from jlora.model.rope import Rope

T = TypeVar("T")


@dataclass(frozen=True)
class ModuleNames:
    """What transformers calls the modules of a model: PEFT's names and patterns and the tensors of files have them.

    Attributes:
      body: the model without its head; layers: those in it.
      renamed: leaf -> module, for those that are not called as in Llama: of a layer within it, else within the body.
      input_first: files keep projections as [in, out], as Conv1D does, and not as [out, in].
      beside: modules beside the body of a model that reads more than text; they have projections of the same names.
    """

    body: str
    layers: str
    renamed: tuple[tuple[str, str], ...]
    input_first: bool
    beside: tuple[str, ...]


LLAMA = ModuleNames("model", "layers", (), input_first=False, beside=())
GPT2 = ModuleNames(
    "transformer",
    "h",
    (
        *(("embed_tokens", "wte"), ("embed_positions", "wpe"), ("norm", "ln_f")),
        *(("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2")),
        *(("qkv_proj", "attn.c_attn"), ("o_proj", "attn.c_proj"), ("up_proj", "mlp.c_fc"), ("down_proj", "mlp.c_proj")),
    ),
    input_first=True,
    beside=(),
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and numerics of a decoder, all from the base's own config.json; no field has a default.

    Attributes:
      layer_norm: norms are LayerNorms, with biases, and not RMSNorms.
      activation: of the MLP: silu, gelu or gelu_tanh, its approximation.
      gated: the MLP is activation(gate) * up, and not activation(up).
      fused: queries, keys and values are one projection, and so are gate and up.
      learned_positions: rows of a table that is added to the embedding; None where there is none.
      norm_offset: norms multiply by 1 + w, in float32.
      post_norms: what attention and the MLP give goes through a norm of its own, too.
      embedding_scale: what the embedding is multiplied by.
      query_scale: what turned queries are multiplied by, before scores are divided by the root of head_dim.
      attention_softcap, logits_softcap: c of c tanh(x / c), which scores and logits go through; None leaves them.
      qk_norm: each head's queries and keys go through an RMSNorm of their own before they are turned.
      ropes, windows: of each layer, or one for all; no rope where heads are not turned. A window is the number of
        tokens that a query sees, itself included; None is all of them.
      biased: projections that have a bias.
      names: what transformers calls the modules.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    layer_norm: bool
    activation: str
    gated: bool
    fused: bool
    learned_positions: int | None
    qk_norm: bool
    norm_offset: bool
    post_norms: bool
    embedding_scale: float
    query_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    ropes: tuple[Rope, ...]
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    biased: tuple[str, ...]
    names: ModuleNames


def check_length(cfg: ModelConfig, length: int, what: str) -> None:
    """Positions that are learned end where their table does.

    Raises:
      ConfigError: `what` has more tokens.
    """
    if cfg.learned_positions is not None and length > cfg.learned_positions:
        raise ConfigError(
            f"{what} of {length} tokens is beyond the {cfg.learned_positions} positions that the base learned"
        )


def kinds(by_layer: Sequence[T]) -> tuple[list[T], list[int]]:
    """The values that differ, and of each layer which of them it has; one value is all layers'."""
    found = list(dict.fromkeys(by_layer))
    return found, [found.index(value) for value in by_layer]


# Input dims of a projection: heads and head_dim; every other one has one.
NUM_INPUTS = {"o_proj": 2}


@dataclass(frozen=True)
class Weight:
    """Shape and logical axes of one weight."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]


def block_weights(cfg: ModelConfig) -> dict[str, Weight]:
    """The weights of one layer, in the order of their use, then norms of heads and the biases."""
    d, f, h = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    n, k = cfg.num_attention_heads, cfg.num_key_value_heads
    norm = Weight((d,), ("embed",))
    qkv = {
        "q_proj": Weight((d, n, h), ("embed", "heads", "head_dim")),
        "k_proj": Weight((d, k, h), ("embed", "kv_heads", "head_dim")),
        "v_proj": Weight((d, k, h), ("embed", "kv_heads", "head_dim")),
    }
    into_mlp = dict.fromkeys(("gate_proj", "up_proj") if cfg.gated else ("up_proj",), Weight((d, f), ("embed", "mlp")))
    if cfg.fused:
        qkv = {"qkv_proj": Weight((d, n + 2 * k, h), ("embed", "qkv_heads", "head_dim"))}
        into_mlp = {"gate_up_proj": Weight((d, 2 * f), ("embed", "mlp"))} if cfg.gated else into_mlp
    weights = {
        "input_layernorm": norm,
        **qkv,
        "o_proj": Weight((n, h, d), ("heads", "head_dim", "embed")),
        "post_attention_layernorm": norm,
        **into_mlp,
        "down_proj": Weight((f, d), ("mlp", "embed")),
    }
    if cfg.post_norms:  # here one is called as Llama's second, which comes before the MLP
        weights |= {"pre_feedforward_layernorm": norm, "post_feedforward_layernorm": norm}
    if cfg.layer_norm:
        weights |= {f"{name}_bias": norm for name in weights if name.endswith("norm")}
    if cfg.qk_norm:
        weights |= dict.fromkeys(("q_norm", "k_norm"), Weight((h,), ("head_dim",)))
    for name in cfg.biased:
        weight, inputs = weights[name], NUM_INPUTS.get(name, 1)
        weights[f"{name}_bias"] = Weight(weight.shape[inputs:], weight.axes[inputs:])
    return weights


def outer_weights(cfg: ModelConfig) -> dict[str, Weight]:
    """The weights outside the layers."""
    table = Weight((cfg.vocab_size, cfg.hidden_size), ("vocab", "embed"))
    norm = Weight((cfg.hidden_size,), ("embed",))
    weights = {"embed_tokens": table, "norm": norm}
    if cfg.learned_positions is not None:
        weights["embed_positions"] = Weight((cfg.learned_positions, cfg.hidden_size), ("positions", "embed"))
    if cfg.layer_norm:
        weights["norm_bias"] = norm
    return weights if cfg.tie_word_embeddings else weights | {"lm_head": table}


def projection_shapes(cfg: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Projection name -> (input dims, output dims) of one layer, for its adapter."""
    return {
        name: (weight.shape[: NUM_INPUTS.get(name, 1)], weight.shape[NUM_INPUTS.get(name, 1) :])
        for name, weight in block_weights(cfg).items()
        if name.endswith("_proj")
    }


def module_in_layer(names: ModuleNames, leaf: str) -> str:
    """What transformers calls the module of a layer's weight, within the layer."""
    in_attention = leaf in (*ATTENTION_PROJECTIONS, "qkv_proj", "q_norm", "k_norm")
    part = "self_attn." if in_attention else "mlp." * leaf.endswith("_proj")
    return dict(names.renamed).get(leaf, part + leaf)


def module_path(names: ModuleNames, leaf: str, layer: int | None) -> str:
    """What transformers calls the module that a leaf is the weight of; PEFT matches patterns with it."""
    if layer is not None:
        return f"{names.body}.{names.layers}.{layer}.{module_in_layer(names, leaf)}"
    return leaf if leaf == "lm_head" else f"{names.body}.{dict(names.renamed).get(leaf, leaf)}"
