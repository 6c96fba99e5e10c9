"""A server with OpenAI's API, asked within bounds: of requests, of time, of what it may answer.

Nothing is sent anywhere but to the given URL: no proxy is used and no redirect is followed. The key comes from
OPENAI_API_KEY alone, and is in no message and in nothing that is read. Knows nothing of models, rows or faults.
"""

import http.client
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jlora.errors import ConfigError, ModelError
from jlora.files.text import HIDDEN, clean

KEY = "OPENAI_API_KEY"
SHORTEST_KEY = 8  # a shorter one, such as vLLM's EMPTY, is no secret and may stand anywhere
MOST_BYTES = 16 * 2**20
TRIES = 3
# Of the time for all requests, what one may take; and seconds between two tries, twice as long each time.
SHARE, FIRST_WAIT, LONGEST_WAIT = 0.25, 0.5, 10.0
RETRIED = (429, 500, 502, 503, 504)
LONGEST_TOLD = 200  # characters of what a server says of an error
GREEDY = {"temperature": 0, "seed": 0, "frequency_penalty": 0, "presence_penalty": 0, "stream": False}


class Token(NamedTuple):
    """A token as a server shows it: what it can say of text, bytes and id, and its log-probability in nats."""

    text: str
    raw: bytes | None
    id: int | None
    logprob: float | None


@dataclass(frozen=True)
class Said:
    """A server's answer.

    Attributes:
      tokens: of the answer, and before them of the prompt where it was to be echoed; none without log-probabilities.
      finish: why it ended, such as "stop" or "length".
      prompt_tokens: that the server counted; None where it does not say.
      echoed: whether the prompt was to be echoed, too; a server may leave that out without a word.
    """

    text: str
    tokens: list[Token]
    finish: str | None
    prompt_tokens: int | None
    echoed: bool = False


class Refused(Exception):
    """A request that the server does not take: its status, and what it says."""

    def __init__(self, status: int, said: str):
        super().__init__(f"it answers {status}" + (f" ({said})" if said else ""))
        self.status, self.said = status, said

    @property
    def of_context(self) -> bool:
        """Whether the text was too long for it."""
        return re.search(r"context (length|size|window)|exceed_context|maximum context|too long", self.said) is not None


class _Unanswered(Exception):
    """No answer came, for a reason that may be gone the next time."""


class Endpoint:
    """The API at a URL, for one of its models."""

    def __init__(self, url: str, model: str, seconds: float):
        """Nothing is sent yet.

        Args:
          url: such as http://127.0.0.1:8000/v1; without a path, /v1 is meant.
          seconds: for all requests together.

        Raises:
          ConfigError: no such URL, or a key that cannot be sent.
        """
        self.url, self.model, self.seconds = url, model, seconds
        wrong = f"--endpoint {url}: "
        try:
            parts = urlsplit(url)
            host, self._port = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or parts.scheme not in ("http", "https") or not url.isascii() or not url.isprintable():
            raise ConfigError(f"{wrong}is no URL of a server; give one such as http://127.0.0.1:8000/v1")
        if "@" in parts.netloc:
            raise ConfigError(f"--endpoint: holds a user or a password; take it out, and set a key in {KEY}")
        if parts.query or parts.fragment or " " in url:
            raise ConfigError(f"{wrong}has more than a host and a path; give what stands before /completions")
        self._host, self._secure = host, parts.scheme == "https"
        self._path = parts.path.rstrip("/") or "/v1"
        self._key = os.environ.get(KEY, "")
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{KEY}: holds a character that no key has; set it again")
        self._spent = 0.0  # seconds of requests and of the pauses between them
        self._offers: dict[str, bool] = {}  # whether what not every server has was taken
        self.requests = 0

    def require_model(self) -> None:
        """See that the server has the model, where it lists its models.

        Raises:
          ConfigError: it has not, with those that it has. ModelError: it does not answer.
        """
        try:
            listed = self._asked("GET", "/models", None)
        except Refused as refused:
            if refused.status in (404, 405, 501):  # not every server has this list
                return
            raise ModelError(f"{self.url}: {refused} to /models") from None
        entries = listed.get("data")
        names = [str(each["id"]) for each in entries if isinstance(each, dict) and "id" in each] if isinstance(
            entries, list
        ) else []  # fmt: skip
        if names and not {self.model, f"{self.model}:latest"} & {*names}:
            shown = ", ".join(name[:LONGEST_TOLD] for name in names[:8])
            raise ConfigError(f"--model {self.model}: the server at {self.url} has no such model; it has {shown}")

    def complete(self, text: str, most: int, echo: bool = False, ids: list[int] | None = None) -> Said:
        """The likeliest `most` tokens after a text; with its own scored, too, where the server does that.

        Args:
          ids: of the text, which go in its place where the server takes ids; it then adds nothing of its own.

        Raises:
          Refused: the server does not take the text. ModelError: it does not answer.
        """
        wanted = ["ids"] * (ids is not None) + ["logprobs"]
        if echo and self._offers.get("logprobs", True):
            wanted.insert(0, "echo")

        def request(used: list[str]) -> Said:
            body = GREEDY | {"model": self.model, "prompt": ids if "ids" in used else text, "max_tokens": most}
            body |= {"logprobs": 1} if "logprobs" in used else {}
            body |= {"echo": True} if "echo" in used else {}
            return self._said("/completions", body)

        return self._with_what_is_offered(wanted, request)

    def chat(self, messages: list[dict[str, Any]], tools: Any, most: int) -> Said:
        """The likeliest `most` tokens that answer a conversation.

        Raises:
          Refused: the server does not take it. ModelError: it does not answer.
        """

        def request(used: list[str]) -> Said:
            body = GREEDY | {"model": self.model, "messages": messages, "max_tokens": most}
            body |= {"tools": tools} if tools else {}
            body |= {"logprobs": True, "top_logprobs": 1} if used else {}
            return self._said("/chat/completions", body)

        return self._with_what_is_offered(["logprobs of chats"], request)

    def _with_what_is_offered(self, wanted: list[str], request: Callable[[list[str]], Said]) -> Said:
        """Ask with all that is wanted, and without the first that has never worked where that is refused."""
        while True:
            used = [each for each in wanted if self._offers.get(each, True)]
            try:
                said = request(used)
            except Refused as refused:
                doubtful = [each for each in used if each not in self._offers]
                if refused.of_context or refused.status == 404 or not doubtful:
                    raise
                self._offers[doubtful[0]] = False
            else:
                self._offers |= dict.fromkeys(used, True)
                return said

    def _said(self, path: str, body: dict[str, Any]) -> Said:
        answer = self._asked("POST", path, body)
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
        message = choice.get("message")
        text = choice.get("text") if "messages" not in body else _content(message)
        if not isinstance(text, str):
            raise ModelError(f"{self.url}{path}: an answer without a text; is this a server with OpenAI's API?")
        usage, finish = answer.get("usage"), choice.get("finish_reason")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        return Said(
            _text(text),
            _tokens(choice.get("logprobs")),
            finish if isinstance(finish, str) else None,
            counted if isinstance(counted, int) and counted > 0 else None,
            "echo" in body,
        )

    def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object that comes back.

        Raises:
          Refused: a status that is not 200, at the last try. ModelError: no answer, or none that can be read.
          ConfigError: the server wants another key.
        """
        where, reason, refused = self.url, "", None
        for number in range(TRIES):
            if number:
                self._wait(FIRST_WAIT * 2 ** (number - 1))
            try:
                status, content = self._within(method, path, body)
            except _Unanswered as unanswered:
                reason, refused = str(unanswered), None
                continue
            if status == 200:
                return self._object(content, path)
            if 300 <= status < 400:
                raise ModelError(
                    f"{where}: it answers {status}, which leads elsewhere, and rows are sent nowhere but to the given "
                    "URL; give the one that it leads to"
                )
            if status in (401, 403):
                raise ConfigError(f"{where}: the server wants a key ({status}); set it in the environment as {KEY}")
            refused = Refused(status, _told(content))
            if status not in RETRIED or refused.of_context:
                raise refused
        if refused is not None:
            raise refused
        raise ModelError(f"{where}: {reason}, {TRIES} times in a row; see that the server runs there, and its log")

    def _wait(self, seconds: float) -> None:
        pause = min(seconds, LONGEST_WAIT, self._left())
        time.sleep(pause)
        self._spent += pause

    def _left(self) -> float:
        """Seconds left for all requests; what is computed between them does not count."""
        left = self.seconds - self._spent
        if left <= 0:
            raise ModelError(
                f"{self.url}: the server took more than {self.seconds:g} seconds for {self.requests} requests; ask for "
                "fewer rows with --rows, or give it more time with --timeout"
            )
        return left

    def _within(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        """One request, in a thread that is left behind where it takes too long: of a lookup, a name, or every byte."""
        limit = min(self._left(), self.seconds * SHARE)
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=limit)
        found: list[tuple[int, bytes] | Exception] = []

        def ask() -> None:
            try:
                found.append(self._once(connection, method, path, body))
            except Exception as error:  # whatever the library raises over what a server sends
                found.append(error)

        self.requests += 1
        began = time.monotonic()
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(limit)
        answered = found[:]  # the thread may add a failure of our own making once its socket is shut
        self._spent += time.monotonic() - began
        if connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)  # which ends a read that still waits
        connection.close()
        if not answered or isinstance(answered[0], TimeoutError):
            raise _Unanswered(f"no answer within {limit:.3g} seconds")
        if isinstance(answered[0], Exception):
            raise _Unanswered(_reason(answered[0])) from None
        return answered[0]

    def _once(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, bytes]:
        headers = {"Accept": "application/json", "User-Agent": "jlora"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None if body is None else json.dumps(body).encode()
        if content is not None:
            headers["Content-Type"] = "application/json"
        connection.request(method, self._path + path, body=content, headers=headers)
        with connection.getresponse() as response:  # which holds the socket open, whatever becomes of the connection
            read = response.read(MOST_BYTES + 1)
            if len(read) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES >> 20} MiB in one answer")
            if response.length:  # left of what was announced
                raise http.client.IncompleteRead(b"", response.length)
        if len(self._key) >= SHORTEST_KEY:  # a server may send back what it was sent
            read = read.replace(self._key.encode(), HIDDEN.encode())
        return response.status, read

    def _object(self, content: bytes, path: str) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            begins = clean(content[:40].decode("utf-8", "replace"))
            raise ModelError(
                f"{self.url}{path}: an answer that is no JSON object (it begins {begins!r}); is this a server with "
                "OpenAI's API?"
            )
        return found


def _content(message: Any) -> Any:
    """The text of a chat's answer; one that calls a tool has none."""
    return (message.get("content") or "") if isinstance(message, dict) else None


def _reason(error: Exception) -> str:
    """Why no answer came, in words without anything that was sent."""
    match error:
        case http.client.RemoteDisconnected() | ConnectionResetError() | BrokenPipeError():
            return "the server drops the connection"
        case http.client.IncompleteRead():
            return "the server breaks off in the middle of an answer"
        case http.client.HTTPException():
            return "what answers does not speak HTTP"
        case OSError():
            return f"no connection ({error.strerror or type(error).__name__})"
        case ValueError():
            return str(error)
    return f"no answer ({type(error).__name__})"


def _told(content: bytes) -> str:
    """What a server says of an error, in one line."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = content.decode("utf-8", "replace")
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return " ".join(clean(str(found)).split())[:LONGEST_TOLD]


def _tokens(logprobs: Any) -> list[Token]:
    """The tokens of an answer, in either of the forms that servers have."""
    if not isinstance(logprobs, dict):
        return []
    if isinstance(content := logprobs.get("content"), list):  # of chats, and of llama-server's completions
        return [
            Token(_text(each.get("token")), _raw(each.get("bytes")), _id(each.get("id")), _number(each.get("logprob")))
            for each in content
            if isinstance(each, dict)
        ]
    texts, numbers = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if not isinstance(texts, list) or not isinstance(numbers, list) or len(texts) != len(numbers):
        return []
    return [Token(_text(text), None, None, _number(number)) for text, number in zip(texts, numbers, strict=True)]


def _text(value: Any) -> str:
    """A text that can be encoded: JSON may hold half of a surrogate pair, and no tokenizer takes one."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def _raw(value: Any) -> bytes | None:
    good = isinstance(value, list) and all(isinstance(each, int) and 0 <= each < 256 for each in value)
    return bytes(value) if good and value else None


def _id(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
