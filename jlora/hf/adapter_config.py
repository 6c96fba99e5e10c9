"""adapter_config.json of PEFT's LoRA: which options are read, and which modules of a base they give an adapter."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jlora.config import LoraSection, describe
from jlora.errors import ModelError
from jlora.files.paths import inside
from jlora.files.sandbox import SECONDS, timed
from jlora.hf.source import read_json
from jlora.hf.trained_tokens import read_indices
from jlora.model.adapter import layer_scales, targets
from jlora.model.config import ModelConfig, block_weights, module_in_layer, module_path, projection_shapes

CONFIG = "adapter_config.json"

# Initialisations that leave the base as it is; others (pissa, olora, corda, loftq, ...) take their share
# out of the base's weights, so that the adapter means nothing without those.
INITS_OF_ADAPTER_ALONE = (True, False, None, "gaussian", "eva", "orthogonal")

# Keys of PEFT's LoraConfig that jlora reads, or that say nothing about the adapter's maths.
READ = (
    *("peft_type", "init_lora_weights", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules"),
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "bias", "fan_in_fan_out", "ensure_weight_tying"),
    "trainable_token_indices",
)
SILENT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "merge_weights"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"),
)

# What PEFT takes for a key that is not there.
DEFAULTS = {"r": 8, "lora_alpha": 8}
DEFAULT_TARGETS, DEFAULT_TARGETS_FUSED = ["q_proj", "v_proj"], ["c_attn", "qkv_proj"]


class AdapterSection(LoraSection):
    """The options of an adapter folder, on one base.

    Attributes:
      modules: each projection and layer that has an adapter. `target_modules` are their projections, and
        `layers_to_transform` their layers, or null where those are all of them or differ between projections.
      tokens: embed_tokens, lm_head -> ids of the rows that it trains, in the file's order.
    """

    modules: frozenset[tuple[str, int]]
    tokens: dict[str, tuple[int, ...]] = {}

    def token_rows(self, tied: bool) -> dict[str, tuple[int, ...]]:
        """See `LoraSection`; a head of its own need not be trained with the embedding."""
        return {leaf: tuple(sorted(ids)) for leaf, ids in self.tokens.items()}

    def transforms(self, projection: str, layer: int) -> bool:
        """Whether a projection of a layer gets an adapter."""
        return (projection, layer) in self.modules

    def layers(self, projection: str) -> list[int]:
        """The layers in which a projection has an adapter."""
        return sorted(layer for name, layer in self.modules if name == projection)


def read_adapter_config(folder: Path, model: ModelConfig) -> AdapterSection:
    """The adapter's options, as PEFT reads them for a base of shape `model`.

    Raises:
      ModelError: not a LoRA adapter, or an option that jlora does not compute, by name.
    """
    where = inside(folder, CONFIG)
    raw = DEFAULTS | read_json(where)
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type is {raw.get('peft_type')!r}; only LORA adapters are read")
    if raw.get("init_lora_weights") not in INITS_OF_ADAPTER_ALONE:
        raise ModelError(
            f"{where}: init_lora_weights={raw['init_lora_weights']!r} changed the base's weights too; convert the "
            "adapter to plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    for key, value in raw.items():
        neutral = value in (None, False, "none") or value == {} or value == []
        if key not in READ and key not in SILENT and not neutral:
            raise ModelError(f"{where}: option {key}={value!r} is not supported, so the adapter is not loaded")
    if raw.get("ensure_weight_tying") and raw.get("modules_to_save"):
        raise ModelError(f"{where}: ensure_weight_tying with modules_to_save is not supported, nothing is loaded")
    try:
        with timed():  # patterns are somebody else's program
            modules = _adapted(raw, model, where)
            section = _section(raw, modules, model, where)
            for name in targets(section, model):
                layer_scales(section, name, model)
    except TimeoutError:
        raise ModelError(
            f"{where}: matching its patterns with the base's modules takes more than {SECONDS} seconds; write "
            "target_modules as a list of names"
        ) from None
    if raw.get("fan_in_fan_out") and not model.names.input_first:
        print(f"warning: {where}: fan_in_fan_out is taken as false, as by PEFT for these projections", file=sys.stderr)
    return section


def _section(raw: dict[str, Any], modules: set[tuple[str, int]], model: ModelConfig, where: Path) -> AdapterSection:
    """The options as a section, once it is known which modules they mean."""
    adapted = [name for name in projection_shapes(model) if any(name == module for module, _ in modules)]
    layers = sorted({layer for _, layer in modules})
    even = len(modules) == len(adapted) * len(layers)
    every = len(modules) == len(adapted) * model.num_hidden_layers
    if raw.get("bias") == "lora_only" and not every:
        raise ModelError(f"{where}: bias=lora_only is supported only where the adapter is on all layers")
    saved = _saved(raw, model, where)
    try:
        return AdapterSection(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout") or 0.0,
            target_modules=adapted,
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            layers_to_transform=layers if even and not every else None,
            modules_to_save=saved,  # type: ignore[arg-type]
            bias=raw.get("bias") or "none",
            modules=frozenset(modules),
            tokens=read_indices(raw, saved, model, where),
        )
    except ValidationError as error:
        raise ModelError(f"{where}: not a usable LoRA configuration ({describe(error)})") from None


def _ends_of_projections(model: ModelConfig) -> list[str]:
    paths = (module_in_layer(model.names, name) for name in projection_shapes(model))
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _saved(raw: dict[str, Any], model: ModelConfig, where: Path) -> list[str]:
    """`modules_to_save` by our names, those that we do not know by PEFT's."""
    ours = {module_path(model.names, leaf, None).rpartition(".")[2]: leaf for leaf in ("embed_tokens", "lm_head")}
    given = [name.rpartition(".")[2] for name in _names(raw, "modules_to_save", where)]
    return [ours.get(name, name) for name in given]


def _adapted(raw: dict[str, Any], model: ModelConfig, where: Path) -> set[tuple[str, int]]:
    """The projections that PEFT would give an adapter, with their layers (its `check_target_module_exists`).

    Raises:
      ModelError: there are none, or there are other modules among them.
    """
    excluded, targeted = (_Names(raw, key, where, model) for key in ("exclude_modules", "target_modules"))
    saved = _Names({"saved": _names(raw, "modules_to_save", where)}, "saved", where, model)
    in_layers = _in_layers(raw, targeted, where)
    found: set[tuple[str, int]] = set()
    for path, module in _modules(model).items():
        if excluded.hold(path) or saved.hold(path) or not targeted.hold(path) or not in_layers(path):
            continue
        if module is None:
            raise ModelError(
                f"{where}: target_modules={targeted.given!r} selects {path}, but adapters are computed for "
                f"{', '.join(_ends_of_projections(model))} alone, so nothing is loaded"
            )
        found.add(module)
    if not found:
        without = "".join(
            f", {key}={raw[key]!r}"
            for key in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
            if raw.get(key) not in (None, [], "")
        )
        raise ModelError(
            f"{where}: target_modules={targeted.given!r}{without} selects no module of this base, such as "
            f"{next(path for path, module in _modules(model).items() if module)}; give the base it belongs to"
        )
    return found


class _Names:
    """A key of the configuration that selects modules: by names, which a path may end with, or by one pattern for it.

    Attributes:
      given: the value.
    """

    def __init__(self, raw: dict[str, Any], key: str, where: Path, model: ModelConfig):
        self.given: Any = raw.get(key)
        self.names: frozenset[str] = frozenset()
        self.pattern: re.Pattern[str] | None = None
        if key == "target_modules" and self.given is None:
            self.given = DEFAULT_TARGETS_FUSED if model.fused else DEFAULT_TARGETS
        if not isinstance(self.given, str):
            self.names = frozenset(_names({key: self.given}, key, where))
        elif key == "target_modules" and self.given.lower() == "all-linear":
            self.names = frozenset(_ends_of_projections(model))
        elif self.given:
            self.pattern = _compiled(self.given, key, where)

    def hold(self, path: str) -> bool:
        """Whether a module is selected."""
        if self.pattern is not None:
            return self.pattern.fullmatch(path) is not None
        return any(end in self.names for end in _ends(path))


def _in_layers(raw: dict[str, Any], targeted: _Names, where: Path) -> Callable[[str], bool]:
    """Whether `layers_to_transform` and `layers_pattern` select a module by its path; a whole path needs neither."""
    given = raw.get("layers_to_transform")
    listed = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in listed):
        raise ModelError(f"{where}: layers_to_transform={given!r} is neither a layer's number nor a list of them")
    chosen, pattern = frozenset(listed), raw.get("layers_pattern") or []
    names = [pattern] if isinstance(pattern, str) else _names(raw, "layers_pattern", where)
    patterns = [_compiled(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", "layers_pattern", where) for name in names]
    patterns = patterns or [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    if (chosen or names) and targeted.pattern is not None:
        raise ModelError(
            f"{where}: target_modules={targeted.given!r} is a pattern, which layers_to_transform and "
            "layers_pattern cannot go with; write the layers into it"
        )

    def hold(path: str) -> bool:
        if not chosen or path in targeted.names:
            return True
        match = next((match for pattern in patterns if (match := pattern.match(path))), None)
        return match is not None and match["idx"] is not None and int(match["idx"]) in chosen

    return hold


def _names(raw: dict[str, Any], key: str, where: Path) -> list[str]:
    given = raw.get(key)
    if given is not None and not (isinstance(given, list) and all(isinstance(name, str) for name in given)):
        raise ModelError(f"{where}: {key}={given!r} is not a list of names")
    return given or []


def _compiled(pattern: str, key: str, where: Path) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{where}: {key} holds '{pattern}', which is no regular expression ({error})") from None


def _ends(path: str) -> list[str]:
    """What a name must be for the path to equal it, or to end with a dot and it."""
    parts = path.split(".")
    return [".".join(parts[first:]) for first in range(len(parts))]


def _modules(model: ModelConfig) -> dict[str, tuple[str, int] | None]:
    """Path in transformers -> projection and layer of every module of a base; None for what is no projection."""
    names, projections = model.names, projection_shapes(model)
    weighted: dict[str, tuple[str, int] | None] = {}
    for layer in range(model.num_hidden_layers):
        for leaf in block_weights(model):
            if not leaf.endswith("_bias"):
                weighted[module_path(names, leaf, layer)] = (leaf, layer) if leaf in projections else None
    weighted |= dict.fromkeys(module_path(names, leaf, None) for leaf in ("embed_tokens", "norm", "lm_head"))
    found: dict[str, tuple[str, int] | None] = {}
    for path, module in weighted.items():
        parts = path.split(".")
        for end in range(1, len(parts)):  # what holds it
            found.setdefault(".".join(parts[:end]), None)
        found[path] = module
    # And those without weights.
    mlps = [path for path in found if path.endswith(".mlp")]
    return found | dict.fromkeys([*(f"{mlp}.act_fn" for mlp in mlps), f"{names.body}.rotary_emb"])
