"""Which format a row is of, by its columns."""

from typing import Any

# Format -> the columns that a row of it must have; the more telling ones first.
COLUMNS = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
# Of a row that is yet to be answered.
ASKED = {"alpaca": ("instruction",), "completion": ("prompt",)}
MOST_NAMED, LONGEST_NAME = 8, 40


def format_of(row: dict[str, Any], answered: bool = True) -> str | None:
    """The first format whose columns a row has, its answer's too if `answered`; None where there is none."""
    formats = COLUMNS if answered else COLUMNS | ASKED
    return next((name for name, columns in formats.items() if all(row.get(c) is not None for c in columns)), None)


def columns_of(row: dict[str, Any]) -> str:
    """The columns of a row, as a sentence names them."""
    names = [str(name)[:LONGEST_NAME] for name in row][:MOST_NAMED]
    return ", ".join(names) + (", ..." if len(row) > MOST_NAMED else "") or "no column"
