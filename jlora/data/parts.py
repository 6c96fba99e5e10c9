"""Which characters of a chat's text are of tools, and which are reasoning: for people who look at rows.

Knows nothing of tokens or of what is trained.
"""

from os.path import commonprefix
from typing import Any, Literal

from jlora.data import chats, reasoning
from jlora.data.conversation import TOOL_ROLES, Conversation, conversation_of
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer

Kind = Literal["", "tool", "thought"]
Parts = list[tuple[int, int, Kind]]


def parts_of(tokenizer: Tokenizer, row: dict[str, Any], format: str, kept: str) -> tuple[str, Parts]:
    """A row's text, and spans of its characters: tools that there are, calls of them, what they return; reasoning.

    Args:
      format: of rows that are chats. kept: as `data.reasoning`.

    Raises:
      BadRow: the row has no text. ConfigError: there is no template.
    """
    chat = conversation_of(row, format, answered=True)
    roles = {message["role"] for message in chat.messages if message["role"] in TOOL_ROLES}
    try:
        text, spans = chats.write(tokenizer, chat, kept, ["assistant", *roles])
    except BadRow:  # a template may write what a tool returns in a way of its own
        text, spans = chats.write(tokenizer, chat, kept, ["assistant"])
    found = _tools(tokenizer, chat, text)
    for number, start, end in spans:
        message = chat.messages[number]
        if message["role"] in TOOL_ROLES:
            found.append((start, end, "tool"))
            continue
        told = reasoning.answered(text, start, end, mask=True)
        edges = [start, *(edge for part in told for edge in part), end]
        found += [(first, last, "thought") for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]
        if "tool_calls" in message:
            content = (message["content"] or "").rpartition("</think>")[2].strip()
            begun = told[0][0] if told else end
            found.append((text.find(content, begun, end) + len(content) if content else begun, end, "tool"))
    return text, found


def _tools(tokenizer: Tokenizer, chat: Conversation, text: str) -> Parts:
    """Where the tools stand that a model may call: what is not in the text without them."""
    if not chat.tools:
        return []
    try:
        without = chats.render(tokenizer, chat.messages, None, add_generation_prompt=False)
    except BadRow:
        return []
    start = len(commonprefix([text, without]))
    end = len(text) - len(commonprefix([text[start:][::-1], without[start:][::-1]]))
    while 0 < start < end and text[start - 1] == text[end - 1]:  # else it may begin within the head of a turn
        start, end = start - 1, end - 1
    return [(start, end, "tool")]
