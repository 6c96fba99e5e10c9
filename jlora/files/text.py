"""Text that others wrote, made safe to show."""

import re

# Control characters move a terminal's cursor or set the clipboard, and are invalid in HTML even when escaped; halves
# of surrogate pairs cannot be encoded; bidi overrides and isolates turn the text around them.
_REFUSED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """Text without the characters that no page and no terminal may be given."""
    return _REFUSED.sub("\N{REPLACEMENT CHARACTER}", text)


def counted(number: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
