"""What an assistant thinks before it answers: in a message, and in the text that a chat template makes of it."""

import re

from jlora.data.conversation import THOUGHTS, Message
from jlora.data.marks import hide
from jlora.data.row import BadRow

# A reasoning and what sets it apart, as DeepSeek, Qwen and others write it, and gpt-oss.
_THOUGHT = re.compile(
    r"<think>.*?</think>\s*|<\|channel\|>analysis<\|message\|>.*?<\|end\|>(?:<\|start\|>assistant(?=<))?", re.DOTALL
)
_EMPTY = re.compile(r"\s*<think>\s*</think>\n{0,2}")
# The same after a prompt that has begun it.
_REST = re.compile(r".*?</think>\s*", re.DOTALL)
_EMPTY_REST = re.compile(r"\s*</think>\n{0,2}")
TWICE = re.compile(r"<think>\s*<think>")
_BEGUN, _TAG = re.compile(r"<think>\s*$"), 64  # and how many characters are looked at for it


def last_answer(messages: list[Message]) -> int | None:
    """The last message of the assistant, if no user's follows."""
    last = _last(messages, "assistant")
    return last if last > _last(messages, "user") else None


def without_history(messages: list[Message]) -> list[Message]:
    """The messages without the reasoning of answers that a user's turn follows.

    Raises:
      BadRow: nothing is left of one of them.
    """
    last = _last(messages, "user")
    kept = [_without(m) if m["role"] == "assistant" and i < last else m for i, m in enumerate(messages)]
    for number, message in enumerate(kept, 1):
        if message["role"] == "assistant" and not message["content"] and not message.get("tool_calls"):
            raise BadRow("empty_response", f"message {number} is reasoning alone, which data.reasoning=strip removes")
    return kept


def in_content(message: Message, *, begun: bool = False) -> Message | None:
    """An answer with its reasoning in its content, where a template does not see it; None without one.

    Args:
      begun: the template writes the tag before it.
    """
    content = message["content"] or ""
    thought = next((message[key] for key in THOUGHTS if isinstance(message.get(key), str)), "")
    if thought.strip():
        content = f"<think>\n{thought.strip()}\n</think>\n\n{content.lstrip()}"
    inside, tag, _ = content.partition("</think>")
    if not (tag and inside.replace("<think>", "").strip()):
        return None
    if begun:
        content = content.removeprefix("<think>").lstrip("\n")
    return {key: value for key, value in message.items() if key not in THOUGHTS} | {"content": hide(content)}


def answered(text: str, start: int, end: int, *, mask: bool) -> list[tuple[int, int]]:
    """The parts of an answer's characters without an empty reasoning, and with `mask` without any."""
    begun = _BEGUN.search(text[max(0, start - _TAG) : start]) is not None
    first = (_REST if mask else _EMPTY_REST) if begun else _EMPTY
    if skipped := first.match(text, start, end):
        start = skipped.end()
    if not mask:
        return [(start, end)]
    parts = []
    for thought in _THOUGHT.finditer(text, start, end):
        parts.append((start, thought.start()))
        start = thought.end()
    return [part for part in [*parts, (start, end)] if part[0] < part[1]]


def _last(messages: list[Message], role: str) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] == role), default=-1)


def _without(message: Message) -> Message:
    content = message["content"]
    if content and "</think>" in content:
        content = content.rpartition("</think>")[2].lstrip()
    return {key: value for key, value in message.items() if key not in THOUGHTS} | {"content": content}
