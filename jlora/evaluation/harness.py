"""A jlora model for EleutherAI's lm-evaluation-harness, so that its tasks run on a base with an adapter.

`lm_eval.simple_evaluate(model=JloraLM("BASE", adapter="RUN"), tasks=[...])`. Needs the extra `harness`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jlora.data.packing import Batch, pack_row
from jlora.data.prompts import Example
from jlora.errors import ConfigError, DataError, with_extra
from jlora.inference.answers import answer, batches_of_like
from jlora.inference.model import open_adapted
from jlora.model import attention
from jlora.model.sharding import one_device_mesh, place_rows
from jlora.training.step import Forward

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError:
    LM, register_model = None, None

# Of a model whose config does not say; the harness's own choice.
DEFAULT_LENGTH, DEFAULT_NEW_TOKENS = 2048, 256


def require_harness() -> None:
    """Refuse to go on without the harness.

    Raises:
      ConfigError: lm_eval is not installed.
    """
    if LM is None:
        raise ConfigError(f"the harness needs lm_eval, which is not installed; pip install {with_extra('harness')}")


class JloraLM(LM or object):  # type: ignore[misc]
    """A base, with or without an adapter, on one device.

    Text is tokenised as it was for training: BOS where the tokenizer adds it. What is longer than the model's positions
    loses its beginning. Tasks are answered greedily.
    """

    def __init__(
        self,
        base: str,
        adapter: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        max_length: int | None = None,
        batch_size: int | str = 8,
        **others: Any,
    ):
        """Open and load.

        Args:
          base, adapter, tokenizer, chat_template, dtype, quantization: as the arguments of `jlora.generate`; what is
            not given is as the adapter's run had it.
          max_length: most tokens of context and continuation; default: the model's positions.
          batch_size: requests computed together.
          others: `device` and `max_batch_size`, which the harness gives to every model; they change nothing here.

        Raises:
          UserError: see `jlora.errors`.
        """
        require_harness()
        super().__init__()
        if unknown := set(others) - {"device", "max_batch_size"}:
            raise ConfigError(
                f"jlora's model takes no argument {sorted(unknown)[0]}; see jlora.evaluation.harness.JloraLM"
            )
        given = {"tokenizer": tokenizer, "chat_template": chat_template, "dtype": dtype, "quantization": quantization}
        self.model, self._mesh = open_adapted(base, adapter, **given), one_device_mesh()
        pretrained = self.model.pretrained
        positions = pretrained.source.config.get("max_position_embeddings", DEFAULT_LENGTH)
        self.max_length, self.batch_size = int(max_length or positions), int(batch_size)
        self.tokenizer = pretrained.tokenizer
        # What stands before a text that has nothing before it.
        self._first = [self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id]
        if beyond := self.tokenizer.beyond(self._first):
            raise DataError(f"what stands before each text of a task: {beyond}")
        self._steps: dict[int, Callable[..., Any]] = {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, in nats, and whether it is the greedy one."""
        parts = []
        for context, continuation in (request.args for request in requests):
            # A space goes with the word behind it.
            bare = context.rstrip()
            if bare:
                parts.append((self._encode(context + continuation), len(self._encode(bare))))
            else:
                parts.append((self._first + self._without_bos(context + continuation), 1))
        found = self._score(parts)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text after BOS (or EOS, without one), in windows of the model's length."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        parts, counts = [], []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self._without_bos(text), self._first[0], self.max_length - 1, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            parts += [(context + predicted, len(context)) for context, predicted in pairs]
            counts.append(len(pairs))
        scores, found = iter(self._score(parts)), []
        for request, count in zip(requests, counts, strict=True):
            found.append(float(sum(next(scores)[0] for _ in range(count))))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to the first of its stop texts.

        Raises:
          ConfigError: a task asks for sampling.
        """
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for number, (_, asked) in enumerate(request.args for request in requests):
            if asked.get("do_sample") and asked.get("temperature", 1.0) > 0:
                raise ConfigError("jlora answers the harness's tasks greedily; set --gen_kwargs do_sample=false")
            until = asked.get("until") or []
            until = (until,) if isinstance(until, str) else tuple(until)
            most = next((asked[k] for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if k in asked), None)
            groups.setdefault((until, int(most or DEFAULT_NEW_TOKENS)), []).append(number)
        texts: dict[int, str] = {}
        for (until, most), members in groups.items():
            room = max(1, self.max_length - most)
            prompts = [(self._encode(requests[i].args[0]) or self._first)[-room:] for i in members]
            with jax.set_mesh(self._mesh):
                answers = answer(self.model, prompts, max_new_tokens=most, batch_size=self.batch_size, until=until)
            texts.update(zip(members, answers.texts, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, by the tokenizer's template."""
        return self.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, for the harness's log."""
        return self.tokenizer.chat_template or ""

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from others in the harness's caches."""
        return f"jlora-{self.tokenizer.digest}"

    def _encode(self, text: str) -> list[int]:
        ids = self._ids(text)
        has_bos = ids[:1] == [self.tokenizer.bos_id]
        return [*self._first, *ids] if self.tokenizer.add_bos and not has_bos else ids

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if beyond := self.tokenizer.beyond(ids):
            raise DataError(f"a text of the task: {beyond}")
        return ids

    def _without_bos(self, text: str) -> list[int]:
        ids = self._ids(text)
        return ids[ids[:1] == [self.tokenizer.bos_id] :]

    def _score(self, parts: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Of (ids, start): log-probability of the ids from `start` on, and whether each of them is the likeliest."""
        cut = [(ids[-self.max_length :], max(1, start - max(0, len(ids) - self.max_length))) for ids, start in parts]
        found: dict[int, tuple[float, bool]] = {}
        for width, members in batches_of_like([len(ids) for ids, _ in cut], self.batch_size):
            found.update(zip(members, self._score_batch([cut[i] for i in members], width), strict=True))
        return [found[i] for i in range(len(cut))]

    def _score_batch(self, parts: list[tuple[list[int], int]], width: int) -> list[tuple[float, bool]]:
        rows = [
            pack_row([Example(np.asarray(ids, np.int32), np.arange(len(ids)) >= start)], width) for ids, start in parts
        ]
        rows += [pack_row([], width)] * (self.batch_size - len(rows))
        base, dtype = self.model.pretrained.base, self.model.dtype
        if width not in self._steps:
            device, head_dim = self._mesh.devices.flat[0], base.cfg.head_dim
            _, kernel = attention.choose("auto", device, head_dim, width, dtype, True, base.cfg.attention_softcap)
            self._steps[width] = jax.jit(Forward(kernel, "none", dtype).by_token)
        with jax.set_mesh(self._mesh):
            names = Batch.__annotations__
            batch = {n: place_rows(np.stack([row[n] for row in rows]), self._mesh) for n in names}  # type: ignore[literal-required]
            logs, right = map(np.asarray, self._steps[width](base, self.model.adapter, batch))
        counts = [len(ids) - start for ids, start in parts]
        return [(float(logs[i].sum(dtype=np.float64)), bool(right[i].sum() == count)) for i, count in enumerate(counts)]


if register_model is not None:
    register_model("jlora")(JloraLM)
