"""Prompt formats: a row of data becomes token ids and a loss mask.

Knows nothing of files of rows, batches, packing or the model. One mechanism serves every format:
the row becomes one text and the character spans of it that are trained; the text is tokenised once,
and a token is trained when it lies between the token counts of the text up to the span's two ends.
"""

from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from jlora.config import Counted
from jlora.data import chats
from jlora.data.alpaca import asked_messages, instruction_of, stanford_prompt
from jlora.data.conversation import Conversation, Message, conversation_of, messages_of, tools_of
from jlora.data.fields import field_of, weight_of
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer


class Example(NamedTuple):
    """One row. `weights[i]`: how much the loss counts predicting token i, so `weights[0]` is always 0.

    Of a preference row, the chosen sequence and then the rejected one, which begins at `second`.
    """

    ids: np.ndarray  # int32 [n]
    weights: np.ndarray  # bool [n], or float32 [n] where one is neither 0 nor 1
    second: int | None = None

    @property
    def trained(self) -> np.ndarray:
        """Whether the loss counts predicting a token at all, bool [n]."""
        return self.weights > 0

    def sequences(self) -> "list[Example]":
        """The sequences that the row consists of: one, or both of a pair."""
        if self.second is None:
            return [self]
        return [self.part(slice(self.second)), self.part(slice(self.second, None))]

    def part(self, which: slice) -> "Example":
        """Some tokens of a sequence."""
        return Example(self.ids[which], self.weights[which])

    @property
    def plain(self) -> bool:
        """Whether all weights are 0 or 1."""
        return self.weights.dtype == bool or bool(((self.weights == 0) | (self.weights == 1)).all())

    def digested(self) -> bytes:
        """What of it goes into the digest of a dataset."""
        weights = self.trained if self.plain else self.weights
        return self.ids.tobytes() + weights.tobytes() + b"|"


Encoded = list[Example] | BadRow  # the sequences of a row, or why it has none


class RowText(NamedTuple):
    """The text of a row, and spans of its characters with the weight of their loss.

    Attributes:
      spans: start, end and weight; a later one counts where two overlap.
      eos: the weight of the EOS that is added; None where a chat template writes the text, and none is.
    """

    text: str
    spans: list[chats.Weighted]
    eos: float | None


def encode_row(tokenizer: Tokenizer, row: dict[str, Any], *, format: str, prompt: str, counted: Counted) -> Example:
    """The tokens of a whole row, not truncated, and which of them are trained: `lay_out` and `encode_texts` of one.

    Raises BadRow, and ConfigError if a chat template is needed and there is none.
    """
    (found,) = encode_texts(tokenizer, [lay_out(tokenizer, row, format=format, prompt=prompt, counted=counted)])
    if isinstance(found, BadRow):
        raise found
    return found[0]


def lay_out(tokenizer: Tokenizer, row: dict[str, Any], *, format: str, prompt: str, counted: Counted) -> RowText:
    """The text of a row, before it is tokenised.

    `format` is any but preference; `prompt` ("stanford" or "chat") matters to alpaca rows only. Text that goes through
    no chat template gets EOS and, where the tokenizer adds it, BOS, unless it has them already; EOS is trained like the
    rest of the response. A token across the border of prompt and response counts to the prompt, as in Stanford
    Alpaca's train.py, Axolotl and TRL.

    Raises BadRow, and ConfigError if a chat template is needed and there is none.
    """
    weight = weight_of(row, "weight")
    if _is_chat(row, format, prompt):
        text, spans = chats.weigh(tokenizer, _conversation(row, format, answered=True), counted)
        return RowText(text, [(start, end, weight * own) for start, end, own in spans], None)
    head = _head(row, format)
    text = head + _response(row, format)
    start, end, eos = 0 if counted.train_on == "all" else len(head), len(text), weight
    if counted.train_on_eos == "none":
        end, eos = len(text.removesuffix(tokenizer.eos_token)), 0.0
    return RowText(text, [(start, end, weight)], eos)


def encode_texts(tokenizer: Tokenizer, layouts: list[RowText]) -> list[Encoded]:
    """The tokens of rows laid out, encoded together, which is faster than one by one."""
    encoded = tokenizer.encode_all([laid.text for laid in layouts])
    places = [sorted({place for span in laid.spans for place in span[:2]}) for laid in layouts]
    known = [tokenizer.up_to(laid.text, *each) for laid, *each in zip(layouts, encoded, places, strict=True)]
    rest = iter(tokenizer.encode_all([left for each in known for _, left in each]))
    found: list[Encoded] = []
    for laid, own, some, counts in zip(layouts, encoded, places, known, strict=True):
        ids = _begun(tokenizer, list(own), laid.eos is None)
        begun = len(ids) - len(own)
        upto = {place: begun + count + len(next(rest)) for place, (count, _) in zip(some, counts, strict=True)}
        plain = all(weight in (0.0, 1.0) for *_, weight in laid.spans)
        weights = np.zeros(len(ids) + 1, dtype=bool if plain else np.float32)
        for start, end, weight in laid.spans:
            weights[upto[start] : upto[end]] = weight
        if laid.eos is not None and ids[-1] != tokenizer.eos_id:
            ids.append(tokenizer.eos_id)
            weights[-1] = laid.eos
        if beyond := tokenizer.beyond(ids):
            found.append(BadRow("no_embedding", beyond))
            continue
        weights = weights[: len(ids)]
        weights[0] = 0
        example = Example(np.asarray(ids, dtype=np.int32), weights)
        found.append([example] if weights.any() else BadRow("no_trained_token", "no token of it would be trained"))
    return found


def encode_pair(tokenizer: Tokenizer, row: dict[str, Any]) -> tuple[Example, Example]:
    """The chosen and the rejected sequence of a preference row, not truncated, as TRL's `DPOTrainer` makes them.

    `prompt`, `chosen` and `rejected` are strings, or lists of messages that go through the chat template. Without a
    prompt, or with one in string form beside lists, what both answers begin with is the prompt; lists that begin with
    the prompt do not repeat it. An answer that is one message is a list of it. An answer begins where its tokens part
    from those of the prompt alone; EOS is added to strings.

    Raises BadRow, and ConfigError if a chat template is needed and there is none.
    """
    if weight_of(row, "weight") != 1.0:
        raise BadRow("wrong_weight", 'a pair has no weight; take "weight" out, or repeat the row')
    row = _listed(row)
    kind = list if isinstance(row.get("chosen"), list) else str
    prompt: Any = row.get("prompt")
    chosen, rejected = field_of(row, "chosen", kind), field_of(row, "rejected", kind)
    if chosen == rejected:
        raise BadRow("equal_answers", 'the fields "chosen" and "rejected" are equal')
    if prompt is not None and not isinstance(prompt, kind if kind is str else str | list):
        raise BadRow("wrong_type", f'the field "prompt" is {type(prompt).__name__}, not {kind.__name__}')
    if kind is list and isinstance(prompt, list) and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif not isinstance(prompt, kind):
        common = _common(chosen, rejected)
        if kind is str and chosen[common - 1 : common] == " ":
            common -= 1  # a space goes with the word behind it
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    if not (prompt if kind is list else prompt.strip()):
        if kind is list and row.get("prompt"):
            raise BadRow("wrong_type", 'the field "prompt" is str, but the answers are turns; write it as turns, too')
        raise BadRow("empty_prompt", "there is no prompt before the answers")
    answers, eos = {"chosen": chosen, "rejected": rejected}, tokenizer.eos_token
    if kind is str:
        for name, answer in answers.items():
            if not answer.strip():
                raise BadRow("empty_response", f'the field "{name}" is empty')
        asked, texts = prompt, [f"{prompt}{each.removesuffix(eos)}{eos}" for each in answers.values()]
    else:
        for name, ours in answers.items():
            if not ours:
                raise BadRow("empty_response", f'the field "{name}" holds no answer')
            if messages_of(ours)[-1]["role"] != "assistant":
                raise BadRow("no_assistant_turn", f'the last turn of "{name}" is not the assistant\'s')
        context, tools = messages_of(prompt), tools_of(row)
        asked = chats.render(tokenizer, context, tools, add_generation_prompt=True)
        whole_turns = [context + messages_of(ours) for ours in answers.values()]
        texts = [chats.render(tokenizer, each, tools, add_generation_prompt=False) for each in whole_turns]
    head, *whole = (_encode(tokenizer, text, chat=kind is list) for text in (asked, *texts))
    start = min(_common(head, ids) for ids in whole)
    pair = [Example(np.asarray(ids, np.int32), np.arange(len(ids)) >= max(start, 1)) for ids in whole]
    return pair[0], pair[1]


def _listed(row: dict[str, Any]) -> dict[str, Any]:
    """A pair whose answers that are a single turn are lists of it."""
    answers = {name: row.get(name) for name in ("chosen", "rejected")}
    return row | {
        name: [turn] for name, turn in answers.items() if isinstance(turn, dict) and {"role", "from"} & {*turn}
    }


def _common(first: Any, second: Any) -> int:
    """How many items two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


class Asked(NamedTuple):
    """What generation starts from.

    Attributes:
      ids: those of `text`, after the BOS that the tokenizer adds to plain text.
      messages, tools: the conversation that the chat template wrote; None where none did.
    """

    text: str
    ids: list[int]
    messages: list[Message] | None = None
    tools: list[Any] | None = None


def encode_prompt(tokenizer: Tokenizer, row: dict[str, Any], *, format: str, prompt: str) -> list[int]:
    """The ids of `ask`."""
    return ask(tokenizer, row, format=format, prompt=prompt).ids


def ask(tokenizer: Tokenizer, row: dict[str, Any], *, format: str, prompt: str) -> Asked:
    """What generation starts from: the untrained prefix of `encode_row`; the row needs no response.

    As long as that prefix and equal to it, but for last tokens that in `encode_row` took up the start of the
    response. A conversation that ends with a user's turn is all prompt, and so is a `text` row.

    Raises BadRow, and ConfigError if a chat template is needed and there is none.
    """
    if format == "preference" and isinstance(row.get("prompt"), str):
        format = "completion"
    elif format == "preference":
        row, format = {"messages": field_of(row, "prompt", list), "tools": row.get("tools")}, "messages"
    if not _is_chat(row, format, prompt):
        text = (_response if format == "text" else _head)(row, format)
        return Asked(text, _encode(tokenizer, text, chat=False))
    chat = _conversation(row, format, answered=False)
    messages = _asked(chat)
    text = chats.render(tokenizer, messages, chat.tools, add_generation_prompt=True)
    return Asked(text, _encode(tokenizer, text, chat=True), messages, chat.tools)


def reference_answer(row: dict[str, Any], *, format: str) -> str:
    """The answer that a row itself gives to what `encode_prompt` makes of it; of a pair, the chosen one.

    Raises BadRow: it gives none.
    """
    if format == "text":
        raise BadRow("no_answer", "a row of text has no prompt and so no answer to compare with")
    if format == "preference" and isinstance(row.get("chosen"), str):
        return field_of(row, "chosen", str)
    if format == "alpaca" or (format == "completion" and not isinstance(row.get("prompt"), list)):
        return _response(row, format)
    if format in ("preference", "completion"):
        messages = messages_of(field_of(_listed(row), "chosen" if format == "preference" else "completion", list))
    else:
        messages = _conversation(row, format, answered=True).messages
    if messages[-1]["role"] != "assistant":
        raise BadRow("no_assistant_turn", "its last turn is not the assistant's, so it has no answer to compare with")
    answer = next(message["content"] for message in messages if message["role"] == "assistant")
    if not answer:
        raise BadRow("no_answer", "its first answer is a call of a tool, so there is no text to compare with")
    return answer


def shown_prompt(row: dict[str, Any], *, format: str) -> str:
    """What `encode_prompt` asks, for people: without the words and tokens that go around it.

    Raises BadRow.
    """
    if format == "alpaca":
        return "\n\n".join(filter(None, instruction_of(row)))
    if format == "text":
        return _response(row, format)
    if isinstance(row.get("prompt"), str):
        return field_of(row, "prompt", str)
    if format == "preference":
        context = messages_of(field_of(row, "prompt", list))
    else:
        context = _asked(_conversation(row, format, answered=False))
    return "\n\n".join(f"{message['role']}: {message['content'] or ''}" for message in context)


def with_shots(
    row: dict[str, Any], shots: list[dict[str, Any]], *, format: str, prompt: str, answered: bool
) -> tuple[dict[str, Any], str]:
    """A row with worked examples before its prompt, and the format that it has then.

    In a chat each example is turns of their own, its system turn left out; elsewhere the rows' texts stand one after
    another, a blank line between them. `answered`: with the row's own response, for `encode_row`; without, for
    `encode_prompt`.

    Raises BadRow.
    """
    if not _is_chat(row, format, prompt):
        text = "".join(f"{_head(shot, format)}{_response(shot, format)}\n\n" for shot in shots)
        asked = {"prompt": text + _head(row, format)}
        return asked | ({"completion": _response(row, format)} if answered else {}), "completion"
    chat = _conversation(row, format, answered=answered)
    messages = chat.messages if answered else _asked(chat)
    others = [_conversation(shot, format, answered=True).messages for shot in shots]
    examples = [message for each in others for message in each if message["role"] != "system"]
    start = messages[0]["role"] == "system"
    return {"messages": [*messages[:start], *examples, *messages[start:]], "tools": chat.tools}, "messages"


def shots_separator(shots: list[dict[str, Any]], *, format: str, prompt: str) -> str | None:
    """With what a model that goes on writing examples after its answer would begin the next; None in a chat."""
    if _is_chat(shots[0], format, prompt):
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


def _is_chat(row: dict[str, Any], format: str, prompt: str) -> bool:
    """Whether a row goes through the chat template; one of `completion` where its prompt is a list of turns."""
    turns = format == "completion" and isinstance(row.get("prompt"), list)
    return turns or format in ("messages", "sharegpt") or (format == "alpaca" and prompt == "chat")


def _head(row: dict[str, Any], format: str) -> str:
    """What comes before the response, of a row that goes through no chat template."""
    if format == "text":
        return ""
    if format == "alpaca":
        return stanford_prompt(row)
    head = field_of(row, "prompt", str)
    if not head.strip():
        raise BadRow("empty_prompt", 'the field "prompt" is empty')
    return head


def _response(row: dict[str, Any], format: str) -> str:
    name = {"alpaca": "output", "completion": "completion", "text": "text"}[format]
    response = field_of(row, name, str)
    if not response.strip():
        raise BadRow("empty_response", f'the field "{name}" is empty')
    return response


def _conversation(row: dict[str, Any], format: str, *, answered: bool) -> Conversation:
    """The conversation of a row, checked; `answered`: it must have the response."""
    if format != "alpaca":
        return conversation_of(row, format, answered=answered)
    messages = asked_messages(row)
    if answered:
        messages.append({"role": "assistant", "content": _response(row, format)})
    return Conversation(messages, None, [1.0] * len(messages))


def _asked(chat: Conversation) -> list[Message]:
    """What is before the first answer that is trained, or all where the last turn is none."""
    answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and chat.weights[i] > 0.0]
    return chat.messages[: answers[0]] if answers and chat.messages[-1]["role"] == "assistant" else chat.messages
