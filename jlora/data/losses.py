"""What of a conversation the loss counts, and how much: spans of its text. Knows nothing of tokens."""

from jlora.config import Counted
from jlora.data import chats, reasoning
from jlora.data.conversation import Conversation
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer

Weighted = tuple[int, int, float]  # characters from and to, and the weight of their loss


def weigh(tokenizer: Tokenizer, chat: Conversation, counted: Counted) -> tuple[str, list[Weighted]]:
    """The text of a conversation, and the spans that the loss counts; of two that overlap, the later one.

    Raises:
      BadRow, ConfigError: as `chats.write`.
    """
    if counted.train_on == "all":
        excepted = {message["role"] for message, w in zip(chat.messages, chat.weights, strict=True) if w != 1.0}
        text, found = chats.write(tokenizer, chat, counted.reasoning, sorted(excepted))
        return text, [(0, len(text), 1.0), *((start, end, chat.weights[i]) for i, start, end in found)]
    roles = ["assistant"] if isinstance(counted.train_on, str) else list(counted.train_on)
    text, found = chats.write(tokenizer, chat, counted.reasoning, roles)
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
        parts = reasoning.answered(text, start, end, mask=counted.reasoning == "mask")
        spans += [(*part, chat.weights[i]) for part in parts]
    return text, spans


def _without_end(text: str, start: int, end: int, specials: tuple[str, ...]) -> int:
    """Where a span ends without the tokens that end its turn."""
    words = text[start:end]
    while ending := next((token for token in specials if words.rstrip().endswith(token)), None):
        words = words.rstrip().removesuffix(ending)
    return start + len(words)
