"""A row of turns -> the messages and tools that a chat template takes, and how much each turn's loss counts.

Knows nothing of templates, tokens or of which turns are trained.
"""

import json
import math
from typing import Any, NamedTuple

from jlora.config.data import TURN_WEIGHTS
from jlora.data.fields import check_text, field_of, optional_text, weight_of
from jlora.data.row import BadRow

Message = dict[str, Any]

# Who speaks in a ShareGPT turn ("from") -> the role of a message, as Axolotl and LLaMA-Factory map them.
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
TOOL_ROLES = ("tool", "ipython", "function")
ROLES = ("system", "developer", "user", "assistant", *TOOL_ROLES)
# Where a turn's reasoning stands, by the names that transformers knows.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class Conversation(NamedTuple):
    """Messages and tools as chat templates take them, and the weight of each message's loss."""

    messages: list[Message]
    tools: list[Any] | None
    weights: list[float]


def conversation_of(row: dict[str, Any], format: str, *, answered: bool) -> Conversation:
    """The conversation of a row of format messages, sharegpt, or completion where that is in turns, checked.

    Either format takes turns of `role` and `content` or of `from` and `value`; as transformers' templates want them,
    arguments of tool calls are objects, and text parts one text.

    Args:
      answered: it must have a turn of the assistant.

    Raises:
      BadRow: what is wrong with it.
    """
    turns, column, asked = _turns(row, format, answered)
    messages = messages_of(turns, column)
    weights = [0.0] * asked + _weights(row, turns, messages)[asked:]
    system = optional_text(row, "system")
    if system and messages[0] != {"role": "system", "content": system}:
        if messages[0]["role"] == "system":
            raise BadRow("two_systems", 'the row has a system turn, and another text in "system"; keep one of them')
        messages, weights = [{"role": "system", "content": system}, *messages], [1.0, *weights]
    if answered and all(message["role"] != "assistant" for message in messages):
        raise BadRow("no_assistant_turn", "no turn is the assistant's")
    return Conversation(messages, tools_of(row), weights)


def _turns(row: dict[str, Any], format: str, answered: bool) -> tuple[list[Any], str, int]:
    """The turns of a row, the column that they are from, and how many of them are a prompt."""
    if format == "completion":
        prompt = field_of(row, "prompt", list)
        return prompt + (field_of(row, "completion", list) if answered else []), "prompt", len(prompt)
    column = "messages"
    if format == "sharegpt" or (row.get("messages") is None and row.get("conversations") is not None):
        column = "conversations"
    turns = _parsed(row, column) if isinstance(row.get(column), str) else field_of(row, column, list)
    return turns, column, 0


def messages_of(turns: list[Any], column: str = "messages") -> list[Message]:
    """The messages of a list of turns, checked.

    Raises:
      BadRow: what is wrong with one.
    """
    if not turns:
        raise BadRow("empty_messages", f'the list "{column}" is empty')
    return [_message(turn) for turn in turns]


def _message(turn: Any) -> Message:
    theirs = isinstance(turn, dict) and "from" in turn and "role" not in turn
    speaker = field_of(turn, "from" if theirs else "role", str)
    role = SHAREGPT_ROLES.get(speaker, speaker) if theirs else speaker
    if role not in (SHAREGPT_ROLES.values() if theirs else ROLES):
        known = SHAREGPT_ROLES if theirs else ROLES
        raise BadRow("wrong_role", f'a turn is from "{speaker}", not one of {", ".join(known)}')
    dropped = {"from", "value", "masked", "function_call", *TURN_WEIGHTS}
    message = {key: value for key, value in turn.items() if value is not None and key not in dropped}
    message["role"] = role
    name = "value" if theirs else "content"
    if theirs and speaker == "function_call":
        message["tool_calls"] = _calls(_json(field_of(turn, "value", str), "value"))
        message["content"] = None
        return message
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else None)
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _calls(calls)
    if calls and turn.get(name) is None:
        return message | {"content": None}
    content = message["content"] = _content(turn, name)
    if not content.strip() and not calls and role not in ("system", *TOOL_ROLES):
        raise BadRow("empty_response" if role == "assistant" else "empty_prompt", f"a turn of the {role} is empty")
    return message


def _content(turn: dict[str, Any], name: str) -> str:
    """A turn's text, its parts put together."""
    parts = turn.get(name)
    if not isinstance(parts, list):
        return field_of(turn, name, str)
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise BadRow("media", f'a turn holds a part of type "{kind}", and text alone is read; drop such rows')
    return "".join(field_of(part, "text", str) for part in parts)


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Tool calls, their arguments as objects."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else call
        arguments = function.get("arguments") if isinstance(function, dict) else None
        field_of(function, "name", str)
        if isinstance(arguments, str):
            arguments = _json(arguments, "arguments") if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise BadRow("wrong_type", f'the "arguments" of a tool call are {type(arguments).__name__}, not an object')
        function = function | {"arguments": arguments or {}}
        rest = {key: value for key, value in call.items() if value is not None} if "function" in call else {}
        found.append({"type": "function"} | rest | {"function": function})
    return found


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """The tools beside the turns, which are a list, or JSON of one; None where there are none.

    Raises:
      BadRow: they are something else.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(row, "tools") if tools.strip() else None
    if not tools:
        return None
    tools = [
        _json(tool, "tools") if isinstance(tool, str) else tool for tool in field_of({"tools": tools}, "tools", list)
    ]
    if wrong := next((tool for tool in tools if not isinstance(tool, dict)), None):
        raise BadRow("wrong_type", f'the field "tools" holds {type(wrong).__name__}, not objects')
    return tools


def _weights(row: dict[str, Any], turns: list[Any], messages: list[Message]) -> list[float]:
    """How much each message's loss counts, by the fields of the turns and by a list beside them."""
    weights = []
    for turn in turns:
        weight = math.prod(weight_of(turn, name) for name in TURN_WEIGHTS)
        weights.append(0.0 if turn.get("masked") and weight_of(turn, "masked") else weight)
    mask = row.get("loss_mask")
    if isinstance(mask, list):
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        places = {len(messages): range(len(messages)), len(answers): answers}.get(len(mask))
        if places is None:
            raise BadRow("wrong_weight", f'"loss_mask" holds {len(mask)} values for {len(messages)} turns')
        for place, value in zip(places, mask, strict=True):
            weights[place] *= weight_of({"loss_mask": value}, "loss_mask")
    return weights


def _parsed(row: dict[str, Any], name: str) -> Any:
    value = _json(row[name], name)
    if not isinstance(value, list):
        raise BadRow("wrong_type", f'the field "{name}" is {type(value).__name__} in JSON, not list')
    return value


def _json(text: str, name: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow("wrong_type", f'the field "{name}" is a text that is not JSON') from None
    check_text(json.dumps(value, ensure_ascii=False), name)
    return value
