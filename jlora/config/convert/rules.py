"""What becomes of one key of another tool's configuration, and what is told about it.

Owns the vocabulary in which `axolotl` and `torchtune` beside it are written. Knows no tool.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from jlora.config.sections import assign
from jlora.config.yaml_text import yaml_scalar

# What a key without a counterpart changes: the trained adapter; how fast it is trained, or in how much memory; neither.
Effect = Literal["result", "cost", "aside"]
LOGS = "metrics.jsonl and TensorBoard are always written; for others set training.wandb, mlflow or trackio"


@dataclass(frozen=True)
class Note:
    """One key of the peer that is not in the jlora config as it was; its value in a short line."""

    key: str
    value: str
    effect: Effect
    why: str


@dataclass(frozen=True)
class To:
    """A key that has a counterpart.

    Attributes:
      ours: dotted jlora key.
      convert: the peer's value as ours; raises `Differs` where there is none.
    """

    ours: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Without:
    """A key that has none.

    Attributes:
      harmless: values at which the peer does what jlora does anyway, so that nothing is to be told.
    """

    effect: Effect
    why: str
    harmless: tuple[Any, ...] = ()


@dataclass
class Differs(Exception):
    """A value that jlora has no equal for.

    Attributes:
      instead: what is taken for it; None leaves the default.
    """

    why: str
    effect: Effect = "result"
    instead: Any = None


Table = dict[str, To | Without]


@dataclass
class Conversion:
    """A jlora config that grows, and the notes on what it lacks.

    Attributes:
      tree: nested keys, as in a config file.
      notes: in the order in which they were met.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        """Set a dotted jlora key; the later one counts."""
        assign(self.tree, key, value)

    def get(self, key: str) -> Any:
        """A dotted key that was set, or None."""
        section, _, leaf = key.partition(".")
        value = self.tree.get(section)
        return value.get(leaf) if leaf and isinstance(value, dict) else value

    @property
    def devices_of_a_row(self) -> int:
        """Devices that share the rows of a batch: those of mesh.tensor and mesh.context."""
        return int(self.get("mesh.tensor") or 1) * int(self.get("mesh.context") or 1)

    def note(self, key: str, value: Any, effect: Effect, why: str) -> None:
        """Say of a peer's key what became of it."""
        text = "" if value is None else " ".join(yaml_scalar(value).split())
        self.notes.append(Note(key, text if len(text) <= 60 else f"{text[:57]}...", effect, why))

    def apply(self, key: str, value: Any, rule: To | Without) -> None:
        """Do with one set key of the peer as its row of the table says."""
        if isinstance(rule, Without):
            if value not in rule.harmless:
                self.note(key, value, rule.effect, rule.why)
            return
        try:
            self.set(rule.ours, rule.convert(value))
        except Differs as differs:
            self.note(key, value, differs.effect, differs.why)
            if differs.instead is not None:
                self.set(rule.ours, differs.instead)
        except (TypeError, ValueError):
            self.note(key, value, "result", f"is not of the kind that {rule.ours} takes, and was left out")


def alike(rule: To | Without, keys: str) -> Table:
    """The same rule for several keys, between which are spaces."""
    return dict.fromkeys(keys.split(), rule)


def one_of(
    choices: dict[str, Any], else_: Any, why: str = "jlora has no such choice; {} is taken"
) -> Callable[[Any], Any]:
    """A conversion by table; any other value differs, and `else_` is taken for it."""

    def convert(value: Any) -> Any:
        if isinstance(value, str) and value in choices:
            return choices[value]
        raise Differs(why.format(else_), instead=else_)

    return convert


def is_set(value: Any) -> bool:
    """Whether a key was given a value at all: peers' files name many keys and leave them empty."""
    return value is not None and value != "" and value != [] and value != {}
