"""Input made up at random, and campaigns of it: whatever stands in a file, a command ends well or in one sentence.

A target is a strategy of inputs, what a command does with one, and the error that it may end in.
"""

import json
import os
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

from jlora.errors import ConfigError, UserError

Target = tuple[st.SearchStrategy, Callable[[Any], None], type[UserError]]

FEW, MANY, PARTS = 100, int(os.environ.get("JLORA_FUZZ_COUNT", "10_000")), 4
SEED = int(os.environ.get("JLORA_FUZZ_SEED", "0"))
# Of processor time for one input, and of memory for all: far more than they take, far less than a bomb.
MOST_SECONDS, MOST_MEBIBYTES = 10.0, 512

# What parsers are known to stumble over.
EVIL_NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0, 1e-320, float("nan"), float("inf")]
EVIL_TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "\udcff",
    "﻿",
    "../x",
    "/etc/passwd",
    "{{ 1/0 }}",
    "<s>",
    "</s>",
    "é" * 40,
    "a" * 300,
]
EVIL_BYTES = [
    *(b"\0", b"\xff", b"\xc3(", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r", b'"', b"'", b"\\", b"\\ud800", b"\\u0000"),
    *(b"[", b"]", b"{", b"}", b",", b":", b"[" * 3000, b'{"a":' * 3000, b"7" * 5000, b"NaN", b"-Infinity", b"1e999"),
    *(b"null", b"true", b"&a ", b"*a", b"!!python/name:os.system ", b"!!int ", b"? ", b"- ", b"<<: ", b"2020-99-99"),
    *(b"\t", b"---\n", b"...", b"|", b">", b"%", b"@", b"`", b"0b", b"0x", b"1:99", b"=", b"~"),
]


def words(*known: str) -> st.SearchStrategy[str]:
    return st.sampled_from([*known, *EVIL_TEXTS]) | st.text(st.characters(exclude_categories=[]), max_size=12)


def values(*known: str) -> st.SearchStrategy:
    """JSON, most of it not what is expected."""
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(EVIL_NUMBERS) | words(*known)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words(*known), inner, max_size=3),
        max_leaves=6,
    )


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes with a few of them replaced, left out, said twice, or strange ones put in."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 1, 2]))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.integers(0, 8)))
        new = draw(st.sampled_from(EVIL_BYTES) | st.binary(max_size=4) | st.just(content[at : at + 40] * 2))
        content = content[:at] + new + content[to:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 29)) == 0 else content


@st.composite
def changed(draw, tree):
    """A tree of JSON with a few values replaced, added or left out, at any depth."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        inner = tree
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = draw(st.sampled_from(keys)) if keys else "new"
            below = inner[key] if keys else None
            if isinstance(below, dict | list) and below and draw(st.booleans()):
                inner = below
                continue
            break
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace" if keys:
                inner[key] = draw(values(*map(str, keys)))
            case "remove" if keys:
                del inner[key]
            case _ if isinstance(inner, dict):
                inner[draw(words("r", "dtype", "shape", "data", "model", "bias"))] = draw(values())
            case _:
                inner.append(draw(values()))
    return tree


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def hang(*_):
    raise AssertionError("an input took a minute")


def campaign(name: str, target: Target, count: int, number: int = 0) -> str:
    """Use so many inputs, the same ones for a number; returns the line of figures."""
    inputs, use, error = target
    codes: Counter[int] = Counter()
    longest = 0.0

    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    @seed(number)
    @given(inputs)
    def one(drawn):
        nonlocal longest
        began = time.process_time()
        signal.alarm(60)
        try:
            use(drawn)
            codes[0] += 1
        except UserError as told:
            assert isinstance(told, error | ConfigError)
            assert "\n" not in " ".join(str(told).splitlines()) and len(str(told)) < 5000
            codes[told.exit_code] += 1
        finally:
            signal.alarm(0)
        longest = max(longest, time.process_time() - began)
        assert longest < MOST_SECONDS

    before = signal.signal(signal.SIGALRM, hang)
    start = peak()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HypothesisWarning)  # an input too large for its report is no fault of ours
            one()
    finally:
        signal.signal(signal.SIGALRM, before)
    grown = peak() - start
    assert grown < MOST_MEBIBYTES
    # A few may be alike by chance: what is drawn for a seed depends on the modules that happen to be loaded.
    assert count == FEW or codes[0] and codes[error.exit_code], "all alike: the inputs say nothing"
    ends = ", ".join(f"exit {code}: {number}" for code, number in sorted(codes.items()))
    figures = f"0 tracebacks, 0 hangs, longest {longest:.2f} s, +{grown} MiB"
    return f"{name}, seed {number}: {codes.total()} inputs ({ends}), {figures}"
