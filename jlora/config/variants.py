"""The runs of a sweep: one config for each entry, which is the config of its separate run."""

import re
from typing import Any

from pydantic import ValidationError

from jlora.config.section import Section, nearest
from jlora.config.sections import Config
from jlora.errors import ConfigError

# What the entries of a sweep may set; all else decides the shape of the one compiled step, or is shared.
VARIED = (
    *(f"lora.{key}" for key in ("rank", "alpha", "use_rslora", "init_from")),
    *(f"data.{key}" for key in ("train", "eval", "split", "format", "prompt", "train_on", "on_bad_row")),
    *(f"training.{key}" for key in ("epochs", "max_steps", "seed", "log_every", "eval_every", "save_every")),
    *(f"training.{key}" for key in ("keep_checkpoints", "max_nonfinite_steps")),
    *(f"optimizer.{key}" for key in ("learning_rate", "weight_decay", "schedule", "warmup_steps")),
)


def variants(cfg: Config) -> list[Config]:
    """The config of each entry of `cfg.sweep`, with `output_dir/<name>` as its run folder and no sweep of its own.

    Raises:
      ConfigError: an entry without a name or with another's, with a key that is unknown or can not differ, or with
        a bad value; or a sweep of what can not be trained together.
    """
    runs: dict[str, Config] = {}
    for number, entry in enumerate(cfg.sweep, 1):
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"sweep entry {number}: needs a name of letters, digits, - and _, not {name!r}")
        if name in runs:
            raise ConfigError(f"sweep entry {number}: the name '{name}' stands twice; each run needs its own")
        tree: dict[str, Any] = cfg.model_dump() | {"sweep": [], "output_dir": f"{cfg.output_dir}/{name}"}
        for key, value in entry.items():
            if key != "name":
                _set(tree, key, value, name)
        try:
            runs[name] = Config.model_validate(tree)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"][:2]))
            text = problem["ctx"]["error"] if problem["type"] == "value_error" else problem["msg"]
            raise ConfigError(f"sweep entry '{name}': {where}{': ' * bool(where)}{text}") from None
    found = list(runs.values())
    if cfg.sweep and cfg.method != "lora":
        raise ConfigError("a sweep trains adapters over one frozen base; set method=lora, or take sweep out")
    if cfg.sweep and cfg.training.wandb:
        raise ConfigError("training.wandb logs one run of a process; take it out of the sweep")
    if cfg.sweep and cfg.training.samples:
        raise ConfigError("training.samples is for a run of its own; take it out of the sweep")
    if cfg.sweep and (cfg.lora.rank_pattern or cfg.lora.alpha_pattern or cfg.lora.layers_to_transform):
        raise ConfigError(
            "a sweep has one rank and one scale for all layers of a run; take lora.rank_pattern, alpha_pattern and "
            "layers_to_transform out"
        )
    if cfg.optimizer.name == "adafactor" and len({run.lora.rank for run in found}) > 1:
        raise ConfigError("the ranks of a sweep are equal with adafactor, whose update depends on the whole shape")
    if cfg.objective.name not in ("sft", "orpo") and any(run.lora.init_from for run in found):
        raise ConfigError(
            f"a sweep with objective.name={cfg.objective.name} starts from fresh adapters; take lora.init_from out"
        )
    return found


def _set(tree: dict[str, Any], key: str, value: Any, name: str) -> None:
    section, _, leaf = str(key).partition(".")
    if key not in VARIED:
        field = Config.model_fields.get(section)
        kind = field.annotation if field else None
        known = isinstance(kind, type) and issubclass(kind, Section) and leaf in kind.model_fields
        if known or (field is not None and not leaf):
            raise ConfigError(
                f"sweep entry '{name}': '{key}' is the same for all runs of a sweep; set it for all, or run it apart"
            )
        raise ConfigError(f"sweep entry '{name}': unknown key '{key}'{nearest(str(key), VARIED)}")
    tree[section][leaf] = value
