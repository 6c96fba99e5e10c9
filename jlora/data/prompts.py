"""Prompt formats: a row of data becomes token ids and a loss mask.

Knows nothing of files of rows, batches, packing or the model. One mechanism serves every format:
the row becomes one text and the character spans of it that are trained; the text is tokenised once,
and a token is trained when it lies between the token counts of the text up to the span's two ends.
"""

import itertools
import re
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from jlora.data.formats import columns_of, format_of
from jlora.data.rows import BadRow
from jlora.data.tokens import Tokenizer
from jlora.errors import DataError

# Who speaks in a ShareGPT turn ("from") -> the role of a message, as Axolotl and LLaMA-Factory map them.
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# Stanford Alpaca's prompts (tatsu-lab/stanford_alpaca, train.py), which models know to the byte.
STANFORD_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
STANFORD_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Example(NamedTuple):
    """One row. `trained[i]`: the loss counts predicting token i, so `trained[0]` is always false.

    Of a preference row, the chosen sequence and then the rejected one, which begins at `second`.
    """

    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n]
    second: int | None = None

    def sequences(self) -> "list[Example]":
        """The sequences that the row consists of: one, or both of a pair."""
        if self.second is None:
            return [self]
        return [Example(self.ids[part], self.trained[part]) for part in (slice(self.second), slice(self.second, None))]


class RowText(NamedTuple):
    """The text of a row, and the spans of its characters that are trained; `chat`: it comes from a chat template."""

    text: str
    spans: list[tuple[int, int]]
    chat: bool


def encode_row(tokenizer: Tokenizer, row: dict[str, Any], *, format: str, prompt: str, train_on: str) -> Example:
    """The tokens of a whole row, not truncated, and which of them are trained: `lay_out` and `encode_texts` of one.

    Raises BadRow, and ConfigError if a chat template is needed and there is none.
    """
    (found,) = encode_texts(tokenizer, [lay_out(tokenizer, row, format=format, prompt=prompt, train_on=train_on)])
    if isinstance(found, BadRow):
        raise found
    return found


def lay_out(tokenizer: Tokenizer, row: dict[str, Any], *, format: str, prompt: str, train_on: str) -> RowText:
    """The text of a row, before it is tokenised.

    `format` is any but preference; `prompt` ("stanford" or "chat") matters to alpaca rows only;
    `train_on` is "response" or "all". Text that goes through no chat template gets EOS and, where the tokenizer
    adds it, BOS, unless it has them already; EOS is trained like the rest of the response. A token across the
    border of prompt and response counts to the prompt, as in Stanford Alpaca's train.py, Axolotl and TRL.

    Raises BadRow, and ConfigError if a chat template is needed and there is none.
    """
    if _is_chat(format, prompt):
        messages = _messages(row, format, answered=True)
        text = _render(tokenizer, messages, add_generation_prompt=False)
        spans = _assistant_spans(tokenizer, messages, text) if train_on == "response" else [(0, len(text))]
        return RowText(text, spans, True)
    head = _head(row, format)
    text = head + _response(row, format)
    return RowText(text, [(len(head) if train_on == "response" else 0, len(text))], False)


def encode_texts(tokenizer: Tokenizer, layouts: list[RowText]) -> list[Example | BadRow]:
    """The tokens of rows laid out, encoded together, which is faster than one by one."""
    ends = [{len(laid.text), *itertools.chain(*laid.spans)} for laid in layouts]
    texts = [laid.text[:end] for laid, some in zip(layouts, ends, strict=True) for end in some]
    encoded = iter(tokenizer.encode_all(texts))
    found: list[Example | BadRow] = []
    for laid, some in zip(layouts, ends, strict=True):
        upto = {end: _begun(tokenizer, next(encoded), laid.chat) for end in some}
        ids = upto[len(laid.text)]
        trained = np.zeros(len(ids) + 1, dtype=bool)
        for start, end in laid.spans:
            trained[len(upto[start]) : len(upto[end])] = True
        if not laid.chat and ids[-1] != tokenizer.eos_id:
            ids.append(tokenizer.eos_id)
            trained[-1] = True
        if beyond := tokenizer.beyond(ids):
            found.append(BadRow("no_embedding", beyond))
            continue
        trained = trained[: len(ids)]
        trained[0] = False
        example = Example(np.asarray(ids, dtype=np.int32), trained)
        found.append(example if trained.any() else BadRow("no_trained_token", "no token of it would be trained"))
    return found


def encode_pair(tokenizer: Tokenizer, row: dict[str, Any]) -> tuple[Example, Example]:
    """The chosen and the rejected sequence of a preference row, not truncated, as TRL's `DPOTrainer` makes them.

    `prompt`, `chosen` and `rejected` are strings, or lists of messages that go through the chat template. Without a
    prompt, or with one in string form beside lists, what both answers begin with is the prompt. An answer begins
    where its tokens part from those of the prompt alone; EOS is added to strings.

    Raises BadRow, and ConfigError if a chat template is needed and there is none.
    """
    kind = list if isinstance(row.get("chosen"), list) else str
    prompt: Any = row.get("prompt")
    chosen, rejected = _get(row, "chosen", kind), _get(row, "rejected", kind)
    if chosen == rejected:
        raise BadRow("equal_answers", 'the fields "chosen" and "rejected" are equal')
    if not isinstance(prompt, kind):
        common = _common(chosen, rejected)
        if kind is str and chosen[common - 1 : common] == " ":
            common -= 1  # a space goes with the word behind it
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    if not (prompt if kind is list else prompt.strip()):
        raise BadRow("empty_prompt", "there is no prompt before the answers")
    answers = {"chosen": chosen, "rejected": rejected}
    if kind is str:
        for name, answer in answers.items():
            if not answer.strip():
                raise BadRow("empty_response", f'the field "{name}" is empty')
        eos = tokenizer.eos_token
        ended = [answer if answer.endswith(eos) else answer + eos for answer in answers.values()]
        head = _encode(tokenizer, prompt, chat=False)
        whole = [_encode(tokenizer, prompt + answer, chat=False) for answer in ended]
    else:
        for name, turns in answers.items():
            if not turns:
                raise BadRow("empty_response", f'the field "{name}" holds no answer')
            if _turns(turns)[-1]["role"] != "assistant":
                raise BadRow("no_assistant_turn", f'the last turn of "{name}" is not the assistant\'s')
        context = _turns(prompt)
        head = _encode(tokenizer, _render(tokenizer, context, add_generation_prompt=True), chat=True)
        texts = [_render(tokenizer, context + _turns(turns), add_generation_prompt=False) for turns in answers.values()]
        whole = [_encode(tokenizer, text, chat=True) for text in texts]
    start = min(_common(head, ids) for ids in whole)
    pair = [Example(np.asarray(ids, np.int32), np.arange(len(ids)) >= max(start, 1)) for ids in whole]
    return pair[0], pair[1]


def _common(first: Any, second: Any) -> int:
    """How many items two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def encode_prompt(tokenizer: Tokenizer, row: dict[str, Any], *, format: str, prompt: str) -> list[int]:
    """The ids generation starts from: the untrained prefix of `encode_row`; the row needs no response.

    As long as that prefix and equal to it, but for last tokens that in `encode_row` took up the start of the
    response. A conversation that ends with a user's turn is all prompt, and so is a `text` row.

    Raises BadRow, and ConfigError if a chat template is needed and there is none.
    """
    if format == "preference" and isinstance(row.get("prompt"), str):
        format = "completion"
    elif format == "preference":
        row, format = {"messages": _get(row, "prompt", list)}, "messages"
    if not _is_chat(format, prompt):
        return _encode(tokenizer, (_response if format == "text" else _head)(row, format), chat=False)
    messages = _messages(row, format, answered=False)
    roles = [message["role"] for message in messages]
    context = messages[: roles.index("assistant")] if roles[-1] == "assistant" else messages
    return _encode(tokenizer, _render(tokenizer, context, add_generation_prompt=True), chat=True)


def reference_answer(row: dict[str, Any], *, format: str) -> str:
    """The answer that a row itself gives to what `encode_prompt` makes of it; of a pair, the chosen one.

    Raises BadRow: it gives none.
    """
    if format == "text":
        raise BadRow("no_answer", "a row of text has no prompt and so no answer to compare with")
    if format == "preference" and isinstance(row.get("chosen"), str):
        return _get(row, "chosen", str)
    if format in ("alpaca", "completion"):
        return _response(row, format)
    turns = _turns(_get(row, "chosen", list)) if format == "preference" else _messages(row, format, answered=True)
    if turns[-1]["role"] != "assistant":
        raise BadRow("no_assistant_turn", "its last turn is not the assistant's, so it has no answer to compare with")
    return next(turn["content"] for turn in turns if turn["role"] == "assistant")


def shown_prompt(row: dict[str, Any], *, format: str) -> str:
    """What `encode_prompt` asks, for people: without the words and tokens that go around it.

    Raises BadRow.
    """
    if format == "alpaca":
        return "\n\n".join(filter(None, _instruction(row)))
    if format == "text":
        return _response(row, format)
    if format == "completion" or isinstance(row.get("prompt"), str):
        return _get(row, "prompt", str)
    turns = _turns(_get(row, "prompt", list)) if format == "preference" else _messages(row, format, answered=False)
    roles = [turn["role"] for turn in turns]
    context = turns[: roles.index("assistant")] if format != "preference" and roles[-1] == "assistant" else turns
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in context)


def with_shots(
    row: dict[str, Any], shots: list[dict[str, Any]], *, format: str, prompt: str, answered: bool
) -> tuple[dict[str, Any], str]:
    """A row with worked examples before its prompt, and the format that it has then.

    In a chat each example is turns of their own, its system turn left out; elsewhere the rows' texts stand one after
    another, a blank line between them. `answered`: with the row's own response, for `encode_row`; without, for
    `encode_prompt`.

    Raises BadRow.
    """
    if not _is_chat(format, prompt):
        text = "".join(f"{_head(shot, format)}{_response(shot, format)}\n\n" for shot in shots)
        asked = {"prompt": text + _head(row, format)}
        return asked | ({"completion": _response(row, format)} if answered else {}), "completion"
    turns = _messages(row, format, answered=answered)
    if not answered and any(turn["role"] == "assistant" for turn in turns):
        turns = turns[: [turn["role"] for turn in turns].index("assistant")]
    examples = [turn for shot in shots for turn in _messages(shot, format, answered=True) if turn["role"] != "system"]
    start = turns[0]["role"] == "system"
    return {"messages": [*turns[:start], *examples, *turns[start:]]}, "messages"


def shots_separator(shots: list[dict[str, Any]], *, format: str, prompt: str) -> str | None:
    """With what a model that goes on writing examples after its answer would begin the next; None in a chat."""
    if _is_chat(format, prompt):
        return None
    return "\n\n" + commonprefix([_head(shot, format) for shot in shots])


def _encode(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    ids = _begun(tokenizer, tokenizer.encode(text), chat)
    if beyond := tokenizer.beyond(ids):
        raise BadRow("no_embedding", beyond)
    return ids


def _begun(tokenizer: Tokenizer, ids: list[int], chat: bool) -> list[int]:
    """With the BOS that the tokenizer adds to plain text, unless it is there."""
    bos = tokenizer.bos_id if tokenizer.add_bos and not chat else None
    if bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


def _is_chat(format: str, prompt: str) -> bool:
    return format in ("messages", "sharegpt") or (format == "alpaca" and prompt == "chat")


def _get(row: Any, name: str, kind: type) -> Any:
    """A field of a row, or of a message in it."""
    value = row.get(name) if isinstance(row, dict) else None
    if value is None:
        raise BadRow("missing_field", f'the field "{name}" is missing{_instead(row)}')
    if not isinstance(value, kind):
        raise BadRow("wrong_type", f'the field "{name}" is {type(value).__name__}, not {kind.__name__}')
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise BadRow("not_unicode", f'the field "{name}" holds half of a surrogate pair')
    return value


def _instead(row: Any) -> str:
    """What a row has in place of the field that it lacks."""
    if not isinstance(row, dict) or "role" in row or "from" in row:  # a turn
        return ""
    other = format_of(row)
    return f" (it has {columns_of(row)}{f'; data.format={other} reads such rows' if other else ''})"


def _instruction(row: dict[str, Any]) -> tuple[str, str]:
    """Instruction and input of an alpaca row; an input that is missing or blank is empty."""
    instruction = _get(row, "instruction", str)
    given = "" if row.get("input") is None else _get(row, "input", str)
    if not (instruction + given).strip():
        raise BadRow("empty_prompt", "instruction and input are both empty")
    return instruction, given if given.strip() else ""


def _head(row: dict[str, Any], format: str) -> str:
    """What comes before the response, of a row that goes through no chat template."""
    if format == "text":
        return ""
    if format == "alpaca":
        instruction, given = _instruction(row)
        template = STANFORD_WITH_INPUT if given else STANFORD_WITHOUT_INPUT
        return template.format(instruction=instruction, input=given)
    head = _get(row, "prompt", str)
    if not head.strip():
        raise BadRow("empty_prompt", 'the field "prompt" is empty')
    return head


def _response(row: dict[str, Any], format: str) -> str:
    name = {"alpaca": "output", "completion": "completion", "text": "text"}[format]
    response = _get(row, name, str)
    if not response.strip():
        raise BadRow("empty_response", f'the field "{name}" is empty')
    return response


def _messages(row: dict[str, Any], format: str, *, answered: bool) -> list[dict[str, str]]:
    """The conversation of a row, checked; `answered`: it must have the response."""
    if format == "alpaca":
        user = {"role": "user", "content": "\n\n".join(filter(None, _instruction(row)))}
        return [user, {"role": "assistant", "content": _response(row, format)}] if answered else [user]
    messages = _turns(_sharegpt(row) if format == "sharegpt" else _get(row, "messages", list))
    if answered and all(message["role"] != "assistant" for message in messages):
        raise BadRow("no_assistant_turn", "no turn is the assistant's")
    return messages


def _sharegpt(row: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a row of `conversations`; a `system` beside them, as LLaMA-Factory has it, is the first."""
    turns = [{key: _get(turn, key, str) for key in ("from", "value")} for turn in _get(row, "conversations", list)]
    if not turns:
        raise BadRow("empty_messages", 'the list "conversations" is empty')
    system = "" if row.get("system") is None else _get(row, "system", str)
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for turn in turns:
        role = SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise BadRow("wrong_role", f'a turn is from "{turn["from"]}", not one of {", ".join(SHAREGPT_ROLES)}')
        messages.append({"role": role, "content": turn["value"]})
    return messages


def _turns(turns: list[Any]) -> list[dict[str, str]]:
    """The messages of a list, checked."""
    messages = [{key: _get(turn, key, str) for key in ("role", "content")} for turn in turns]
    if not messages:
        raise BadRow("empty_messages", 'the list "messages" is empty')
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ("system", "user", "assistant"):
            raise BadRow("wrong_role", f'the role "{role}" is not one of system, user and assistant')
        if role != "system" and not content.strip():
            reason = "empty_response" if role == "assistant" else "empty_prompt"
            raise BadRow(reason, f"a turn of the {role} is empty")
    return messages


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.render(messages, add_generation_prompt=add_generation_prompt)
    except DataError as error:
        raise BadRow("template_error", str(error)) from error


def _assistant_spans(tokenizer: Tokenizer, messages: list[dict[str, str]], text: str) -> list[tuple[int, int]]:
    """The characters of `text`, the rendered conversation, that the assistant would have generated."""
    spans = []
    for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        before = _render(tokenizer, messages[:i], add_generation_prompt=True)
        after = _render(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not (text.startswith(after) and after.startswith(before)):
            message = "the chat template writes turns differently once others follow, so none can be located"
            raise BadRow("unstable_template", message)
        # Whitespace after EOS belongs to the template: generation has stopped before it.
        bare = after.rstrip()
        spans.append((len(before), len(bare if bare.endswith(tokenizer.eos_token) else after)))
    return spans
