"""YAML + `dotted.key=value` overrides -> a validated `Config`, and those of a sweep; what is wrong in one sentence."""

import copy
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jlora.config.section import nearest
from jlora.config.sections import SECTIONS, Config, assign, known_keys
from jlora.config.yaml_text import parse_yaml, read_yaml_of
from jlora.errors import ConfigError

# Characters of a wrong value that a sentence repeats.
MAX_SHOWN = 200

# Problems of a config that one sentence tells.
MOST_PROBLEMS = 10

# What all runs of a sweep have in common: the base on the devices with its tokenizer, and the sweep itself.
COMMON_KEYS = (
    *(f"model.{key}" for key in ("path", "tokenizer", "resize_embeddings", "dtype", "quantization", "scan_layers")),
    *(f"model.{key}" for key in ("compute", "compute_max_loss_gap", "compute_fallback")),
    *("data.chat_template", "method", "output_dir", "sweep", "sweep_halving"),
)
COMMON_SECTIONS = ("mesh.", "distributed.")


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read YAML, apply `dotted.key=value` overrides (values are YAML), validate.

    Raises:
      ConfigError: unreadable file, bad YAML, unknown key (with the nearest name) or bad value.
    """
    path = Path(path)
    tree = read_yaml_of(path)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must hold keys such as model and data, not {type(tree).__name__}")
    return overridden(tree, str(path), overrides)


def overridden(tree: dict[str, Any], where: str, overrides: list[str] | tuple[str, ...]) -> Config:
    """A tree of keys, which is changed, with `dotted.key=value` overrides (values are YAML), as a config.

    Raises:
      ConfigError: as `load_config`.
    """
    given = [_apply_override(tree, override) for override in overrides]
    return validated(tree, where, given)


def config_of(config: str | Path | dict[str, Any], overrides: dict[str, Any]) -> Config:
    """The config of a Python program: a YAML file or a tree of keys, and dotted keys with values in place of its own.

    Raises:
      ConfigError: as `load_config`.
    """
    where = "the config" if isinstance(config, dict) else str(config)
    tree = copy.deepcopy(config) if isinstance(config, dict) else read_yaml_of(Path(config))
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: must hold keys such as model and data, not {type(tree).__name__}")
    for key, value in overrides.items():
        try:
            assign(tree, key, value)
        except ValueError as error:
            raise ConfigError(f"{_shown(key)}: {error}") from None
    return validated(tree, where)


def validated(tree: dict[str, Any], where: str, given: Collection[str] = ()) -> Config:
    """A tree of keys as a config.

    Args:
      where: it stands. given: keys of it that the command line sets, dotted.

    Raises:
      ConfigError: naming `where`, the key, and what it should be.
    """
    try:
        cfg = Config.model_validate(tree)
    except ValidationError as error:
        from jlora.config.convert.names import tool_of

        peer = tool_of(tree)
        hint = f"; this looks like a file of {peer}, which jlora config --from {where} converts" if peer else ""
        raise ConfigError(describe(error, where, given) + hint) from None
    try:
        variants(cfg)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return cfg


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
                _vary(tree, key, value, name)
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


def _vary(tree: dict[str, Any], key: str, value: Any, name: str) -> None:
    known = known_keys()
    if key in COMMON_KEYS or str(key).startswith(COMMON_SECTIONS) or key in Config.model_fields:
        raise ConfigError(
            f"sweep entry '{name}': '{key}' is the same for all runs of a sweep; set it for all, or run it apart"
        )
    if key not in known:
        raise ConfigError(f"sweep entry '{name}': unknown key '{key}'{_instead(str(key))}")
    assign(tree, key, value)


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Set the key of an override, and tell it."""
    key, equals, text = override.partition("=")
    shown = _shown(override)
    if not equals or not key:
        raise ConfigError(f"override '{shown}' is not of the form dotted.key=value, without spaces")
    try:
        assign(tree, key, parse_yaml(text))
    except ValueError as error:
        raise ConfigError(f"override '{shown}': {error}") from None
    return key


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def describe(error: ValidationError, where: str = "", given: Collection[str] = ()) -> str:
    """What is wrong, in one sentence of ten problems at most.

    Args:
      where: the keys stand. given: those that the command line sets, dotted.
    """
    # Unknown keys first: they may be why others are missing. Members of a union show up behind the key as type tags.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for problem in problems:
        names = tuple(str(part) for part in problem["loc"])
        by_key.setdefault(names[: 2 if names and names[0] in SECTIONS else 1], []).append(problem)
    several = len(by_key) > 1
    says, before = [], None
    for number, (names, found) in enumerate(list(by_key.items())[:MOST_PROBLEMS], 1):
        place = "the command line" if _is_given(names, given) else where
        new = place if place != before else ""
        says.append(f"{new}{': ' * bool(new)}{f'({number}) ' * several}{_problem(names, found, several)}")
        before = place
    left = len(by_key) - len(says)
    return "; ".join(says) + f"; and {left} more" * (left > 0)


def _is_given(names: tuple[str, ...], given: Collection[str]) -> bool:
    """Whether the command line sets a key: itself, one within it that is no section, or all that it lies in."""
    key = ".".join(names)
    within = len(names) > 1 or key not in SECTIONS
    return any(key == own or key.startswith(f"{own}.") or (within and own.startswith(f"{key}.")) for own in given)


def _problem(names: tuple[str, ...], problems: list[Any], among: bool) -> str:
    """What is wrong with one key.

    Args:
      problems: pydantic's, of each member of a union its own. among: others, so that not all known keys are told.
    """
    first = problems[0]
    fields = (SECTIONS.get(names[0], Config) if names else Config).model_fields
    key = ".".join(names)
    shown = _shown(repr(first["input"]))
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_instead(key, among)}"
    if first["type"] == "missing":
        return f"key '{key}' is missing; set it in the file or as {key}=VALUE"
    if first["type"] == "invalid_key":
        return f"key {shown} is not text"
    if first["type"] == "value_error":
        return f"{key}: {first['ctx']['error']}".removeprefix(": ")  # a problem of the whole has no key
    if first["type"] == "model_type":
        return f"{key}: must hold keys of its own ({', '.join(fields)}), but it is {shown}"
    says = [
        "be a smaller number"
        if p["type"] == "int_parsing_size"
        else re.sub(r"^\w+ should |, unable to.*", "", p["msg"])
        for p in problems
    ]
    if "be a valid number" in says:  # which an integer is
        says = [each for each in says if each != "be a valid integer"]
    text = f"{key}: should {' or '.join(dict.fromkeys(says)).replace(' or be ', ' or ')}, but it is {shown}"
    if isinstance(first["input"], bool | int | float) and any(p["type"] == "string_type" for p in problems):
        text += f'; for the text itself write {key}=\'"..."\', or "..." in the file'
    return text


def _instead(key: str, short: bool = False) -> str:
    """What follows a key that is not known: ours for another tool's, the nearest, or all of them unless `short`."""
    from jlora.config.convert.names import in_jlora

    section, _, leaf = key.rpartition(".")
    elsewhere = [f"{name}.{leaf}" for name, other in SECTIONS.items() if leaf in other.model_fields]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    if theirs := in_jlora(key):
        return f"; {theirs}"
    known, prefix = (
        (SECTIONS[section].model_fields, f"{section}.") if section in SECTIONS else (Config.model_fields, "")
    )
    instead = nearest(leaf, known, prefix)
    return "" if short and "did you mean" not in instead else instead
