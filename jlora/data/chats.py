"""Conversation -> the text that the chat template makes of it, in which nothing is lost, and what the loss counts.

Turns are found by marks: the conversation is rendered a second time with a mark in each turn, and what comes out must
be the same text but for them.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from jlora.config import Counted
from jlora.data import reasoning as thoughts
from jlora.data.conversation import Conversation, Message
from jlora.data.marks import CALL, CONTENT, THOUGHT, Mark, mark, read, shown
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer
from jlora.data.turns import ANOTHER, REMEDY, Layout, Render, Span
from jlora.errors import DataError

T = TypeVar("T")
Weighted = tuple[int, int, float]  # characters from and to, and the weight of their loss

# Where marks are put: a template may look at how a content ends, so then in its middle.
SHARES = (1.0, 0.5)


def render(tokenizer: Tokenizer, turns: list[Message], tools: list[Any] | None, *, add_generation_prompt: bool) -> str:
    """The text of a conversation.

    Raises:
      BadRow: the template refuses it, or drops its tools. ConfigError: there is no template, or it is none.
    """
    renders = _renderer(tokenizer, tools)

    def written(messages: list[Message]) -> str:
        text = renders(messages, add_generation_prompt)
        if any("tool_calls" in message for message in messages):
            _check_whole(messages, _marked(renders, messages, text, add_generation_prompt)[1])
        _check_tools(tokenizer, tools, messages, text, add_generation_prompt)
        return text

    return _accepted(turns, written)


def weigh(tokenizer: Tokenizer, chat: Conversation, counted: Counted) -> tuple[str, list[Weighted]]:
    """The text of a conversation, and the spans that the loss counts; of two that overlap, the later one.

    Raises:
      BadRow, ConfigError: as `write`.
    """
    if counted.train_on == "all":
        excepted = {message["role"] for message, w in zip(chat.messages, chat.weights, strict=True) if w != 1.0}
        text, found = write(tokenizer, chat, counted.reasoning, sorted(excepted))
        return text, [(0, len(text), 1.0), *((start, end, chat.weights[i]) for i, start, end in found)]
    roles = ["assistant"] if isinstance(counted.train_on, str) else list(counted.train_on)
    text, found = write(tokenizer, chat, counted.reasoning, roles)
    if counted.train_on == "last":
        found = [span for span in found if span.message == found[-1].message]
    found = [span for span in found if chat.weights[span.message] > 0.0]
    if not found:
        raise BadRow("no_trained_token", "none of its turns is to be trained")
    spans = []
    for i, start, end in found:
        if chat.messages[i]["role"] != "assistant":
            spans.append((start, end, chat.weights[i]))
            continue
        if counted.train_on_eos == "none" or (counted.train_on_eos == "last" and i != found[-1].message):
            end = _without_end(text, start, end, tokenizer.specials)
        parts = thoughts.answered(text, start, end, mask=counted.reasoning == "mask")
        spans += [(*part, chat.weights[i]) for part in parts]
    return text, spans


def _without_end(text: str, start: int, end: int, specials: tuple[str, ...]) -> int:
    """Where a span ends without the tokens that end its turn."""
    words = text[start:end]
    while ending := next((token for token in specials if words.rstrip().endswith(token)), None):
        words = words.rstrip().removesuffix(ending)
    return start + len(words)


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
    whole = _whole(tokenizer, chat.tools, given)
    last = thoughts.last_answer(whole.messages)
    if last is not None and not any(each[1:] == (THOUGHT, last) for each in whole.marks):
        for begun in (False, True):
            if told := thoughts.in_content(given[last], begun=begun):
                whole = _whole(tokenizer, chat.tools, [*given[:last], told, *given[last + 1 :]])
            if not thoughts.TWICE.search(whole.text):
                break
    messages, text, marked, marks, generated = whole
    _check_tools(tokenizer, chat.tools, messages, text, False)
    layout = Layout(tokenizer, renders, marked, text, marks)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [layout.content(i) for i, m in enumerate(messages) if m["role"] in roles and m["role"] != "assistant"]
    if "assistant" in roles and tokenizer.marks_answers:
        spans += _generated(generated, layout, answers)
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


class _Whole(NamedTuple):
    """Messages of which the template loses nothing, their text, both with marks, and what the template itself marks.

    Attributes:
      generated: characters from and to, of each `{% generation %}`; none where the template has no such marks.
    """

    messages: list[Message]
    text: str
    marked: list[Message]
    marks: list[Mark]
    generated: list[tuple[int, int]]


def _whole(tokenizer: Tokenizer, tools: list[Any] | None, messages: list[Message]) -> _Whole:
    """The messages in the first form of which the template loses nothing."""
    renders = _renderer(tokenizer, tools)

    def whole(form: list[Message]) -> _Whole:
        text, generated = _written(tokenizer, tools, form)
        marked, marks = _marked(renders, form, text, False)
        _check_whole(form, marks)
        return _Whole(form, text, marked, marks, generated)

    return _accepted(messages, whole)


def _written(
    tokenizer: Tokenizer, tools: list[Any] | None, messages: list[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """A text, and what the template itself says that the assistant generates: both of one rendering."""
    if not tokenizer.marks_answers:
        return shown(_renderer(tokenizer, tools)(messages, False)), []
    try:
        raw, spans = tokenizer.render_marked(messages, tools)
    except DataError as error:
        raise BadRow("template_error", str(error)) from error
    return shown(raw), [(len(shown(raw[:start])), len(shown(raw[:end]))) for start, end in spans if start < end]


def _accepted(messages: list[Message], made: Callable[[list[Message]], T]) -> T:
    """What is made of the first form of the messages that is not refused; else the first refusal is raised."""
    refusals = []
    for form in _forms(messages):
        try:
            return made(form)
        except BadRow as bad:
            refusals.append(bad)
    raise refusals[0]


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


def _check_tools(
    tokenizer: Tokenizer, tools: list[Any] | None, messages: list[Message], text: str, prompt: bool
) -> None:
    """Refuse a conversation whose tools the template does not write."""
    if not tools:
        return
    try:
        without = shown(_renderer(tokenizer, None)(messages, prompt))
    except BadRow:
        return
    if without == text:
        what = 'the chat template does not write "tools", which would be lost'
        raise BadRow("tools_ignored", f"{what}; {ANOTHER}, or drop the column")


def _check_whole(messages: list[Message], marks: list[Mark]) -> None:
    """Refuse a conversation of which the template writes some turns, or tool calls, not at all."""
    seen = {(each.kind, each.message) for each in marks}
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if calls and (CALL, i) not in seen:
            raise BadRow("tools_ignored", f"the chat template does not write the tool calls of turn {i + 1}; {ANOTHER}")
        if not calls and (message["content"] or "").strip() and (CONTENT, i) not in seen:
            what = f"turn {i + 1}, of the role {message['role']}"
            raise BadRow("turn_ignored", f"the chat template does not write {what}; {ANOTHER}")


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


def _generated(places: list[tuple[int, int]], layout: Layout, answers: list[int]) -> list[Span]:
    """The answers by what the template says that the assistant generates."""
    if len(places) == len(answers):
        return [Span(i, *place) for i, place in zip(answers, places, strict=True)]
    ends = [(layout.anchor(i).at, i) for i in answers]
    # A span without a turn's mark, such as of EOS alone, belongs to the turn before it.
    return [Span(max((end for end in ends if end[0] <= place[1]), default=ends[0])[1], *place) for place in places]
