"""Tokenizers and chat templates: text to token ids and back, exactly as the model's own library does.

Knows nothing of rows, formats or loss masks.
"""

import bisect
import datetime
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.data.backends import Fast, SentencePiece, named
from jlora.errors import ConfigError, DataError, ModelError, UserError
from jlora.files import hub
from jlora.files.paths import inside
from jlora.files.sandbox import BYTES, SECONDS, confined, panics, tried
from jlora.files.text import counted
from jlora.files.theirs import MAX_JSON, MAX_TEMPLATE, read_theirs, text_of_theirs

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATES = {
    # Renders what the template of Meta's Llama-2-chat models renders: BOS and EOS around each pair of turns,
    # the system prompt inside the first user turn.
    "llama2": (
        r"{% set start = 1 if messages[0].role == 'system' else 0 %}"
        r"{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if start else '' %}"
        r"{% for message in messages[start:] %}"
        r"{% if message.role != ('user', 'assistant')[loop.index0 % 2] %}"
        r"{{ raise_exception('user and assistant must take turns, the user first') }}"
        r"{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + ' ' + eos_token }}"
        r"{% else %}{% set content = (system if loop.first else '') + message.content %}"
        r"{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
        r"{% endif %}{% endfor %}"
    ),
    "chatml": (
        r"{% for message in messages %}"
        r"{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


# Tokens without a row that are told by name.
NAMED = 3

# Characters of one conversation's text.
MAX_TEXT = 16 * 2**20

# What switches off the space that a SentencePiece model puts before a text: `normalizer_spec.add_dummy_prefix` of its
# protobuf, whose last value counts.
NO_SPACE = bytes([0x1A, 2, 0x18, 0])

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip

# Of each tokenizer.json that was tried in a process of its own, the SHA-256.
_survived: set[str] = set()


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STRFTIME = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One tokenizer, whichever library is behind it. It has no padding token: masks say what is padding."""

    vocab_size: int  # largest token id + 1
    own_size: int  # the same of the vocabulary itself, without tokens that were added to it
    bos_id: int | None
    eos_id: int
    add_bos: bool  # the tokenizer's own convention for plain text
    bos_token: str | None
    eos_token: str
    chat_template: str | None
    files: tuple[Path, ...]  # what makes a folder this tokenizer; empty if it came from a GGUF file
    vocabulary_hash: str
    backend: Fast | SentencePiece = field(repr=False)
    day: datetime.date | None = None  # that a chat template writes; None: today
    limit: int | None = None  # number of ids that the model has an embedding for; None: of all

    @property
    def writes_day(self) -> bool:
        """Whether the chat template writes the day into every row."""
        return "strftime_now" in (self.chat_template or "")

    @property
    def digest(self) -> str:
        """SHA-256 over everything that decides which ids a row becomes."""
        rest: list[Any] = [self.vocabulary_hash, self.bos_id, self.eos_id, self.add_bos, self.chat_template]
        if self.limit is not None and self.limit < self.vocab_size:  # decides which rows are refused
            rest.append(self.limit)
        return hashlib.sha256(json.dumps(rest).encode()).hexdigest()

    def on(self, day: str) -> "Tokenizer":
        """The same, whose chat template writes a day such as 2026-11-28 instead of today's."""
        return replace(self, day=datetime.date.fromisoformat(day))

    def beyond(self, ids: Sequence[int]) -> str | None:
        """What is wrong with ids that the model has no embedding for, as a clause; None where it has one for all."""
        if self.limit is None or max(ids, default=0) < self.limit:
            return None
        token = max(ids)
        return (
            f"the token {self.backend.name(token)!r} (id {token}) has no row in the model's embedding of {self.limit}, "
            f"which lacks {self._lacking}; take it out of the text, or train with model.resize_embeddings=true, which "
            "gives it one"
        )

    @cached_property
    def _lacking(self) -> str:
        return self.outside(self.limit or 0)

    def outside(self, rows: int) -> str:
        """How many tokens an embedding of `rows` has no row for, and what the first of them are called."""
        ids = self.backend.ids_from(rows)
        shown = ", ".join([*(repr(self.backend.name(i)) for i in ids[:NAMED]), *(["..."] if len(ids) > NAMED else [])])
        return f"{counted(len(ids), 'token')} ({shown})"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without BOS or EOS; special tokens written out in it are recognised."""
        return self.backend.encode(text)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each text, at once."""
        return self.backend.encode_all(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids` ([n] integers), special tokens left out."""
        return self.backend.decode([int(i) for i in ids])

    @property
    def marks_answers(self) -> bool:
        """Whether the chat template says itself, by `{% generation %}`, what the assistant would generate."""
        return _GENERATION.search(self.chat_template or "") is not None

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """The special tokens as they are written out, EOS among them."""
        return tuple(dict.fromkeys([self.eos_token, *self.backend.specials().values()]))

    @cached_property
    def whole(self) -> re.Pattern[str]:
        """What finds in a text those tokens that stand for a string as a whole, special or not."""
        strings = sorted({self.eos_token, *self.backend.added}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, strings)))

    def up_to(self, text: str, ids: list[int], places: list[int]) -> list[tuple[int, str]]:
        """For each of some places of a text whose ids are known: how many of them lead up to where, and what is left.

        So the text up to a place has that number of ids and those of what is left. A token that stands for a string as
        a whole splits a text before anything else does; where such tokens are not found in the text one by one, all of
        it is left.
        """
        found = [(match.start(), match.end(), self.backend.added.get(match[0])) for match in self.whole.finditer(text)]
        known = set(self.backend.added.values())
        at = [i for i, token in enumerate(ids) if token in known]
        if [ids[i] for i in at] != [token for *_, token in found]:
            found = []
        ends = [end for _, end, _ in found]
        counts = []
        for place in places:
            last = bisect.bisect_right(ends, place) - 1
            if place == len(text):
                counts.append((len(ids), ""))
            elif last < 0:
                counts.append((0, text[:place]))
            else:
                counts.append((at[last], text[found[last][0] : place]))
        return counts

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, tools: Any = None) -> str:
        """The text of a conversation by the chat template, run in a sandbox.

        Raises ConfigError if there is no template, it does not parse or it takes up too much time, memory or
        text, DataError if it refuses the messages.
        """
        return self._rendered(messages, tools, add_generation_prompt=add_generation_prompt)[0][0]

    def render_marked(self, messages: list[dict[str, Any]], tools: Any = None) -> tuple[str, list[tuple[int, int]]]:
        """`render` without a generation prompt, and the characters of each `{% generation %}`.

        They are those of transformers' `return_assistant_tokens_mask`.
        """
        texts, spans = self._rendered(messages, tools, return_assistant_tokens_mask=True)
        return texts[0], spans[0]

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise ConfigError(
                "no chat template: set data.chat_template (--chat-template) to llama2, chatml or a .jinja file"
            )
        template = self.chat_template
        if self.day is not None:  # transformers hands a template nothing that can be called
            day = self.day
            template = _STRFTIME.sub(lambda call: repr(day.strftime(call["format"])), template)
        try:
            with confined():
                rendered = render_jinja_template(
                    [messages], tools=tools, chat_template=template,
                    bos_token=self.bos_token or "", eos_token=self.eos_token, **options,
                )  # fmt: skip
            if len(rendered[0][0]) > MAX_TEXT:
                raise MemoryError
            rendered[0][0].encode()  # ValueError: half of a surrogate pair
        except TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
        except (TimeoutError, MemoryError):
            raise ConfigError(
                f"the chat template takes more than {SECONDS} seconds, {BYTES >> 30} GiB or {MAX_TEXT >> 20} MiB of "
                "text for one conversation; set data.chat_template (--chat-template) to another"
            ) from None
        except Exception as error:  # a template is a program: any error can come out of it
            raise DataError(f"the chat template refuses the messages: {error}") from error
        return rendered


def load_tokenizer(path: str | Path, chat_template: str | None) -> Tokenizer:
    """Load a tokenizer from an HF folder or the name of a hub repository.

    A folder's `tokenizer.json` is taken as it stands, whatever class the folder names; with only a
    `tokenizer.model`, text is tokenised by sentencepiece itself. Code in a repository is never run.
    `chat_template` is None for the tokenizer's own, the name of one of CHAT_TEMPLATES, or a `.jinja` file.

    Raises ModelError if the tokenizer is missing, unreadable or has no EOS, ConfigError for `chat_template`.
    """
    folder = _folder(path)
    files = tuple(path for path in (inside(folder, name) for name in _FILES) if path.is_file())
    try:
        if folder / "tokenizer.json" in files:
            tokenizer = _from_json(folder, files, path)
        elif folder / "tokenizer.model" in files:
            tokenizer = _from_sentencepiece(folder, files)
        else:
            raise ModelError(f"{folder} has no tokenizer: it needs a tokenizer.json or a tokenizer.model")
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"the tokenizer files in {folder} cannot be read: {error}") from error
    return with_template(tokenizer, chat_template, path)


def with_template(tokenizer: Tokenizer, chat_template: str | None, path: str | Path) -> Tokenizer:
    """The tokenizer with another chat template: one of `CHAT_TEMPLATES`, a file's, or None for its own.

    Raises:
      ConfigError: neither a name nor a readable file, or a template whose tokens the tokenizer does not have.
    """
    if chat_template is None:
        return tokenizer
    if chat_template == "chatml" and len(tokenizer.encode("<|im_end|>")) != 1:
        # In ordinary pieces the end of a turn would not be one token, at which generation can stop.
        raise ConfigError(f"chatml needs the token <|im_end|>, which the tokenizer of {path} does not have")
    if chat_template in CHAT_TEMPLATES:
        return replace(tokenizer, chat_template=CHAT_TEMPLATES[chat_template])
    try:
        return replace(tokenizer, chat_template=text_of_theirs(Path(chat_template), MAX_TEMPLATE))
    except (OSError, ValueError) as error:
        names = ", ".join(CHAT_TEMPLATES)
        raise ConfigError(f"chat template {chat_template} is neither one of {names} nor a readable file") from error


def _folder(path: str | Path) -> Path:
    """The local folder of `path`; of a hub repository, the tokenizer's files alone are downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists():
        raise ModelError(f"tokenizer {path} is neither a folder nor a GGUF file; set the folder that it lies in")
    return hub.download(str(path), list(_FILES), "folder with a tokenizer", ModelError)


def _from_json(folder: Path, files: tuple[Path, ...], where: str | Path) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    content = read_theirs(folder / "tokenizer.json", MAX_JSON)
    digest = hashlib.sha256(content).hexdigest()
    if digest not in _survived:
        if fault := tried("tokenizer", content=content):
            raise ValueError(fault)
        _survived.add(digest)
    # Alone, because transformers reads more of a folder, such as additional_chat_templates, wherever links in it lead.
    with tempfile.TemporaryDirectory(prefix="jlora-") as alone:
        for path in (*files, inside(folder, "config.json")):
            if path.is_file():
                (Path(alone) / path.name).symlink_to(path.resolve())
        with panics():  # not by AutoTokenizer, which rebuilds Llama's so that it cuts some texts differently
            hf = PreTrainedTokenizerFast.from_pretrained(alone, local_files_only=True)
    return from_fast(hf, content, files, where)


def from_fast(hf: "PreTrainedTokenizerFast", content: bytes, files: tuple[Path, ...], where: str | Path) -> Tokenizer:
    """A tokenizer of the `tokenizers` library. Args: content: what decides its ids. files: what makes a folder it."""
    if hf.eos_token_id is None:
        raise ModelError(f"the tokenizer of {where} names no eos_token that has an id")
    template = hf.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str | None):
        raise ModelError(f"the tokenizer of {where} has a chat template that is no text; set data.chat_template")
    fast = hf.backend_tokenizer
    _make_certain(fast, where)
    fast.no_truncation()  # a tokenizer.json may carry both; here a row is encoded whole
    fast.no_padding()
    with named(f"of {where} cannot be used"):
        add_bos = hf.bos_token_id is not None and hf("x").input_ids[:1] == [hf.bos_token_id]
        every = set(fast.get_vocab(with_added_tokens=True).values())
        own = every - fast.get_added_tokens_decoder().keys()
    added = sorted((i, token.content) for i, token in fast.get_added_tokens_decoder().items())
    return Tokenizer(
        vocab_size=max(every) + 1,
        own_size=max(own, default=-1) + 1,
        bos_id=hf.bos_token_id, eos_id=hf.eos_token_id, add_bos=add_bos,
        bos_token=hf.bos_token, eos_token=hf.eos_token, chat_template=template, files=files,
        vocabulary_hash=hashlib.sha256(content + json.dumps(added).encode()).hexdigest(),
        backend=Fast(fast),
    )  # fmt: skip


def _make_certain(fast: "FastTokenizer", where: str | Path) -> None:
    """Switch off what gives one text other tokens each time, and say so on stderr."""
    if chance := getattr(fast.model, "dropout", None):
        fast.model.dropout = None
        print(f"warning: the tokenizer of {where} cuts texts at random (dropout {chance}); taken as 0", file=sys.stderr)


def _from_sentencepiece(folder: Path, files: tuple[Path, ...]) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    content = read_theirs(folder / "tokenizer.model", MAX_JSON)
    try:
        processor = SentencePieceProcessor(model_proto=content)
        bare = SentencePieceProcessor(model_proto=content + NO_SPACE)
    except RuntimeError as error:
        raise ModelError(f"{folder / 'tokenizer.model'} is not a SentencePiece model") from error
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    if folder / "chat_template.jinja" in files:
        template = text_of_theirs(folder / "chat_template.jinja", MAX_TEMPLATE)

    def text(token: str | dict[str, Any]) -> str:  # HF writes either
        return token["content"] if isinstance(token, dict) else token

    model_ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id()}
    tokens = {f"{key}_token": processor.id_to_piece(i) for key, i in model_ids.items() if i >= 0}
    tokens |= {key: text(config[key]) for key in ("bos_token", "eos_token", "unk_token") if config.get(key)}
    added = {text(token): int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    added |= _read_json(folder / "added_tokens.json")
    for token in (*tokens.values(), *map(text, config.get("additional_special_tokens") or ())):
        i = processor.piece_to_id(token)  # of a string that is no piece: the id of <unk>
        if token not in added and processor.id_to_piece(i) == token:
            added[token] = i
    bos, eos = tokens.get("bos_token"), tokens.get("eos_token")
    if eos is None or eos not in added:
        raise ModelError(f"the tokenizer of {folder} names no eos_token that has an id")
    # transformers 5 takes a Llama tokenizer that does not say so for one that is not legacy.
    legacy = config.get("legacy", not str(config.get("tokenizer_class")).startswith("LlamaTokenizer"))
    at_start = config.get("add_prefix_space") is not False
    within = at_start and bool(legacy)
    decides: list[Any] = sorted(added.items())
    if not within:
        decides += [at_start, within]
    return Tokenizer(
        vocab_size=max(processor.vocab_size() - 1, *added.values()) + 1,
        own_size=processor.vocab_size(),
        bos_id=added.get(bos or ""), eos_id=added[eos], add_bos=bos in added and config.get("add_bos_token", True),
        bos_token=bos, eos_token=eos, chat_template=template, files=files,
        vocabulary_hash=hashlib.sha256(content + json.dumps(decides).encode()).hexdigest(),
        backend=SentencePiece(processor if at_start else bare, processor if within else bare, added),
    )  # fmt: skip


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(read_theirs(file, MAX_JSON)) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
