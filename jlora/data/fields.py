"""A field of a row, or of a turn in it, checked. Knows nothing of what the field is for."""

import math
import re
from typing import Any

from jlora.data.formats import columns_of, format_of
from jlora.data.row import BadRow


def field_of(row: Any, name: str, kind: type) -> Any:
    """A field of a row, or of a turn in it.

    Raises:
      BadRow: it is missing, of another type, or no text.
    """
    value = row.get(name) if isinstance(row, dict) else None
    if value is None:
        raise BadRow("missing_field", f'the field "{name}" is missing{_instead(row)}')
    if not isinstance(value, kind):
        raise BadRow("wrong_type", f'the field "{name}" is {type(value).__name__}, not {kind.__name__}')
    if isinstance(value, str):
        check_text(value, name)
    return value


def optional_text(row: dict[str, Any], name: str) -> str:
    """A field that may be missing or blank, and is empty then.

    Raises:
      BadRow: as `field_of`.
    """
    text = "" if row.get(name) is None else field_of(row, name, str)
    return text if text.strip() else ""


def check_text(text: str, name: str) -> None:
    """Refuse what is no text.

    Raises:
      BadRow: a lone surrogate, or one of the characters that Unicode keeps for programs (`jlora.data.turns` does).
    """
    if found := re.search("[\ud800-\udfff\ufdd0-\ufdef]", text):
        what = "half of a surrogate pair" if found[0] < "\ue000" else f"U+{ord(found[0]):X}, which is no character"
        raise BadRow("not_unicode", f'the field "{name}" holds {what}')


def weight_of(row: dict[str, Any], name: str) -> float:
    """What the loss of a row or a turn is multiplied by, as one field of it says; 1 where there is none.

    Raises:
      BadRow: it is neither true, false nor a number of 0 or more.
    """
    value = row.get(name)
    if value is None:
        return 1.0
    try:
        weight = float(value)  # a CSV file has strings
    except (TypeError, ValueError):
        weight = math.nan
    if not 0.0 <= weight < math.inf:
        raise BadRow("wrong_weight", f'the field "{name}" is {value!r:.40}, not true, false or a number of 0 or more')
    return weight


def _instead(row: Any) -> str:
    """What a row has in place of the field that it lacks."""
    if not isinstance(row, dict) or "role" in row or "from" in row:  # a turn
        return ""
    other = format_of(row)
    return f" (it has {columns_of(row)}{f'; data.format={other} reads such rows' if other else ''})"
