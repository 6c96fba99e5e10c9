"""Formats of rows by their columns: which a format reads, which other names of them are understood, what is left.

Knows nothing of prompts or tokens.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jlora.config import DataSection
from jlora.data.pairs import pairs_of
from jlora.data.row import BadRow, Row
from jlora.data.rows import read_rows
from jlora.errors import ConfigError

# Format -> the columns that a row of it must have; the more telling ones first.
COLUMNS = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
# Those that it may have.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "tools"),
    "messages": ("system", "tools", "loss_mask", "weight"),
    "sharegpt": ("system", "tools", "loss_mask", "weight"),
    "alpaca": ("input", "system", "history", "weight"),
    "completion": ("weight",),
    "text": ("weight",),
}
# Other names of columns, as published data sets have them (GSM8K, Dolly, Orca, SQuAD); the more usual first.
OTHER_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "preference": {
        "prompt": ("question", "query", "instruction"),
        "chosen": ("chosen_response",),
        "rejected": ("rejected_response",),
    },
    "messages": {"messages": ("conversations", "conversation")},
    "sharegpt": {"conversations": ("conversation", "messages")},
    "alpaca": {
        "instruction": ("question", "query", "prompt"),
        "input": ("context",),
        "system": ("system_prompt",),
        "output": ("response", "answer", "completion"),
    },
    "completion": {
        "prompt": ("question", "query", "instruction"),
        "completion": ("response", "answer", "output"),
    },
    "text": {"text": ("content",)},
}
# Of pairs whose answers are single turns (LLaMA-Factory, Axolotl); a list of answers may hold the prompt already.
PROMPTS_OF_TURNS = ("conversations", "messages", "conversation")
# What a row that is yet to be answered must have, where that is less.
ASKED = {"alpaca": ("instruction",), "completion": ("prompt",)}
# What other trainers read beside text, and what rows of some format have.
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
KNOWN = frozenset({
    *(name for table in (COLUMNS, OPTIONAL) for names in table.values() for name in names),
    *(name for table in OTHER_NAMES.values() for names in table.values() for name in names),
    "system", "history", "tools", "functions", "weight", "loss_mask",
})  # fmt: skip
MOST_NAMED, LONGEST_NAME = 8, 40


def format_of(row: dict[str, Any], answered: bool = True, given: Mapping[str, str] | None = None) -> str | None:
    """The format whose columns a row has, most of them under their own names; None where it has those of none.

    Args:
      answered: those of the answer are among them. given: column of a format -> its name in the row.
    """
    found, given = [], given or {}
    for name, columns in (COLUMNS if answered else COLUMNS | ASKED).items():
        if not given.keys() <= {*COLUMNS[name], *OPTIONAL[name]}:
            continue
        if None not in (sources := [_source(row, column, OTHER_NAMES[name], given) for column in columns]):
            own = sum(source == column for source, column in zip(sources, columns, strict=True)) / len(columns)
            found.append((own, name))
    best = max(found, key=lambda pair: pair[0])[1] if found else None
    if best in ("messages", "sharegpt"):  # whose lists have the same names, so a turn tells
        lists = [given.get(column, column) for column in ("messages", "conversations", "conversation")]
        turns = next(row[name] for name in lists if row.get(name) is not None)
        turn = next((turn for turn in turns if isinstance(turn, dict)), {}) if isinstance(turns, list) else {}
        return "sharegpt" if "from" in turn else "messages" if "role" in turn else best
    return best


def lacking(row: dict[str, Any], given: Mapping[str, str]) -> tuple[str, list[str], list[str]]:
    """Of a row of no format the nearest one, its columns that are missing, and the row's texts that may be those."""
    used = {
        name: [_source(row, column, OTHER_NAMES[name], given) for column in columns]
        for name, columns in COLUMNS.items()
        if given.keys() <= {*columns, *OPTIONAL[name]}
    }
    nearest = min(used, key=lambda name: (used[name].count(None) / len(used[name]), name != "alpaca"))
    missing = [column for column, source in zip(COLUMNS[nearest], used[nearest], strict=True) if source is None]
    taken = {*used[nearest], *given.values()}
    return nearest, missing, [name for name, value in row.items() if isinstance(value, str) and name not in taken]


def columns_of(row: dict[str, Any]) -> str:
    """The columns of a row, as a sentence names them."""
    names = [str(name)[:LONGEST_NAME] for name in row][:MOST_NAMED]
    return ", ".join(names) + (", ..." if len(row) > MOST_NAMED else "") or "no column"


def _source(
    row: dict[str, Any], column: str, others: Mapping[str, tuple[str, ...]], given: Mapping[str, str]
) -> str | None:
    """The name under which a row has a column; None where it has none."""
    if column in given:
        return given[column]
    names = (column, *others.get(column, ()))
    return next((name for name in names if row.get(name) is not None), None)


@dataclass
class Columns:
    """Rows under a format's own names of columns, and what was found of other names while they were read.

    Attributes:
      format: of the rows. given: column -> its name in the rows, as `data.columns` has it.
      answered: rows hold their answers.
      renamed: (name in the rows, column) -> rows. unused: name -> rows that have something there which is not read.

    Raises:
      ConfigError: `given` has a column that is none of the format.
    """

    format: str
    given: Mapping[str, str]
    answered: bool = True
    renamed: Counter[tuple[str, str]] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        own = (*COLUMNS[self.format], *OPTIONAL[self.format])
        for column in self.given:
            if column not in own:
                raise ConfigError(f"data.columns.{column}: data.format={self.format} reads {', '.join(own)} alone")

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the format's columns under their own names; as it is where it lacks one, or is of another format.

        Raises:
          BadRow: it has pictures or sounds, lacks a column that `data.columns` names, or is of no format.
        """
        required, others = COLUMNS[self.format], OTHER_NAMES[self.format]
        own = (*required, *OPTIONAL[self.format])
        required = required if self.answered else ASKED.get(self.format, required)
        if self.format == "preference" and isinstance(row.get(self.given.get("chosen", "chosen")), dict):
            others = {"prompt": (*PROMPTS_OF_TURNS, *others["prompt"])}
        used = {column: _source(row, column, others, self.given) for column in own}
        for column in required:
            if column in self.given and row.get(self.given[column]) is None:
                lacking = f'the field "{self.given[column]}" (data.columns.{column}) is missing'
                raise BadRow("missing_field", f"{lacking} (it has {columns_of(row)})")
            if used[column] is None:
                left = [name for name in row if name not in KNOWN]
                if left and column not in row and format_of(row, self.answered) is None:
                    has = f"it has {columns_of(row)}; rename one, or set data.columns.{column}={left[0]}"
                    raise BadRow("missing_field", f'the field "{column}" is missing ({has})')
                return row  # of another format, or told by who reads the field
        if any(used[column] != column for column in required if column not in self.given):
            if any(all(row.get(name) is not None for name in names) for names in COLUMNS.values()):
                return row  # of another format, whose answers stand elsewhere
        names = {name for name in used.values() if name in row}
        for name, value in row.items():
            if name in names or value in (None, "", [], {}):
                continue
            if name in MEDIA:
                raise BadRow("media", f'the field "{name}" holds no text, and jlora trains on nothing else')
            if name in KNOWN and name not in self.given:
                self.unused[name] += 1
        renamed = {column: row[name] for column, name in used.items() if name in names}
        self.renamed.update((name, column) for column, name in used.items() if name in names and name != column)
        return {name: value for name, value in row.items() if name not in names and name not in own} | renamed


def rows_of(source: str, cfg: DataSection, columns: Columns | None = None) -> Iterator[Row]:
    """The rows of a source as a run reads them: objects, under the names that their format has for its columns.

    A preference row with several rejected answers is a row for each.

    Args:
      columns: counts what other names there are.

    Raises:
      DataError: as `read_rows`.
    """
    columns = columns or Columns(cfg.format, cfg.columns)
    for row in read_rows(source, cfg.split, cfg.separator):
        value = row.value
        try:
            if isinstance(value, dict):
                value = columns.read(value)
            elif not isinstance(value, BadRow):
                raise BadRow("wrong_type", f"a row must be a JSON object, not {type(value).__name__}")
        except BadRow as bad:
            value = bad
        if cfg.format == "preference":
            yield from pairs_of(Row(row.where, value))
        else:
            yield Row(row.where, value)
