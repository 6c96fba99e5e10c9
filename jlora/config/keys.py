"""The keys of a config, nested and dotted: `model.path` is `path` in `model`."""

from typing import Any

from jlora.config.section import Section
from jlora.config.sections import Config

# By name, what of a config has keys of its own.
SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def known_keys() -> list[str]:
    """Every key of a config."""
    inner = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
    return [*(name for name in Config.model_fields if name not in SECTIONS), *inner]


def dotted(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted key; an empty mapping has none."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value of a dotted key, in sections that are made where they are missing.

    Raises:
      ValueError: a part of the key is no section.
    """
    *sections, leaf = key.split(".")
    for name in sections:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ValueError(f"'{name}' is not a section")
    tree[leaf] = value
