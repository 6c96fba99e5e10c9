"""What a Hugging Face config.json says of a model: its shape and numerics, or why they are not supported.

What families differ in is their table's, `families.py`.
"""

import math
import sys
from difflib import get_close_matches
from typing import Any

from jlora.config import ATTENTION_PROJECTIONS, MLP_PROJECTIONS
from jlora.errors import ModelError
from jlora.hf.families import FAMILIES, WRAPPERS, Family, names_in, text_of
from jlora.hf.published import method_of
from jlora.model.config import ModelConfig, ModuleNames
from jlora.model.rope import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, RopeScaling, YarnRope

# What transformers calls activations, and which of ours they are.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Projections that get a bias by a key of config.json.
BIAS_KEYS = {"attention_bias": ATTENTION_PROJECTIONS, "mlp_bias": MLP_PROJECTIONS}

# Fields that change the numerics, with the values that jlora computes. What transformers' class does not read
# cannot change its numerics and is not looked at; of rotary settings it is named, as transformers names it.
ONLY_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(FAMILIES),
    "hidden_act": (*ACTIVATIONS, None),
}
# What config.json calls layers in `layer_types`.
FULL, SLIDING = "full_attention", "sliding_attention"
# What each type of rotary settings reads, beside `rope_theta`.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
}


def parse_config(raw: dict[str, Any], where: str) -> ModelConfig:
    """Shape and numerics from a Hugging Face config.json.

    Accepts both spellings of rotary settings: `rope_theta` with `rope_scaling` (transformers 4) and
    `rope_parameters` (transformers 5).

    Raises:
      ModelError: an architecture or a field that changes the numerics and is not supported, by name.
    """
    raw = text_of(raw, where)
    method_of(raw, where)
    family = _family(raw, where)
    raw = raw | {ours: raw[theirs] for ours, theirs in family.keys if theirs in raw}
    _check_ignored(raw, family, where)
    whole = {} if family.partial_rotary else {"partial_rotary_factor": (1, None)}
    required = {key: (value, None) for key, value in family.required}
    for field, allowed in (ONLY_SUPPORTED | whole | required).items():
        if raw.get(field) not in allowed and (field in raw or None not in allowed):
            raise ModelError(f"{where}: {field}={raw.get(field)!r} changes the numerics and is not supported")

    def integer(field: str, fallback: int | None = None) -> int:
        value = raw.get(field)
        return _integer(fallback if value is None else value, field, where)

    def real(field: str, fallback: float | None) -> float | None:
        value = raw.get(field, fallback)
        return None if value is None else _real(value, field, where)

    heads, hidden = integer("num_attention_heads"), integer("hidden_size")
    mlp = None if family.gated else 4 * hidden  # GPT-2's n_inner may be null
    # A key that is null has as many heads as there are; one that is not there, what the family has.
    kv_heads = heads if "num_key_value_heads" in raw else family.kv_heads or heads
    kv_heads = integer("num_key_value_heads", kv_heads)
    head_dim = integer("head_dim", family.head_dim or max(1, hidden // heads))
    if heads % kv_heads or head_dim % 2:
        raise ModelError(f"{where}: {heads} heads of {head_dim} with {kv_heads} key/value heads do not divide")
    tied = raw.get("tie_word_embeddings", family.tied)
    if not isinstance(tied, bool):
        raise ModelError(f"{where}: tie_word_embeddings must be true or false, not {tied!r}")
    positions = integer("max_position_embeddings", family.max_position_embeddings)
    kinds = _layer_kinds(raw, family, integer("num_hidden_layers"), where)
    return ModelConfig(
        vocab_size=integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size", mlp),
        num_hidden_layers=integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_real(raw.get("rms_norm_eps", family.norm_eps), "rms_norm_eps", where),
        layer_norm=family.layer_norm,
        activation=ACTIVATIONS[raw.get("hidden_act") or family.activation],
        gated=family.gated,
        fused=family.fused,
        learned_positions=positions if family.learned_positions else None,
        qk_norm=family.qk_norm,
        norm_offset=family.norm_offset,
        post_norms=family.post_norms,
        embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
        query_scale=math.sqrt(head_dim / integer("query_pre_attn_scalar", 256)) if family.scaled_queries else 1.0,
        attention_softcap=real("attn_logit_softcapping", family.attention_softcap) if family.soft_caps else None,
        logits_softcap=real("final_logit_softcapping", family.logits_softcap) if family.soft_caps else None,
        ropes=_ropes(raw, family, kinds, (positions, head_dim), where),
        windows=_windows(raw, family, kinds, where),
        tie_word_embeddings=tied,
        biased=_biased(raw, family, where),
        names=names_in(family.names, raw),
    )


def module_names(raw: dict[str, Any]) -> ModuleNames:
    """What transformers calls the modules, also where `parse_config` will refuse the config."""
    return names_in(FAMILIES.get(str(raw.get("model_type")), FAMILIES["llama"]).names, raw)


def _check_ignored(raw: dict[str, Any], family: Family, where: str) -> None:
    """What is read by none of the functions that compute, and may be there all the same."""
    if raw.get("auto_map") is not None:
        print(
            f"warning: {where}: auto_map names code of the model's own, which is not run; it is computed as "
            f"{family.architecture} of transformers is",
            file=sys.stderr,
        )
    dropout = raw.get("attention_dropout")
    number = isinstance(dropout, int | float) and not isinstance(dropout, bool)
    if dropout is not None and not (number and 0 <= dropout < 1):
        raise ModelError(f"{where}: attention_dropout must be a number from 0 to 1, not {dropout!r}")


def _family(raw: dict[str, Any], where: str) -> Family:
    """The family of `model_type`, which must be that of `architectures` too, in any letters; or of its body alone."""
    known: dict[str, str] = {}
    for name, family in FAMILIES.items():
        body = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Model"
        known |= {family.architecture.lower(): name, body.lower(): name}
    architectures = raw.get("architectures")
    if not architectures:
        return FAMILIES.get(str(raw.get("model_type")), FAMILIES["llama"])  # an unknown type is refused later
    if not isinstance(architectures, list) or len(architectures) != 1 or str(architectures[0]).lower() not in known:
        named = ", ".join(map(str, architectures)) if isinstance(architectures, list) else repr(architectures)
        *others, last = (*(family.architecture for family in FAMILIES.values()), *WRAPPERS)
        (nearest,) = get_close_matches(named, [*others, last], 1, cutoff=0.0)
        raise ModelError(
            f"{where}: architecture {named} is not supported, only {', '.join(others)} and {last}; "
            f"the nearest is {nearest}"
        )
    model_type = known[str(architectures[0]).lower()]
    if raw.get("model_type") != model_type:
        raise ModelError(
            f"{where}: model_type={raw.get('model_type')!r} is not supported for {architectures[0]}, "
            f"only {model_type!r}"
        )
    return FAMILIES[model_type]


def _layer_kinds(raw: dict[str, Any], family: Family, layers: int, where: str) -> list[str]:
    """Which layers have the window, if there is one."""
    if not family.switch and family.full_every is None:
        return [SLIDING]
    kinds, first = raw.get("layer_types"), raw.get("max_window_layers", 28)
    if kinds is None and family.switch:
        if not isinstance(first, int):
            raise ModelError(f"{where}: max_window_layers must be an integer, not {first!r}")
        kinds = [FULL if i < first else SLIDING for i in range(layers)]
    elif kinds is None:
        key = family.full_every_key
        every = _integer(raw.get(key, family.full_every) if key else family.full_every, str(key), where)
        kinds = [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise ModelError(f"{where}: layer_types must be a list of {layers} of {FULL} and {SLIDING}, not {kinds!r}")
    return kinds


def _windows(raw: dict[str, Any], family: Family, kinds: list[str], where: str) -> tuple[int | None, ...]:
    """The window of every layer, or one for all."""
    window = raw.get("sliding_window", family.sliding_window)
    if not family.windowed or window is None or (family.switch and not raw.get("use_sliding_window")):
        return (None,)
    window = _integer(window, "sliding_window", where)
    by_layer = tuple(window if kind == SLIDING else None for kind in kinds)
    return by_layer if len(set(by_layer)) > 1 else by_layer[:1]


def _ropes(
    raw: dict[str, Any], family: Family, kinds: list[str], sizes: tuple[int, int], where: str
) -> tuple[Rope, ...]:
    """How the heads of every layer are turned, or one way for all.

    Args:
      sizes: most positions, and head_dim.
    """
    if family.learned_positions:
        return ()
    settings = {SLIDING: raw}
    if family.local_theta is not None:
        nested = raw.get("rope_parameters") or {}
        if not isinstance(nested, dict):
            raise ModelError(f"{where}: rope_parameters must be a JSON object, not {nested!r}")
        local = {"rope_theta": raw.get("rope_local_base_freq", family.local_theta), "rope_scaling": None}
        own = {SLIDING: local, FULL: {"rope_theta": raw.get("rope_theta", family.theta)}}
        settings = {kind: raw | keys | {"rope_parameters": nested.get(kind)} for kind, keys in own.items()}
    found = {kind: _rope(one, family, sizes, where) for kind, one in settings.items()}
    by_layer = tuple(found.get(kind, found[SLIDING]) for kind in kinds)
    return by_layer if len(set(by_layer)) > 1 else by_layer[:1]


def _rope(raw: dict[str, Any], family: Family, sizes: tuple[int, int], where: str) -> Rope:
    """Theta, how many dims are turned, and how frequencies are rescaled."""
    max_positions, head_dim = sizes
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ModelError(f"{where}: rope_scaling must be a JSON object, not {scaling!r}")
    share = 1.0
    if family.partial_rotary:
        values = (scaling.get("partial_rotary_factor"), raw.get("partial_rotary_factor"), 1.0)
        share = _real(next(value for value in values if value is not None), "partial_rotary_factor", where)
        scaling = {key: value for key, value in scaling.items() if key != "partial_rotary_factor"}
    dim = int(head_dim * share)
    if not 2 <= dim <= head_dim or dim % 2:
        raise ModelError(f"{where}: partial_rotary_factor={share} turns {dim} of {head_dim} dims, not an even part")
    # The settings' own theta goes first, then the config's, then the family's default.
    thetas = (scaling.get("rope_theta"), raw.get("rope_theta"), 10000.0)
    theta = _real(next(value for value in thetas if value is not None), "rope_theta", where)
    if scaling.get("rope_type", scaling.get("type")) in family.longrope_names:
        scaling = scaling | {"rope_type": "longrope"}
    configured = raw.get("original_max_position_embeddings", family.original_positions)
    rescaling = _rescaling(scaling, configured, max_positions, dim, where)
    if isinstance(rescaling, DynamicRope) and dim < 4:
        raise ModelError(f"{where}: rope_scaling of type 'dynamic' needs a head_dim of at least 4, not {dim}")
    return Rope(theta, dim, rescaling)


def _rescaling(
    scaling: dict[str, Any], configured: Any, max_positions: int, dim: int, where: str
) -> RopeScaling | None:
    """How frequencies are rescaled.

    Args:
      configured: the config's own `original_max_position_embeddings`, which goes before that of the settings.
      dim: how many dims of a head are turned.
    """
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        known = "linear, dynamic, llama3, yarn and longrope"
        raise ModelError(f"{where}: rope_scaling of type {kind!r} is not supported; {known} are")
    unread = sorted({*scaling} - {"rope_theta", "rope_type", "type", "partial_rotary_factor", *ROPE_FIELDS[kind]})
    nested = [key for key in unread if isinstance(scaling[key], dict)]  # settings of a kind of layers
    nested += ["partial_rotary_factor"] if scaling.get("partial_rotary_factor") not in (1, None) else []
    if nested:
        raise ModelError(f"{where}: rope_scaling.{nested[0]} changes the numerics and is not supported")
    if unread := [key for key in unread if key != "original_max_position_embeddings"]:
        named = ", ".join(f"rope_scaling.{key}" for key in unread)
        print(f"warning: {where}: {named}: not read for the type {kind}, as in transformers", file=sys.stderr)

    def real(field: str, fallback: float | None = None) -> float:
        value = scaling.get(field)
        return _real(fallback if value is None else value, f"rope_scaling.{field}", where)

    def original() -> int:
        found = (configured, scaling.get("original_max_position_embeddings"), max_positions)
        return _integer(next(one for one in found if one is not None), "original_max_position_embeddings", where)

    def divisors(field: str) -> tuple[float, ...]:
        values = scaling.get(field)
        if not isinstance(values, list) or len(values) != dim // 2:
            raise ModelError(f"{where}: rope_scaling.{field} must be a list of {dim // 2} numbers, one for two dims")
        return tuple(_real(value, f"rope_scaling.{field}", where) for value in values)

    match kind:
        case "default":
            return None
        case "linear":
            return LinearRope(real("factor"))
        case "dynamic":
            return DynamicRope(real("factor"), max_positions)
        case "llama3":
            return Llama3Rope(real("factor"), real("low_freq_factor"), real("high_freq_factor"), original())
        case "yarn":
            factor = real("factor", max_positions / original())
            truncate = scaling.get("truncate", True)
            if not isinstance(truncate, bool):
                raise ModelError(f"{where}: rope_scaling.truncate must be true or false, not {truncate!r}")
            return YarnRope(
                factor=factor,
                attention_factor=real("attention_factor", _yarn_attention_factor(scaling, factor, real)),
                beta_fast=real("beta_fast", 32.0),
                beta_slow=real("beta_slow", 1.0),
                truncate=truncate,
                original_max_position_embeddings=original(),
            )
        case "longrope":
            growth = real("factor", max_positions / original())
            # A context of one position has no logarithm to divide by; transformers divides by 0.
            suggested = math.sqrt(1 + math.log(growth) / math.log(max(original(), 2))) if growth > 1 else 1.0
            return LongRope(
                short_factor=divisors("short_factor"),
                long_factor=divisors("long_factor"),
                attention_factor=real("attention_factor", suggested),
                original_max_position_embeddings=original(),
            )
    raise AssertionError(kind)


def _biased(raw: dict[str, Any], family: Family, where: str) -> tuple[str, ...]:
    """The projections that have a bias."""
    found = family.biased
    for field, projections in BIAS_KEYS.items():
        value = raw.get(field, False)
        if value not in (False, None) and (value is not True or field not in family.bias_keys):
            raise ModelError(f"{where}: {field}={value!r} changes the numerics and is not supported")
        found += projections if value else ()
    return found


def _yarn_attention_factor(scaling: dict[str, Any], factor: float, real: Any) -> float:
    """What YaRN scales by where the config does not say: by the factor, weighed by the mscales if both are there."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(real("mscale")) / scale(real("mscale_all_dim"))
    return scale(1.0)


def _integer(value: Any, field: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ModelError(f"{where}: {field} must be a positive integer, not {value!r}")
    return value


def _real(value: Any, field: str, where: str) -> float:
    # An integer may be greater than every float, and is smaller than infinity all the same.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"{where}: {field} must be a positive number, not {value!r}")
    return float(value)
