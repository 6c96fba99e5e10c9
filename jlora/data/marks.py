"""Marks in the turns of a conversation, which tell where a chat template has put them.

They are characters that stand in no text (noncharacters, Unicode 23.7), so a rendering without them is the text.
"""

import re
from typing import NamedTuple

from jlora.data.conversation import THOUGHTS, Message

# A mark is its kind, the number of the message and an end: in its content, the name of a tool called, its reasoning.
CONTENT, CALL, THOUGHT = _KINDS = "\ufdd0\ufdd1\ufdd2"
_MARK = re.compile(f"[{_KINDS}]\\d+\ufdd3")
# What stands for the tags of a reasoning that the template is not to see, and so not to drop.
_HIDDEN = {"<think>": "\ufdd4", "</think>": "\ufdd5"}


class Mark(NamedTuple):
    """Where a mark stood: characters before it, its kind, and the message it was in."""

    at: int
    kind: str
    message: int


def hide(content: str) -> str:
    """A content whose tags of reasoning a template cannot tell from other text."""
    for tag, hidden in _HIDDEN.items():
        content = content.replace(tag, hidden)
    return content


def shown(text: str) -> str:
    """A rendering with the tags that were hidden."""
    for tag, hidden in _HIDDEN.items():
        text = text.replace(hidden, tag)
    return text


def bare(text: str) -> str:
    """A text without marks, its hidden tags shown."""
    return _MARK.sub("", shown(text))


def mark(message: Message, number: int, share: float) -> Message:
    """A message with marks in its content, its reasoning, and the name of the tool it calls last.

    Args:
      share: of a text, what stands before its mark; 1 puts it at the end.
    """

    def put(kind: str, text: str) -> str:
        words = text.strip()
        at = len(text) - len(text.lstrip()) + round(len(words) * share)
        return f"{text[:at]}{kind}{number}\ufdd3{text[at:]}" if words else text

    found = dict(message)
    content = message["content"] or ""
    if content.strip():
        thought, tag, rest = content.partition("</think>") if message["role"] == "assistant" else ("", "", content)
        if tag and rest.strip():
            inner = put(THOUGHT, thought.removeprefix("<think>"))
            found["content"] = "<think>" * thought.startswith("<think>") + inner + tag + put(CONTENT, rest)
        else:
            found["content"] = put(CONTENT, content)
    for name in THOUGHTS:
        if isinstance(message.get(name), str):
            found[name] = put(THOUGHT, message[name])
    if "tool_calls" in message:
        *others, last = message["tool_calls"]
        function = last["function"] | {"name": put(CALL, last["function"]["name"])}
        found["tool_calls"] = [*others, last | {"function": function}]
    return found


def read(raw: str) -> tuple[str, list[Mark]]:
    """A rendering without its marks, and where they stood."""
    raw = shown(raw)
    pieces, marks, last, at = [], [], 0, 0
    for found in _MARK.finditer(raw):
        pieces.append(raw[last : found.start()])
        at += found.start() - last
        last = found.end()
        marks.append(Mark(at, found[0][0], int(found[0][1:-1])))
    return "".join([*pieces, raw[last:]]), marks
