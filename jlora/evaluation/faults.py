"""Which fault of a server explains what it says: each is computed by the run's own model, and the nearest is named.

A server that puts a second BOS before a prompt says what the run's model says after two; one that leaves the adapter
out says what the base says. So nothing is guessed from texts: the model is run as the server would be with the fault,
and what comes out is compared with what the server said.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jlora.evaluation.served import Ended, Observed, Scorer, Scores, Seen
from jlora.files.text import counted

# A fault explains what is left of at most this share of the difference without it.
EXPLAINS = 0.5
# How many times the difference that rounding makes in jlora another's rounding to as many bits may make.
ALIKE = 3.0
# Nats a token beyond which what is served is another model, however it came about.
MOST_ROUNDED = 1.0
# A prompt of which a server counts fewer tokens than this share is cut.
WHOLE = 0.9
# Lengths that a context may have which a server does not tell.
CONTEXTS = tuple(2**k for k in range(8, 18))
# An end that the model gives less than this log-probability comes too early, and of so many answers in all it counts.
UNLIKELY, FEW = -3.0, 0.25
# One that it gives at least this, or that is likelier than what was said by so much, is missed where a server goes on.
LIKELY, CLEAR = -0.7, 1.0


class Fault(NamedTuple):
    """What is wrong, as one of a few names and as a sentence."""

    name: str
    says: str


@dataclass
class Verdict:
    """What was found.

    Attributes:
      faults: none where the server serves what was trained.
      difference, of_base: nats a token between what the server says and what the trained model says, and the base.
      compared: "log-probabilities", or "texts" where the server gives none: then it is how much likelier the model's
        own next token is than the server's.
      tokens: compared. agreeing: share of them that are the trained model's own choice.
      prefixes: of completions and of chats, the change to the prompt that fits best: "", "bos_added" or "bos_missing".
      loss: of the rows' own tokens by the server, the trained model and the base, where the server gives them.
      notes: what is worth knowing and is no fault.
    """

    faults: list[Fault] = field(default_factory=list)
    difference: float | None = None
    of_base: float | None = None
    compared: str = "log-probabilities"
    tokens: int = 0
    agreeing: float | None = None
    adapted: bool = True
    prefixes: dict[bool, str] = field(default_factory=dict)
    loss: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)


class Judge:
    """Compares a server's answers with those of the models of a run."""

    def __init__(
        self,
        trained: Scorer,
        base: Scorer,
        rounded: Callable[[str], Scorer],
        bos: int | None,
        stops: Sequence[int],
        quantization: str | None,
        bound: float,
    ):
        """Nothing is computed yet.

        Args:
          trained, base: the run's model, and it without the adapter.
          rounded: it with the base held as "int8", "int4" or "none"; the one before is let go.
          quantization: how the run held its base. bound: nats a token within which the server is right.
        """
        self._models = {True: trained, False: base}
        self._rounded, self._bos, self._stops = rounded, bos, [*stops]
        self._quantization, self._bound = quantization, bound
        self._known: dict[tuple[int, bool, str], Scores] = {}

    def judge(self, seen: Seen) -> Verdict:
        """The faults that explain what was seen."""
        found = Verdict()
        self._context(seen, found)
        kept = [one for one in seen.observed if id(one) not in self._cut]
        main = [one for one in kept if not one.chat] or kept
        chats = [one for one in kept if one.chat]
        if not main or not sum(len(one.said) for one in main):
            self._stopping(seen.ended, main, found)
            if not found.faults:
                found.faults.append(Fault("no_answer", "the server answers no row with a token that can be compared"))
            return found
        if any(one.logprobs is None for one in main):
            found.compared = "texts"
        found.difference, found.tokens = self._difference(main, True, ""), sum(len(one.said) for one in main)
        found.of_base, found.agreeing = self._difference(main, False, ""), self._agreeing(main)
        found.adapted, prefix = self._nearest(main, (True, False))
        rest = self._difference(main, found.adapted, prefix)
        found.prefixes[main[0].chat] = prefix
        if chats and main is not chats and not main[0].chat:
            _, found.prefixes[True] = self._nearest(chats, (found.adapted,))
        if not found.adapted:
            found.faults.append(Fault("adapter", "the adapter is not applied: the answers are the base's"))
        self._begins(seen, found, chats[0].chat if chats else main[0].chat)
        self._template(chats, main, rest, found)
        self._weights(main, rest, found)
        if not found.faults and found.of_base * EXPLAINS < rest:
            gap = f"{found.of_base:.4f}"
            found.faults.append(
                Fault(
                    "unclear",
                    f"the base alone says nearly the same on these rows ({gap} nats a token off), so they do not show "
                    "that the adapter is applied; ask for more rows with --rows, or train longer",
                )
            )
        if not any(fault.name == "other_base" for fault in found.faults):  # whose ends nobody knows
            self._stopping(seen.ended, kept, found)
        self._losses(seen, found, rest)
        return found

    # What a prompt may have become on its way.

    def _prefixed(self, prompt: list[int], change: str) -> list[int]:
        if change == "bos_added" and self._bos is not None:
            return [self._bos, *prompt]
        if change == "bos_missing":
            return prompt[1:]
        return prompt

    def _changes(self, observed: Sequence[Observed]) -> list[str]:
        """Those that are possible for all prompts."""
        if self._bos is None:
            return [""]
        begun = all(one.prompt[0] == self._bos and len(one.prompt) > 1 for one in observed)
        return ["", "bos_added", *["bos_missing"] * begun]

    def _scores(self, one: Observed, adapted: bool, change: str) -> Scores:
        key = id(one), adapted, change
        if key not in self._known:
            self._known[key] = self._models[adapted](self._prefixed(one.prompt, change), one.said)
        return self._known[key]

    def _difference(self, observed: Sequence[Observed], adapted: bool, change: str) -> float:
        """Mean over all tokens."""
        gaps = [_gaps(one, self._scores(one, adapted, change)) for one in observed]
        return float(np.concatenate(gaps).mean()) if sum(map(len, gaps)) else 0.0

    def _agreeing(self, observed: Sequence[Observed]) -> float:
        right = [np.asarray(one.said) == self._scores(one, True, "").best[:-1] for one in observed]
        return float(np.concatenate(right).mean())

    def _nearest(self, observed: Sequence[Observed], models: Sequence[bool]) -> tuple[bool, str]:
        """The model and the prefix that fit best, or the first model with none where no other is much nearer."""
        plain = self._difference(observed, models[0], "")
        changes = self._changes(observed)
        if plain <= self._bound:  # where a changed prompt makes little difference, the server's own count tells it
            more = {0 if one.prompt_tokens is None else one.prompt_tokens - len(one.prompt) for one in observed}
            told = {frozenset({1}): "bos_added", frozenset({-1}): "bos_missing"}.get(frozenset(more))
            models, changes = models[:1], [change for change in changes if change in ("", told)]
        tried = [(adapted, change) for adapted in models for change in changes]
        found = min(tried, key=lambda each: self._difference(observed, *each))
        return found if self._difference(observed, *found) < EXPLAINS * plain else (models[0], "")

    # The faults, one by one.

    def _context(self, seen: Seen, found: Verdict) -> None:
        """Prompts that the server does not take whole."""
        self._cut: set[int] = set()
        told: list[str] = []
        for one in seen.observed:
            length, count = len(one.prompt), one.prompt_tokens
            lengths = [count] if count is not None else [n for n in CONTEXTS if n < length]
            short = count is not None and not one.chat and count < WHOLE * length
            plain = min(_mean(one, self._scores(one, adapted, "")) for adapted in (True, False))
            if not short and (plain <= self._bound or not one.said):
                continue
            for kept in lengths:
                if kept >= length - 1:
                    continue
                last = one.prompt[-kept:]
                if short or min(_mean(one, self._models[a](last, one.said)) for a in (True, False)) < EXPLAINS * plain:
                    self._cut.add(id(one))
                    told.append(f"the server saw {kept} of the {length:,} tokens of a prompt")
                    break
        if seen.refused:
            said = f" ({seen.refused[0][1]})" if seen.refused[0][1] else ""
            told.insert(0, f"{counted(len(seen.refused), 'row')} too long for the server's context{said}")
        if told:
            found.faults.append(
                Fault(
                    "context", f"the context is cut: {told[0]}; serve it with a longer one, as long as data.max_length"
                )
            )

    def _begins(self, seen: Seen, found: Verdict, chat: bool) -> None:
        """BOS, where the server itself begins the prompt."""
        prefix = found.prefixes.get(chat, "")
        told = next((one for one in seen.observed if one.chat == chat and one.prompt_tokens is not None), None)
        numbers = (
            "" if told is None else f" (it counts {told.prompt_tokens} tokens where training has {len(told.prompt)})"
        )
        if prefix == "bos_missing":
            found.faults.append(
                Fault(
                    "bos_missing",
                    f"BOS is missing: the server begins prompts without the token that training has{numbers}",
                )
            )
        elif prefix == "bos_added":
            begun = told is not None and told.prompt[0] == self._bos
            what = "BOS is double: the server puts a second one before the prompt" if begun else (
                "the server puts a BOS before the prompt, which training does not have"
            )  # fmt: skip
            found.faults.append(Fault("bos_double", f"{what}{numbers}"))

    def _template(self, chats: list[Observed], main: list[Observed], rest: float, found: Verdict) -> None:
        """Chats that fit no prompt of the training, where completions fit."""
        if not chats or main[0].chat:
            return
        left = self._difference(chats, found.adapted, found.prefixes[True])
        if left <= max(self._bound, 2 * rest):
            return
        one = next((one for one in chats if one.prompt_tokens not in (None, len(one.prompt))), None)
        numbers = (
            "" if one is None else f": its prompt has {one.prompt_tokens} tokens where training has {len(one.prompt)}"
        )
        found.faults.append(
            Fault(
                "template",
                f"the chat template differs from that of the training{numbers} (chats are {left:.3f} nats a token off, "
                f"completions of the same text {rest:.3f})",
            )
        )

    def _weights(self, main: list[Observed], rest: float, found: Verdict) -> None:
        """What is left once the adapter and the prompt are as the server has them: other weights."""
        if rest <= self._bound:
            return
        change = found.prefixes[main[0].chat]
        if self._quantization is not None:
            other = self._rounded("none")
            left = float(
                np.concatenate([_gaps(o, other(self._prefixed(o.prompt, change), o.said)) for o in main]).mean()
            )
            if left < EXPLAINS * rest:
                found.faults.append(
                    Fault(
                        "unrounded",
                        f"the base is not held in {self._quantization}, over which the adapter was trained ({rest:.3f} "
                        f"nats a token off, {left:.3f} from the base as it was published); serve what jlora export "
                        "--merge writes",
                    )
                )
                return
        sizes = {}
        for bits, kind in ((8, "int8"), (4, "int4")):
            sizes[bits] = self._rounding(main, found.adapted, change, self._rounded(kind))
            if rest <= min(ALIKE * sizes[bits], MOST_ROUNDED):
                found.faults.append(
                    Fault(
                        "rounded",
                        f"the base is rounded: {rest:.3f} nats a token off, as rounding to {bits} bits makes it "
                        f"(jlora's own: {sizes[bits]:.3f}); serve more bits, or raise --bound",
                    )
                )
                return
        if found.faults and found.faults[-1].name == "template":
            return
        found.faults = [fault for fault in found.faults if fault.name != "adapter"]  # the base is not near, either
        found.faults.append(
            Fault(
                "other_base",
                f"another base: {rest:.3f} nats a token off, more than rounding explains (to 4 bits: {sizes[4]:.3f}), "
                "and no other fault does; see which base the server loaded",
            )
        )

    def _rounding(self, main: Sequence[Observed], adapted: bool, change: str, rounded: Scorer) -> float:
        """The difference that a rounding makes, measured as that of the server."""
        gaps = []
        for one in main:
            prompt, plain = self._prefixed(one.prompt, change), self._scores(one, adapted, change)
            other = rounded(prompt, one.said)
            if one.logprobs is None:  # what the rounded model would say instead, by the plain one
                chosen = self._models[adapted](prompt, one.said, other.best.tolist())
                gaps.append((plain.top - chosen.logs)[:-1])
            else:
                gaps.append(np.abs(plain.logs - other.logs)[:-1])
        return float(np.concatenate(gaps).mean())

    def _stopping(self, ended: Sequence[Ended], observed: Sequence[Observed], found: Verdict) -> None:
        """Ends that the server does not see, or that only it sees."""
        model, change = self._models[found.adapted], found.prefixes.get(False, "")
        missed = due = 0  # answers that the model would end here
        for each in ended:
            scores = model(self._prefixed(each.ids, change), [])
            if int(scores.best[0]) in self._stops and scores.top[0] > LIKELY:
                due, missed = due + 1, missed + (not each.stopped)
        early = 0
        for one in observed:
            scores = self._scores(one, found.adapted, found.prefixes.get(one.chat, ""))
            stops, ends = np.isin(scores.best, self._stops), np.isin(one.said, self._stops)
            stops[: len(one.said)] &= (scores.top - scores.logs)[:-1] > CLEAR  # not what rounding may put before it
            says_it = ends[:-1].any() or (ends[-1:].any() and one.goes_on)
            past = bool(says_it or stops[:-1].any() or (stops[-1] and scores.top[-1] > LIKELY and one.goes_on))
            due, missed = due + (past or bool(stops[-1])), missed + past
            over = not one.cut and not one.goes_on and not {*one.said} & {*self._stops}
            early += bool(over and scores.logs[-1] < UNLIKELY and int(scores.best[-1]) not in self._stops)
        if missed > due / 2:
            found.faults.append(
                Fault(
                    "stop", f"the stop token is not one for the server: it goes on behind {counted(missed, 'answer')}"
                )
            )
        elif early > FEW * len(observed):
            found.faults.append(
                Fault("stop", f"the server stops {counted(early, 'answer')} where the model would go on")
            )

    def _losses(self, seen: Seen, found: Verdict, rest: float) -> None:
        """The rows' own tokens, where the server scores them."""
        if not seen.echoed:
            return
        theirs: list[np.ndarray] = []
        ours: list[np.ndarray] = []
        base: list[np.ndarray] = []
        for each in seen.echoed:
            places = np.asarray(each.at) - 1  # the first id is predicted from nothing
            theirs.append(np.asarray(each.logprobs))
            for adapted, into in ((True, ours), (False, base)):
                into.append(self._models[adapted](each.ids[:1], each.ids[1:]).logs[places])
        server, trained, bare = (np.concatenate(each) for each in (theirs, ours, base))
        nearest = trained if found.adapted else bare
        if np.abs(server - nearest).mean() > max(self._bound, 3 * rest):
            found.notes.append(
                "the server's log-probabilities of prompts do not fit its own answers, so they are not counted"
            )
            return
        found.loss = {"server": -float(server.mean()), "trained": -float(trained.mean()), "base": -float(bare.mean())}


def _gaps(one: Observed, scores: Scores) -> np.ndarray:
    """Nats at each token between a server and a model, [n]."""
    if one.logprobs is None:
        return (scores.top - scores.logs)[:-1]
    return np.abs(np.asarray(one.logprobs, np.float64) - scores.logs[:-1])


def _mean(one: Observed, scores: Scores) -> float:
    return float(_gaps(one, scores).mean()) if one.said else 0.0
