"""A row of data with the place where it stands, and how long it may be."""

from dataclasses import dataclass
from typing import Any

# The longest row, as JSON or CSV, or its values in Arrow. JSON can take up some forty times its length once it is read.
MAX_ROW_BYTES = 16 * 2**20
TOO_LONG = f"longer than {MAX_ROW_BYTES >> 20} MiB"


class BadRow(Exception):
    """A row that cannot be used; `message` is one clause, to which the reader adds file and line."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Row:
    """One row and where it stands, such as `train.jsonl:12`; `value` is a `BadRow` where it cannot be read."""

    where: str
    value: Any
