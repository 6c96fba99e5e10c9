"""Another tool's LoRA configuration as a jlora one, and a list of what it lost on the way.

Owns which tools are known and how the outcome is written. The tables are the tools' own modules.
"""

from pathlib import Path

from pydantic import ValidationError

from jlora.config.convert import axolotl, torchtune
from jlora.config.convert.rules import Conversion, Effect, Note
from jlora.config.reading import describe
from jlora.config.sections import Config
from jlora.config.yaml_text import dump_yaml, read_yaml_of
from jlora.errors import ConfigError

PEERS = (axolotl, torchtune)
HEADINGS: dict[Effect, str] = {
    "result": "CHANGES THE RESULT, and has no counterpart here:",
    "cost": "changes speed, memory or bookkeeping alone:",
    "aside": "not needed here:",
}


def convert(path: str | Path, devices: int) -> tuple[str, str, list[Note]]:
    """Convert an Axolotl or torchtune YAML.

    Args:
      devices: how many the peer's file runs on, whose batches it counts each by itself.

    Returns:
      The tool's name, the jlora config as YAML, which `load_config` takes, and the notes, the gravest first.

    Raises:
      ConfigError: no file, none of the two, or a value that no jlora config can hold.
    """
    path = Path(path)
    tree = read_yaml_of(path)
    peer = next((each for each in PEERS if isinstance(tree, dict) and each.is_ours(tree)), None)
    if peer is None:
        raise ConfigError(
            f"{path}: looks like no configuration of Axolotl (base_model) or torchtune (model._component_)"
        )
    try:
        converted = peer.convert(tree, devices)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not as {peer.NAME} documents it: {error}") from None
    text, order = _finish(path, converted), list(HEADINGS)
    return peer.NAME, text, sorted(dict.fromkeys(converted.notes), key=lambda note: order.index(note.effect))


def _finish(path: Path, converted: Conversion) -> str:
    """The config as YAML, validated."""
    tree = converted.tree
    for key, stand_in in (("data.train", "rows.jsonl"), ("model.path", "base"), ("output_dir", f"runs/{path.stem}")):
        if not converted.get(key):
            converted.set(key, stand_in)
            converted.note(key, None, "result", f"is not in the file; {stand_in} stands for it")
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: converted, {describe(error)}; change that key in the file") from None
    ordered = {name: tree[name] for name in Config.model_fields if name in tree}
    return dump_yaml(ordered)


def describe_notes(notes: list[Note]) -> list[str]:
    """The notes as lines for people, the gravest first, under a heading each."""
    lines: list[str] = []
    for effect, heading in HEADINGS.items():
        found = [note for note in notes if note.effect == effect]
        if found:
            lines.append(heading)
        lines += [f"  {note.key}{f': {note.value}' if note.value else ''} -- {note.why}" for note in found]
    return lines
