"""Where each turn of a conversation stands in the text that a chat template makes of it.

The text is that of the whole conversation, rendered once: templates write a turn otherwise once others follow (Qwen3
drops earlier reasoning, Phi-3 ends the last turn alone with EOS), so no shorter rendering decides what it is. Around
its mark, a turn begins where the generation prompt ends, and ends where the text of the conversation up to it does.
"""

from collections.abc import Callable
from os.path import commonprefix
from typing import NamedTuple

from jlora.data.conversation import Message
from jlora.data.marks import CALL, CONTENT, THOUGHT, Mark, bare, read
from jlora.data.row import BadRow
from jlora.data.tokens import Tokenizer

REMEDY = "set data.chat_template to one with {% generation %} marks"
ANOTHER = "set data.chat_template to one that does, such as another model's in a .jinja file"

Render = Callable[[list[Message], bool], str]  # messages, whether with the generation prompt


class Span(NamedTuple):
    """The characters of a message that its author wrote; of the assistant, with the end of its turn."""

    message: int
    start: int
    end: int


class Layout:
    """A text whose turns are looked for."""

    def __init__(self, tokenizer: Tokenizer, renders: Render, marked: list[Message], text: str, marks: list[Mark]):
        self._tokenizer, self._renders = tokenizer, renders
        self._messages, self._text, self._marks = marked, text, marks
        # After a message of a role: the generation prompt; after the assistant's content: the end of its turn.
        self._prompts: dict[str, str] = {}
        self._ending = ""

    def anchor(self, i: int) -> Mark:
        """The mark of a message that its end is looked for from."""
        own = [mark for mark in self._marks if mark.message == i]
        found = [mark for kind in (CONTENT, CALL) for mark in own if mark.kind == kind]
        if not found:
            raise BadRow("turn_ignored", f"the chat template does not write turn {i + 1}; {ANOTHER}")
        return found[0]

    def answer(self, i: int) -> Span:
        """What the assistant would have generated of a message."""
        start, end = self._start(i), self._end(i)
        words = self._text[start:end].rstrip()
        # Whitespace behind the end of a turn belongs to the template: generation has stopped before it.
        end = start + len(words) if words.endswith(self._tokenizer.specials) else end
        if not start <= self.anchor(i).at <= end:
            raise self._lost(i)
        return Span(i, start, end)

    def content(self, i: int) -> Span:
        """The content of a message of another role than the assistant's."""
        anchor, start = self.anchor(i), self._content_start(i)
        before, _, after = self._messages[i]["content"].partition(CONTENT)
        before, after = before.lstrip(), bare(CONTENT + after).rstrip()
        if start > anchor.at - len(before) or not self._text.startswith(after, anchor.at):
            raise BadRow(
                "unstable_template",
                f"the chat template writes the content of turn {i + 1} otherwise, so it cannot be trained on; "
                f"leave {self._messages[i]['role']} out of data.train_on",
            )
        return Span(i, anchor.at - len(before), anchor.at + len(after))

    def _lost(self, i: int) -> BadRow:
        what = f"the chat template writes turn {i + 1} differently once others follow, so it cannot be located"
        return BadRow("unstable_template", f"{what}; {REMEDY}")

    def _last_of(self, mark: Mark, before: int) -> int | None:
        """Where the last mark like another stands that is not behind a place."""
        return max((m.at for m in self._marks if m[1:] == mark[1:] and m.at <= before), default=None)

    def _start(self, i: int) -> int:
        """Where the generation prompt before a message ends: the longest beginning of it that the text has."""
        first = min(mark.at for mark in self._marks if mark.message == i)
        role = self._messages[i - 1]["role"] if i else ""
        known = self._prompts.get(role)
        near = max((mark for mark in self._marks if mark.message < i and mark.at <= first), default=None)
        if known and near is not None and near.message == i - 1 and self._text.startswith(known, near.at):
            return near.at + len(known)
        try:
            asked, marks = read(self._renders(self._messages[:i], True))
        except BadRow:
            return self._start_by_prompt(i, first, self._content_start(i))
        place, tail = 0, asked
        if marks:
            found = self._last_of(marks[-1], first)
            if found is None:
                raise self._lost(i)
            place, tail = found, asked[marks[-1].at :]
        if self._text.startswith(tail, place):
            self._prompts[role] = tail
            return place + len(tail)
        if not i:
            return self._start_by_prompt(i, first, self._content_start(i))
        shared = len(commonprefix([tail, self._text[place : place + len(tail)]]))
        plain, own = read(self._renders(self._messages[:i], False))
        ended = plain[own[-1].at :] if own else plain
        start = min(self._border(place + shared), self._content_start(i))
        if tail.startswith(ended) and start > place + len(ended):
            return start
        return self._start_by_prompt(i, first, None)  # the message before it ends otherwise

    def _start_by_prompt(self, i: int, first: int, otherwise: int | None) -> int:
        """Where a message begins if the template does not ask for it alone: behind what it asks with elsewhere."""
        before = max((mark.at for mark in self._marks if mark.message < i and mark.at <= first), default=0)
        users = [n for n, message in enumerate(self._messages) if message["role"] == "user"]
        for count in (*(n + 1 for n in users[:1]), len(self._messages)):
            asked, plain = (read(self._renders(self._messages[:count], prompt))[0] for prompt in (True, False))
            prompt = asked.removeprefix(plain) if plain and asked.startswith(plain) else ""
            if prompt and (at := self._text.rfind(prompt, before, first)) >= 0:
                return at + len(prompt)
        if otherwise is None:
            raise self._lost(i)
        return otherwise

    def _end(self, i: int) -> int:
        """Where the text of the conversation up to a message ends: the longest beginning of it that the text has."""
        if i == len(self._messages) - 1:
            return len(self._text)
        anchor, plain = self.anchor(i), "tool_calls" not in self._messages[i]
        if plain and self._ending and self._text.startswith(self._ending, anchor.at):
            return anchor.at + len(self._ending)
        try:
            upto, marks = read(self._renders(self._messages[: i + 1], False))
        except BadRow:
            return self._end_by_token(i, anchor.at)
        own = next((mark for mark in marks if mark[1:] == anchor[1:]), None)
        if own is None:
            raise self._lost(i)
        tail = upto[own.at :]
        if self._text.startswith(tail, anchor.at):
            self._ending = tail if plain else self._ending
            return anchor.at + len(tail)
        end = self._border(anchor.at + len(commonprefix([tail, self._text[anchor.at : anchor.at + len(tail)]])))
        if tail[end - anchor.at :].strip() not in self._tokenizer.specials:  # but another end of the conversation
            raise self._lost(i)
        return end

    def _end_by_token(self, i: int, start: int) -> int:
        """Where a message ends if the template does not write it as the last: with the next special token."""
        later = [mark.at for mark in self._marks if mark.message > i and mark.at >= start]
        after = min(later, default=len(self._text))
        ends = [
            at + len(token) for token in self._tokenizer.specials if (at := self._text.find(token, start, after)) >= 0
        ]
        if not ends:
            raise self._lost(i)
        return min(ends)

    def _border(self, at: int) -> int:
        """A place, or the beginning of the token around it that stands for a string as a whole."""
        for found in self._tokenizer.whole.finditer(self._text, max(0, self._text.rfind("\n", 0, at)), at + 64):
            if found.start() < at < found.end():
                return found.start()
        return at

    def _content_start(self, i: int) -> int:
        """Where the content of a message begins in the text, as far back from its mark as the two are equal."""
        anchor = self.anchor(i)
        if anchor.kind != CONTENT:
            return anchor.at
        before = bare(self._messages[i]["content"].partition(CONTENT)[0])
        if not any(mark.message == i and mark.kind == THOUGHT for mark in self._marks):
            before = before.rpartition("</think>")[2]
        return anchor.at - len(commonprefix([before[::-1], self._text[: anchor.at][::-1]]))
