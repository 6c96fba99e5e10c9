"""Held-out sequences that are nearly training ones: found, told apart from templates, and shown in pairs."""

import json
import time
import tracemalloc

import numpy as np
import pytest
from data_files import jsonl, write
from tiny import make_llama, make_tokenizer, write_config

from jlora.config import load_config
from jlora.data import near
from jlora.data.dataset import View
from jlora.data.near import near_copies
from jlora.data.prompts import Example
from jlora.reports.data import look, render

RNG = np.random.default_rng(5)


def example(ids):
    return Example(np.asarray(ids, np.int32), np.arange(len(ids)) > 0)


def words(count):
    return RNG.integers(1000, 30_000, count).tolist()


def groups(ids):
    return {tuple(ids[i : i + near.GROUP]) for i in range(len(ids) - near.GROUP + 1)}


def alike(first, second):
    """The share of groups that both have, exactly."""
    one, other = groups(first), groups(second)
    return len(one & other) / len(one | other)


def changed(ids, count):
    """The same with some tokens changed."""
    ids = list(ids)
    for place in RNG.choice(len(ids), count, replace=False):
        ids[place] = int(RNG.integers(1000, 30_000))
    return ids


def found(train, held, exact=()):
    flags = np.isin(np.arange(len(held)), list(exact))
    return near_copies([example(ids) for ids in train], [example(ids) for ids in held], flags)


def test_what_is_nearly_the_same_is_found_and_nothing_else():
    """The share is MinHash's estimate of the exact one, from 120 hashes: a standard deviation of 0.045 at most."""
    train = [words(int(RNG.integers(20, 120))) for _ in range(600)]
    sources = RNG.choice(600, 200, replace=False)
    held = [changed(train[source], int(RNG.integers(0, 1 + len(train[source]) // 5))) for source in sources]
    shares = [alike(train[source], ids) for source, ids in zip(sources, held, strict=True)]
    got = {pair.held: pair for pair in found(train, held)}
    assert min(shares) < 0.5 and max(shares) == 1.0
    for number, share in enumerate(shares):
        if share > 0.75:
            assert number in got
        if share < 0.45:
            assert number not in got
    assert len(got) > 60
    for number, pair in got.items():
        assert pair.trained == sources[number] and abs(pair.share - shares[number]) < 0.18
    assert np.mean([abs(got[number].share - shares[number]) for number in got]) < 0.04


def test_what_many_rows_begin_with_makes_none_alike():
    """A prompt, a template or a list of tools may be most of every row."""
    prompt = words(300)
    train, held = ([prompt + words(40) for _ in range(count)] for count in (400, 20))
    assert alike(train[0], held[0]) > near.ALIKE and found(train, held) == []
    held[7] = prompt + changed(train[11][300:], 2)
    assert [(pair.held, pair.trained) for pair in found(train, held)] == [(7, 11)]


def test_exact_copies_and_short_rows_are_left_out():
    train = [words(60) for _ in range(50)] + [words(9)]
    held = [train[3], train[4], train[50]]
    assert [pair.held for pair in found(train, held)] == [0, 1]
    assert [pair.held for pair in found(train, held, exact=[0])] == [1]
    assert found(train, held, exact=[0, 1, 2]) == [] and found(train, []) == []
    assert found([[5]], [[5], [6]]) == []


def test_the_first_of_several_is_named():
    row = words(80)
    train = [words(80), changed(row, 1), changed(row, 1), words(80)]
    assert [(pair.held, pair.trained) for pair in found(train, [row])] == [(0, 1)]


def test_beginnings_of_long_rows_are_compared():
    row = words(near.LONGEST)
    (pair,) = found([row + words(5000)], [row + words(9000)])
    assert pair.share == 1.0


class Many(View[Example]):
    """Rows of random tokens, made when asked for; of a number of them, one is a row that all share, little changed."""

    def __init__(self, count, seed, each):
        self.count, self.seed, self.each, self.read = count, seed, each, 0
        self.family = np.random.default_rng(9).integers(1000, 30_000, 60)

    def __len__(self):
        return self.count

    def one(self, index):
        self.read += 1
        draw = np.random.default_rng([self.seed, index])
        if index % self.each:
            return example(draw.integers(1000, 30_000, 60))
        ids = self.family.copy()
        ids[draw.integers(60)] = 7
        return example(ids)


def test_time_and_memory_do_not_grow_with_pairs():
    """All 1,000 held-out rows are nearly each of 32 training rows; training rows are read once, beside a sample."""
    train, held = Many(8_000, 1, 250), Many(1_000, 2, 1)
    tracemalloc.start()
    began = time.process_time()
    got = near_copies(train, held, np.zeros(1_000, bool))
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(got) > 500 and {pair.trained % 250 for pair in got} == {0}
    assert train.read < 1.1 * (8_000 + near.SAMPLE) and peak < 2**28 and seconds < 60


@pytest.fixture
def config(tmp_path):
    make_llama(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    letters = np.random.default_rng(3)

    def text(count):
        return " ".join("".join(map(chr, letters.integers(97, 123, 7))) for _ in range(count))

    rows = [{"prompt": f"{text(3)}:", "completion": f" {text(9)} <b>."} for _ in range(40)]
    held = [
        rows[4] | {"completion": rows[4]["completion"].replace("<b>.", "<i>!")},
        {"prompt": "a:", "completion": " b"},
    ]
    write(tmp_path / "rows.jsonl", jsonl(rows))
    write(tmp_path / "eval.jsonl", jsonl(held))
    data = {"format": "completion", "max_length": 200, "eval": str(tmp_path / "eval.jsonl")}
    return write_config(tmp_path / "c.yaml", tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "run", data=data)


def test_pairs_are_told_and_shown(config, capsys, monkeypatch, tmp_path):
    from jlora.__main__ import main

    seen = look(load_config(config), 1)
    (check,) = [each for each in seen.report["checks"] if each["name"] == "near_overlap"]
    assert (check["level"], check["count"]) == ("warning", 1) and not seen.errors
    assert "1 of 2 sequences are nearly some of data.train, such as eval.jsonl:1 and rows.jsonl:5" in check["sentence"]
    (pair,) = seen.report["near"]
    assert pair["places"] == ["eval.jsonl:1", "rows.jsonl:5"] and pair["share"] > 0.9
    assert pair["texts"][0].endswith(" <i>!") and pair["texts"][1].endswith(" <b>.")
    json.dumps(seen.report["near"])

    page = render("c", seen.report, seen.rows)
    assert "nearly training rows" in page and "<mark>!</mark>" in page and "<mark>.</mark>" in page
    monkeypatch.setattr("sys.argv", ["jlora", "data", str(config)])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "warning: data.eval: 1 of 2 sequences are nearly" in out
    assert "    eval.jsonl:1: " in out and " <b>.\n" in out and "alike, around where they part" in out
