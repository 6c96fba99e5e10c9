"""Conversation -> the text that the chat template makes of it, in which nothing of it is lost, and its turns' spans.

Turns are found by marks: the conversation is rendered a second time with a mark in each turn, and what comes out must
be the same text but for them.
"""

import json
from collections.abc import Iterator
from typing import Any

from jlora.data import reasoning as thoughts
from jlora.data.conversation import Conversation, Message
from jlora.data.marks import CALL, CONTENT, THOUGHT, Mark, mark, read, shown
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer
from jlora.data.turns import REMEDY, Layout, Render, Span
from jlora.errors import DataError

# Where marks are put: a template may look at how a content ends, so then in its middle.
SHARES = (1.0, 0.5)


def render(tokenizer: Tokenizer, chat: Conversation, *, add_generation_prompt: bool) -> str:
    """The text of a conversation.

    Raises:
      BadRow: the template refuses it, or drops its tools. ConfigError: there is no template, or it is none.
    """
    renders = _renderer(tokenizer, chat.tools)
    text = ""
    refusal: BadRow | None = None
    for messages in _forms(chat.messages):
        try:
            text = renders(messages, add_generation_prompt)
            if any("tool_calls" in message for message in messages):
                _check_whole(messages, _marked(renders, messages, text, add_generation_prompt)[1])
            _check_tools(tokenizer, chat, messages, text, add_generation_prompt)
            return text
        except BadRow as bad:
            refusal = refusal or bad
    raise refusal or BadRow("empty_messages", "there is no turn")


def write(tokenizer: Tokenizer, chat: Conversation, reasoning: str, roles: list[str]) -> tuple[str, list[Span]]:
    """The text of a conversation, and the spans of the messages of some roles, in order.

    Args:
      reasoning: as `data.reasoning`.

    Raises:
      BadRow: a turn cannot be found in the text, or the template refuses the conversation, or drops some of it.
      ConfigError: there is no template, or it is none.
    """
    renders = _renderer(tokenizer, chat.tools)
    given = thoughts.without_history(chat.messages) if reasoning == "strip" else chat.messages
    messages, text, marked, marks = _accepted(renders, given)
    last = thoughts.last_answer(messages)
    if last is not None and not any(each[1:] == (THOUGHT, last) for each in marks):
        for begun in (False, True):
            if told := thoughts.in_content(given[last], begun=begun):
                messages, text, marked, marks = _accepted(renders, [*given[:last], told, *given[last + 1 :]])
            if not thoughts.TWICE.search(text):
                break
    _check_tools(tokenizer, chat, messages, text, False)
    layout = Layout(tokenizer, renders, marked, text, marks)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [layout.content(i) for i, m in enumerate(messages) if m["role"] in roles and m["role"] != "assistant"]
    if "assistant" in roles and tokenizer.marks_answers:
        spans += _generated(tokenizer, chat.tools, messages, layout, answers)
    elif "assistant" in roles:
        spans += [layout.answer(i) for i in answers]
    return text, sorted(spans, key=lambda span: span.start)


def _renderer(tokenizer: Tokenizer, tools: list[Any] | None) -> Render:
    def renders(messages: list[Message], prompt: bool) -> str:
        try:
            return tokenizer.render(messages, add_generation_prompt=prompt, tools=tools)
        except DataError as error:
            raise BadRow("template_error", str(error)) from error

    return renders


def _accepted(renders: Render, messages: list[Message]) -> tuple[list[Message], str, list[Message], list[Mark]]:
    """The messages in the first form of which the template loses nothing, their text, and both with marks."""
    refusal: BadRow | None = None
    for form in _forms(messages):
        try:
            text = shown(renders(form, False))
            marked, marks = _marked(renders, form, text, False)
            _check_whole(form, marks)
            return form, text, marked, marks
        except BadRow as bad:
            refusal = refusal or bad
    raise refusal or BadRow("empty_messages", "there is no turn")


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Of tool calls, templates want one form or another: arguments as objects or JSON, no content as "" or null."""
    if not any("tool_calls" in message for message in messages):
        yield messages
        return

    def in_json(call: Message) -> Message:
        function = call["function"]
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    texts = [m | {"tool_calls": [*map(in_json, m["tool_calls"])]} if "tool_calls" in m else m for m in messages]
    for form in (messages, texts):
        yield [message | {"content": message["content"] or ""} for message in form]
        yield [message | {"content": message["content"] or None} for message in form]


def _check_tools(tokenizer: Tokenizer, chat: Conversation, messages: list[Message], text: str, prompt: bool) -> None:
    """Refuse a conversation whose tools the template does not write."""
    if not chat.tools:
        return
    try:
        same = shown(_renderer(tokenizer, None)(messages, prompt)) == text
    except BadRow:
        return
    if same:
        message = (
            'the chat template writes no tools, so "tools" would be lost; set data.chat_template, or drop the column'
        )
        raise BadRow("tools_ignored", message)


def _check_whole(messages: list[Message], marks: list[Mark]) -> None:
    """Refuse a conversation of which the template writes some turns, or tool calls, not at all."""
    seen = {(each.kind, each.message) for each in marks}
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if calls and (CALL, i) not in seen:
            raise BadRow("tools_ignored", f"the chat template does not write the tool calls of turn {i + 1}")
        if not calls and (message["content"] or "").strip() and (CONTENT, i) not in seen:
            what = f"turn {i + 1}, of the role {message['role']}"
            raise BadRow(
                "turn_ignored", f"the chat template does not write {what}; set data.chat_template to one that does"
            )


def _marked(renders: Render, messages: list[Message], text: str, prompt: bool) -> tuple[list[Message], list[Mark]]:
    """The messages with marks in them, and where those are in the text."""
    for share in SHARES:
        marked = [mark(message, i, share) for i, message in enumerate(messages)]
        try:
            seen, marks = read(renders(marked, prompt))
        except BadRow:
            continue
        if seen == text:
            return marked, marks
    raise BadRow(
        "unstable_template", f"the chat template makes another text of marked turns, so none is found; {REMEDY}"
    )


def _generated(
    tokenizer: Tokenizer, tools: list[Any] | None, messages: list[Message], layout: Layout, answers: list[int]
) -> list[Span]:
    """What the template itself says that the assistant generates, by `{% generation %}`."""
    raw, spans = tokenizer.render_marked(messages, tools)
    places = [(len(shown(raw[:start])), len(shown(raw[:end]))) for start, end in spans if start < end]
    if len(places) == len(answers):
        return [Span(i, *place) for i, place in zip(answers, places, strict=True)]
    ends = [(layout.anchor(i).at, i) for i in answers]
    # A span without a turn's mark, such as of EOS alone, belongs to the turn before it.
    return [Span(max((end for end in ends if end[0] <= place[1]), default=ends[0])[1], *place) for place in places]
