"""scripts/rows_benchmark: both sides make the same tokens of the same rows, and what it prints is what was measured."""

import json
import sys

import pytest
from chat_templates import SHAPES, tokenizer_folder
from load_script import load_script

rows_benchmark = load_script("rows_benchmark")


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["rows_benchmark", "--tokenizer", str(tokenizer_folder("<|im_end|>")), *arguments])
    return rows_benchmark.main()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_both_sides_have_the_same_tokens(monkeypatch, capsys):
    assert run(monkeypatch, "--rows", "60", "--length", "4096", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    ours, theirs = found["jlora"], found["datasets"]
    assert ours["ids"] == theirs["ids"] and ours["tokens"] == theirs["tokens"] > 0
    assert ours["rows"] == theirs["rows"] == found["rows"] == 60
    assert found["ratio"] == theirs["seconds"] / ours["seconds"] and min(ours["peak"], theirs["peak"]) > 2**25
    rows_benchmark.show(found)
    out = capsys.readouterr().out
    assert f"{60 / ours['seconds']:7,.0f} rows/s" in out and "60 rows" in out


def test_sides_that_differ_are_refused(monkeypatch, tmp_path):
    told = iter([{"ids": "a", "tokens": 1, "seconds": 1.0}, {"ids": "b", "tokens": 1, "seconds": 1.0}])
    monkeypatch.setattr(rows_benchmark, "measure", lambda *_: next(told))
    with pytest.raises(rows_benchmark.ConfigError, match="the two sides have other tokens"):
        run(monkeypatch, "--rows", "3", "--folder", str(tmp_path))


def test_rows_have_every_shape():
    rows = list(rows_benchmark.make_rows(300, 0))
    assert rows == list(rows_benchmark.make_rows(300, 0))
    lengths = {len(row["messages"]) for row in rows}
    keys = {key for row in rows for turn in row["messages"] for key in turn}
    assert lengths == {2, 3, 4, 6} and {"tool_calls", "reasoning_content"} <= keys
    assert {turn["role"] for row in rows for turn in row["messages"]} == {"system", "user", "assistant", "tool"}
    assert sum("tools" in row for row in rows) > 10 and set(rows[0]) <= set(SHAPES["tools"])
