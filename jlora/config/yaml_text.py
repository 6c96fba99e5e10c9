"""YAML as configs are read and written: bounded, without aliases, and read back as it was."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from jlora.errors import ConfigError
from jlora.files.paths import beside

# PyYAML takes some twenty seconds a MiB.
MAX_YAML_BYTES = 64 * 2**10


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `2e-4` is a number, as in YAML 1.2, keys are text, and a duplicate key is an error.

    Nothing can be referred to by `*name`: a few lines of that stand for more values than fit in memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"*{event.anchor}: write the value itself", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}'", node.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                problem = f"key {key!r} is not text; put it in quotes, or take it out"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would read as a number."""


# `output_dir: 2026-11-28` is a name, not a date: no key takes one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for one in (_Loader, _Dumper):
    one.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def dump_yaml(tree: Any) -> str:
    """Plain values as YAML text that `parse_yaml` reads back, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def yaml_scalar(value: Any) -> str:
    """`value` as one line of YAML."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("...").strip()


def parse_yaml(text: str) -> Any:
    """YAML text as plain values, by the rules of a config: `2e-4` is a number, a key stands once.

    Raises:
      ValueError: not such YAML, or longer than any config; one line says why and where.
    """
    if len(text) > MAX_YAML_BYTES:
        raise ValueError(f"more than {MAX_YAML_BYTES >> 10} KiB")
    try:
        return yaml.load(text, _Loader)  # noqa: S506, a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split()).replace('in "<unicode string>", ', "at ")) from None
    except RecursionError:
        raise ValueError("nested too deep") from None
    except (ValueError, AttributeError, TypeError, LookupError, ArithmeticError) as error:
        # What PyYAML raises where a value is not what its tag or its look says, such as 2020-99-99 or an empty !!int.
        raise ValueError(f"a value that cannot be read ({error})") from None


def read_yaml(path: Path) -> Any:
    """A YAML file as plain values, by the rules of a config.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no such YAML, no UTF-8, or longer than any config.
    """
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"more than {MAX_YAML_BYTES >> 10} KiB")
    return parse_yaml(content.decode("utf-8"))


def read_yaml_of(path: Path) -> Any:
    """As `read_yaml`, of a file that the user names.

    Raises:
      ConfigError: it cannot be read, or is no such YAML.
    """
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{beside(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name another file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
