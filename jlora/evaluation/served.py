"""What a server says to a run's held-out rows, and what the run's own model makes of that, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.data.pieces import Pieces
from jlora.data.tokens import Tokenizer
from jlora.errors import ModelError
from jlora.evaluation.endpoint import Endpoint, Refused, Said
from jlora.evaluation.served_rows import ServedRow, sent
from jlora.inference.answers import width_of
from jlora.model import attention
from jlora.model.adapter import Adapter
from jlora.model.layers import products_in
from jlora.model.llama import Decoder
from jlora.model.sharding import one_device_mesh

# Tokens asked for after a row's own answer, by which it is to have stopped.
AFTER = 8
# Positions whose logits are there together.
CHUNK = 64


@dataclass(frozen=True)
class Observed:
    """An answer.

    Attributes:
      row: its number. chat: whether the server wrote the prompt by its own chat template.
      prompt: ids that training has for what was asked.
      said: ids of the answer, as far as its tokens are known. goes_on: there are more.
      logprobs: the server's own of `said`, in nats; None where it gives none.
      cut: it is as long as was asked for, so it came to no end.
      prompt_tokens: that the server counted.
    """

    row: int
    chat: bool
    prompt: list[int]
    said: list[int]
    goes_on: bool
    logprobs: list[float] | None
    text: str
    cut: bool
    prompt_tokens: int | None


class Ended(NamedTuple):
    """Whether a server stops behind a row's own answer: ids before the end, and whether it did."""

    row: int
    ids: list[int]
    stopped: bool


class Echoed(NamedTuple):
    """A server's log-probabilities of a row's own tokens.

    Attributes:
      ids: of the row up to its end. at: positions in it that are trained, int [n]. logprobs: of the ids there.
    """

    row: int
    ids: list[int]
    at: list[int]
    logprobs: list[float]


@dataclass
class Seen:
    """All that a server said.

    Attributes:
      refused: rows too long for it, with what it says of them.
      missing: what it does not offer, such as "/completions".
    """

    observed: list[Observed] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    echoed: list[Echoed] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def ask_server(endpoint: Endpoint, rows: Sequence[ServedRow], tokenizer: Tokenizer, most: int) -> Seen:
    """Ask for each row: greedily after its prompt, as a chat where it is one, and behind its own answer.

    Args:
      most: tokens of an answer.

    Raises:
      ModelError: the server does not answer, or takes no row.
    """
    seen, pieces = Seen(), Pieces(tokenizer)

    def tried(path: str, row: int, request: Callable[[], Said]) -> Said | None:
        if path in seen.missing:
            return None
        try:
            return request()
        except Refused as refused:
            if refused.of_context:
                seen.refused.append((row, refused.said))
            elif refused.status in (404, 405, 501):
                seen.missing.append(path)
            else:
                raise ModelError(f"{endpoint.url}{path}: {refused}, to row {rows[row].where}") from None
        return None

    for number, row in enumerate(rows):
        asked, messages = row.asked, row.asked.messages
        chat = messages is not None
        text = sent(asked.text, tokenizer)
        ids = asked.ids if chat else None  # what a chat's template writes is not for a server to begin
        said = tried("/completions", number, partial(endpoint.complete, text, most, ids=ids))
        if said is not None:
            seen.observed.append(_observed(said, number, False, asked.ids, asked.text, pieces))
        if messages is not None:
            said = tried("/chat/completions", number, partial(endpoint.chat, messages, asked.tools, most))
            if said is not None:
                seen.observed.append(_observed(said, number, True, asked.ids, asked.text, pieces))
        if row.answered is not None and number not in {row for row, _ in seen.refused}:
            whole, ids = sent(row.answered.text, tokenizer), row.answered.ids if chat else None
            said = tried("/completions", number, partial(endpoint.complete, whole, AFTER, echo=True, ids=ids))
            if said is not None:
                seen.ended.append(Ended(number, row.answered.ids, said.finish == "stop"))
                seen.echoed += _echoed(said, number, row, pieces, tokenizer)
    if not seen.observed and not seen.refused:
        raise ModelError(f"{endpoint.url}: has neither /completions nor /chat/completions; give the URL before them")
    return seen


def _observed(said: Said, row: int, chat: bool, prompt: list[int], before: str, pieces: Pieces) -> Observed:
    cut = said.finish == "length"
    if not said.tokens:
        ids = pieces.ids_of_text(said.text, before)
        # An answer that ends at once has none to give, whether the server gives them or not.
        logs: list[float] | None = None if said.text else []
        return Observed(row, chat, prompt, ids, False, logs, said.text, cut, said.prompt_tokens)
    found = pieces.ids_of([(token.text, token.raw, token.id) for token in said.tokens], before)
    pairs = list(zip(found, said.tokens, strict=True))
    known = next((i for i, (id, token) in enumerate(pairs) if id is None or token.logprob is None), len(pairs))
    ids = [id for id in found[:known] if id is not None]
    logprobs = [token.logprob for token in said.tokens[:known] if token.logprob is not None]
    return Observed(row, chat, prompt, ids, known < len(found), logprobs, said.text, cut, said.prompt_tokens)


def _echoed(said: Said, number: int, row: ServedRow, pieces: Pieces, tokenizer: Tokenizer) -> list[Echoed]:
    """The server's own figures of the row's tokens, where it gives them and cuts the text into the same."""
    assert row.answered is not None
    ids, start = row.answered.ids, int(row.answered.ids[0] == tokenizer.bos_id)
    if not said.echoed or len(said.tokens) < len(ids) - start:
        return []
    found = pieces.ids_of([(token.text, token.raw, token.id) for token in said.tokens], "")
    begins = next((i for i, id in enumerate(found) if id != tokenizer.bos_id), 0) if start else 0
    pairs = list(zip(ids[start:], found[begins:], said.tokens[begins:], strict=False))
    if len(pairs) < len(ids) - start or any(theirs not in (None, ours) for ours, theirs, _ in pairs):
        return []
    at = [i for i in np.flatnonzero(row.answered.counted).tolist() if i >= max(start, 1)]
    logprobs = [pairs[i - start][2].logprob for i in at]
    kept = [(i, value) for i, value in zip(at, logprobs, strict=True) if value is not None]
    return [Echoed(number, ids, [i for i, _ in kept], [value for _, value in kept])] if kept else []


@dataclass(frozen=True)
class Scores:
    """What a model says of the tokens that follow a prompt, and of the one after them; [n + 1] each.

    Attributes:
      logs: log-probability of each token in nats; of the last, that of the end of an answer.
      best: the likeliest tokens. top: their log-probabilities.
    """

    logs: np.ndarray
    best: np.ndarray
    top: np.ndarray


class Scorer:
    """A base with an adapter, as one that scores what another said."""

    def __init__(self, base: Decoder, adapter: Adapter, dtype: jnp.dtype, end: int):
        self._base, self._adapter, self._dtype, self._end = base, adapter, dtype, end
        self._mesh = one_device_mesh()

    def __call__(self, prompt: Sequence[int], said: Sequence[int], targets: Sequence[int] | None = None) -> Scores:
        """Scores of `said` after `prompt`; of other tokens at the same places where there are `targets`, [n + 1]."""
        ids, count = [*prompt, *said], len(said) + 1
        width, cfg = width_of(len(ids)), self._base.cfg
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(ids)] = ids
        segments = (np.arange(width, dtype=np.int32) < len(ids)).astype(np.int32)[None]
        places = -(-count // CHUNK) * CHUNK
        at = np.minimum(np.arange(places, dtype=np.int32) + len(prompt) - 1, len(ids) - 1).astype(np.int32)
        wanted = np.full(places, self._end, np.int32)
        wanted[:count] = [*said, self._end] if targets is None else targets
        device = self._mesh.devices.flat[0]
        _, kernel = attention.choose("auto", device, cfg.head_dim, width, self._dtype, True, cfg.attention_softcap)
        with jax.set_mesh(self._mesh):
            found = _scores(
                self._base, self._adapter, jnp.asarray(tokens), jnp.asarray(segments), jnp.asarray(at),
                jnp.asarray(wanted), kernel=kernel, dtype=self._dtype,
            )  # fmt: skip
        logs, best, top = (np.asarray(each)[:count] for each in found)
        return Scores(logs, best, top)


@partial(jax.jit, static_argnames=("kernel", "dtype"))
def _scores(
    base: Decoder,
    adapter: Adapter,
    tokens: jax.Array,
    segments: jax.Array,
    at: jax.Array,
    wanted: jax.Array,
    *,
    kernel: Any,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    with products_in(dtype):
        hidden = base.hidden(
            tokens,
            positions,
            segments,
            adapter=adapter,
            dropout_key=None,
            neftune_noise_alpha=0.0,
            attention=kernel,
            remat="none",
            dtype=dtype,
        )[0]

        def scored(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            places, targets = part
            logs = jax.nn.log_softmax(base.logits(hidden[places][None], adapter)[0].astype(jnp.float32))
            of_targets = jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0]
            return of_targets, logs.argmax(axis=1).astype(jnp.int32), logs.max(axis=1)

        found = jax.lax.map(scored, (at.reshape(-1, CHUNK), wanted.reshape(-1, CHUNK)))
    logs, best, top = (each.reshape(-1) for each in found)
    return logs, best, top
