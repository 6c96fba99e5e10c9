"""The runs of a sweep: one config for each entry, which is the config of its separate run."""

import re
from typing import Any

from pydantic import ValidationError

from jlora.config.keys import assign, known_keys
from jlora.config.section import nearest
from jlora.config.sections import Config
from jlora.errors import ConfigError

# What all runs of a sweep have in common: the base on the devices with its tokenizer, and the sweep itself.
COMMON_KEYS = (
    *(f"model.{key}" for key in ("path", "tokenizer", "dtype", "quantization")),
    *("data.chat_template", "method", "output_dir", "sweep", "sweep_halving"),
)
COMMON_SECTIONS = ("mesh.", "distributed.")


def variants(cfg: Config) -> list[Config]:
    """The config of each entry of `cfg.sweep`, with `output_dir/<name>` as its run folder and no sweep of its own.

    Raises:
      ConfigError: an entry without a name or with another's, with a key that is unknown or cannot differ, or with
        a bad value; or a sweep of what cannot be trained together.
    """
    runs: dict[str, Config] = {}
    for number, entry in enumerate(cfg.sweep, 1):
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise ConfigError(f"sweep entry {number}: needs a name of letters, digits, - and _, not {name!r}")
        if name in runs:
            raise ConfigError(f"sweep entry {number}: duplicate name '{name}'; each run needs its own")
        tree: dict[str, Any] = cfg.model_dump() | {
            "sweep": [],
            "sweep_halving": False,
            "output_dir": f"{cfg.output_dir}/{name}",
        }
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
    if cfg.sweep and cfg.method != "lora":
        raise ConfigError("a sweep trains adapters over one frozen base; set method=lora, or take sweep out")
    if cfg.sweep_halving and not all(run.data.eval for run in runs.values()):
        raise ConfigError("sweep_halving compares runs by their held-out loss; set data.eval, or sweep_halving=false")
    return list(runs.values())


def _set(tree: dict[str, Any], key: str, value: Any, name: str) -> None:
    known = known_keys()
    if key in COMMON_KEYS or str(key).startswith(COMMON_SECTIONS) or key in Config.model_fields:
        raise ConfigError(
            f"sweep entry '{name}': '{key}' is the same for all runs of a sweep; set it for all, or run it apart"
        )
    if key not in known:
        raise ConfigError(f"sweep entry '{name}': unknown key '{key}'{nearest(str(key), known)}")
    assign(tree, key, value)
