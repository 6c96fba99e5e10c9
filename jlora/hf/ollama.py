"""A `Modelfile`, by which Ollama serves a GGUF file: its template, where an answer stops, how much it sees.

Ollama writes prompts by a Go template, and guesses one where the file's own is none that it knows. So it is given here,
read off what the tokenizer's own makes of a few conversations, and only where it makes the same of others.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jlora.data.alpaca import stanford_prompt
from jlora.data.tokens import Tokenizer
from jlora.errors import DataError

# Ollama's own least; with less, long prompts lose their beginning without a word.
LEAST_CONTEXT = 4096
# Marks that no template writes itself.
SYSTEM, FIRST, ANSWER, SECOND = "s\u2063y", "f\u2063i", "a\u2063n", "q\u2063u"

Render = Callable[[list[dict[str, Any]]], str]  # a conversation that ends with a user's turn, and what asks for more


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around the turns of a conversation.

    Attributes:
      before: the first user's turn, of a conversation without a system prompt.
      system: before and behind a system prompt, up to the first user's turn; None where the template takes none.
      answer: between a user's turn and the answer. again: between that and the user's next turn.
      asking: behind the last user's turn.
    """

    before: str
    system: tuple[str, str] | None
    answer: str
    again: str
    asking: str

    def written(self, messages: list[dict[str, str]]) -> str:
        """What the Go template makes of a conversation."""
        text, later = self.before, False
        if messages[0]["role"] == "system":
            assert self.system is not None
            text = messages[0]["content"].join(self.system)
        for message in messages:
            match message["role"]:
                case "user":
                    text, later = text + self.again * later + message["content"], True
                case "assistant":
                    text += self.answer + message["content"]
        return text + self.asking

    def template(self) -> str:
        """The Go template, of one line; text stands in it as quoted strings, so that no space is lost."""
        begin = _quoted(self.before)
        if self.system is not None:
            one, other = map(_quoted, self.system)
            begin = f"{{{{ if .System }}}}{one}{{{{ .System }}}}{other}{{{{ else }}}}{begin}{{{{ end }}}}"
        again = f"{{{{ if $later }}}}{_quoted(self.again)}{{{{ end }}}}" if self.again else ""
        return (
            f'{begin}{{{{ $later := false }}}}{{{{ $role := "" }}}}{{{{ range .Messages }}}}'
            f'{{{{ if eq .Role "user" }}}}{again}{{{{ .Content }}}}{{{{ $later = true }}}}{{{{ $role = .Role }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{_quoted(self.answer)}{{{{ .Content }}}}{{{{ $role = .Role }}}}'
            f'{{{{ end }}}}{{{{ end }}}}{{{{ if eq $role "user" }}}}{_quoted(self.asking)}{{{{ end }}}}'
        )


def _quoted(text: str) -> str:
    """A text as an action of a Go template, whose strings are written as those of JSON."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def pieces_of(tokenizer: Tokenizer) -> Pieces | None:
    """What the tokenizer's chat template writes around turns; None where it is not that simple, or there is none.

    Where Ollama puts a BOS in front of every prompt, that of the template is left out.
    """
    if tokenizer.chat_template is None:
        return None
    bos = tokenizer.bos_token or ""

    def render(messages: list[dict[str, Any]]) -> str:
        text = tokenizer.render(messages, add_generation_prompt=True)
        return text.removeprefix(bos) if tokenizer.add_bos else text

    try:
        found = _read_off(render)
        if found is None or not all(found.written(chat) == render(chat) for chat in _chats(found.system is not None)):
            return None
    except DataError:
        return None
    return found


def _read_off(render: Render) -> Pieces | None:
    users = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": ANSWER}]
    users += [{"role": "user", "content": SECOND}]
    before, found, rest = render(users).partition(FIRST)
    answer, also, rest = rest.partition(ANSWER)
    again, last, asking = rest.partition(SECOND)
    if not (found and also and last):
        return None
    system = None
    try:
        begun, there, between = render([{"role": "system", "content": SYSTEM}, *users[:1]]).partition(SYSTEM)
        between, also, _ = between.partition(FIRST)
        system = (begun, between) if there and also else None
    except DataError:  # as Gemma's
        pass
    return Pieces(before, system, answer, again, asking)


def _chats(system: bool) -> list[list[dict[str, str]]]:
    """Conversations of one to three rounds, whose turns have no spaces around them, which some templates drop."""
    turns = [("user", "Who?"), ("assistant", "I.\n\nAnd you?"), ("user", "No."), ("assistant", "{x}"), ("user", "Why")]
    chats = [[{"role": role, "content": text} for role, text in turns[:end]] for end in (1, 3, 5)]
    return chats + [[{"role": "system", "content": "Be kind."}, *chat] for chat in chats * system]


def _stanford() -> str:
    before, _, behind = stanford_prompt({"instruction": FIRST}).partition(FIRST)
    _, between = stanford_prompt({"instruction": FIRST, "system": SYSTEM}).partition(FIRST)[0].split(SYSTEM)
    begin = f"{{{{ if .System }}}}{{{{ .System }}}}{_quoted(between)}{{{{ else }}}}{_quoted(before)}{{{{ end }}}}"
    return f"{begin}{{{{ .Prompt }}}}{_quoted(behind)}"


# The templates of runs that write no chats: Stanford's prompt, which knows no rounds, and what is asked as it is.
STANFORD, COMPLETION = _stanford(), "{{ .Prompt }}"


def modelfile(file: str, template: str | None, stops: list[str], context: int) -> str:
    """The text of a `Modelfile`.

    Args:
      file: name of the GGUF file beside it. template: see `Pieces.template`; None leaves it to Ollama.
      stops: texts that end an answer. context: tokens that prompt and answer may have.
    """
    lines = [f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, f"PARAMETER num_ctx {context}"]) + "\n"
