"""Columns under the names that published data sets have for them, and those that a format does not read."""

import numpy as np
import pytest
from data_files import jsonl, section, write

from jlora.config import Config
from jlora.data.checks import check_rows
from jlora.data.encoding import read_data, tokenize
from jlora.data.formats import Columns, format_of
from jlora.data.row import BadRow
from jlora.errors import ConfigError

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
# Name, format, and a row as published; the row that it stands for.
PUBLISHED = {
    "gsm8k": ("alpaca", {"question": "Add.", "answer": "3"}, {"instruction": "Add.", "output": "3"}),
    "dolly": ("alpaca", {"instruction": "Add.", "context": "1 2", "response": "3", "category": "qa"}, ALPACA),
    "squad": ("alpaca", {"question": "Add.", "context": "1 2", "answer": "3", "id": 7}, ALPACA),
    "query": ("alpaca", {"query": "Add.", "response": "3"}, {"instruction": "Add.", "output": "3"}),
    "prompt_response": ("completion", {"prompt": "1:", "response": " a"}, {"prompt": "1:", "completion": " a"}),
    "question": ("completion", {"question": "1:", "answer": " a"}, {"prompt": "1:", "completion": " a"}),
    "content": ("text", {"content": "a b"}, {"text": "a b"}),
    "conversation": (
        "sharegpt",
        {"conversation": [{"from": "human", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
    ),
    "orca": (
        "preference",
        {"question": "1:", "chosen": " a", "rejected": " b"},
        {"prompt": "1:", "chosen": " a", "rejected": " b"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_row_under_other_names_is_the_row_under_the_own_ones(tmp_path, tokenizer, name):
    format, theirs, own = PUBLISHED[name]
    columns = Columns(format, {})
    read = columns.read(theirs)
    assert {key: value for key, value in read.items() if key in own} == own
    assert sum(columns.renamed.values()) == sum(theirs.get(key) != value for key, value in own.items())
    if name != "conversation":  # which needs a chat template
        cfg = section(format=format, max_length=320)
        found = [
            tokenize(str(write(tmp_path / f"{i}.jsonl", jsonl([row]))), tokenizer, cfg).examples[0]
            for i, row in enumerate((theirs, own))
        ]
        np.testing.assert_array_equal(found[0].ids, found[1].ids)
        np.testing.assert_array_equal(found[0].trained, found[1].trained)


def test_column_of_its_own_name_comes_first():
    row = ALPACA | {"question": "another", "response": "another"}
    columns = Columns("alpaca", {})
    read = columns.read(row)
    assert {key: read[key] for key in ALPACA} == ALPACA
    assert not columns.renamed and columns.unused == {"question": 1, "response": 1}


def test_mapping_that_is_asked_for(tmp_path, tokenizer):
    rows = [{"ask": "Add.", "reply": "3", "instruction": "not this"}]
    given = {"instruction": "ask", "output": "reply"}
    columns = Columns("alpaca", given)
    assert columns.read(rows[0]) == {"instruction": "Add.", "output": "3"}
    with pytest.raises(BadRow, match=r'the field "reply" \(data.columns.output\) is missing \(it has ask\)'):
        columns.read({"ask": "a"})
    with pytest.raises(ConfigError, match=r"data.columns.answer: data.format=alpaca reads instruction, output"):
        Columns("alpaca", {"answer": "a"})
    swapped = Columns("completion", {"prompt": "completion", "completion": "prompt"})
    assert swapped.read({"prompt": "a", "completion": "b"}) == {"prompt": "b", "completion": "a"}
    path = str(write(tmp_path / "rows.jsonl", jsonl(rows)))
    cfg = {"data": {"train": path, "columns": given, "max_length": 320}, "model": {"path": "x"}, "output_dir": "y"}
    data, _ = read_data(Config.model_validate(cfg), tokenizer)
    assert len(data.examples) == 1 and check_rows(Config.model_validate(cfg), data, None) == []


def test_row_of_another_format_is_left_to_it():
    """Else rows of prompt and completion would get Stanford's prompt, which is the default."""
    for format, row in (
        ("alpaca", {"prompt": "a", "completion": "b"}),
        ("completion", {"instruction": "a", "output": "b"}),
    ):
        assert Columns(format, {}).read(row) is row


def test_row_that_lacks_a_column_keeps_its_own_names_for_the_message():
    row = {"question": "a"}
    assert Columns("alpaca", {}).read(row) is row
    with pytest.raises(BadRow, match=r'"output" is missing \(it has question, label; .* data.columns.output=label\)'):
        Columns("alpaca", {}).read({"question": "a", "label": "b"})


@pytest.mark.parametrize("name", ["image", "images", "videos", "audio"])
def test_pictures_and_sounds_are_refused(name):
    with pytest.raises(BadRow, match=f'the field "{name}" holds no text'):
        Columns("alpaca", {}).read(ALPACA | {name: ["a.png"]})
    assert Columns("alpaca", {}).read(ALPACA | {name: []})["output"] == "3"


def test_format_by_its_columns():
    assert {name: format_of(theirs) for name, (_, theirs, _) in PUBLISHED.items() if name != "question"} == {
        name: format for name, (format, _, _) in PUBLISHED.items() if name != "question"
    }
    assert format_of({"question": "a", "answer": "b"}) == "alpaca"
    assert format_of({"title": "a"}) is None


@pytest.mark.parametrize("turns", [[None], [5], ["from here"], [], 5, "role"], ids=repr)
def test_turns_that_are_none_tell_of_no_format(turns):
    """As a campaign found: a row is refused where it is read, not where its format is guessed."""
    assert format_of({"messages": turns}) == "messages"
    assert format_of({"messages": [turns, {"from": "human", "value": "a"}]}) == "sharegpt"


def test_what_was_read_under_another_name_or_left_is_told_with_its_count(tmp_path, tokenizer):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"question": f"{i}", "answer": "3", "tools": ["a"] * (i % 2), "note": "x"} for i in range(5)]
    write(folder / "train.jsonl", jsonl(rows))
    write(folder / "test.jsonl", jsonl(rows[:2]))
    write(folder / "old.xls", b"")
    data = {"train": str(folder), "eval": str(folder), "eval_split": "test", "max_length": 320}
    sentences = []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):  # tokenised, kept, and taken from there
        cfg = Config.model_validate({"data": data | {"cache_dir": cache}, "model": {"path": "x"}, "output_dir": "y"})
        checks = check_rows(cfg, *read_data(cfg, tokenizer))
        sentences.append([f"{found.level}: {found.sentence}" for found in checks])
    assert sentences[0] == sentences[1] == sentences[2]
    said = "\n".join(sentences[0])
    assert 'note: data.train: the column "question" is read as instruction (in 5 rows); set data.columns.instr' in said
    assert (
        'warning: data.train: 2 of 5 rows (40 %) have something in the column "tools", which data.format=alpaca' in said
    )
    assert f"note: data.train: {folder}: 2 files not read: old.xls, test.jsonl" in said
    assert "data.eval: 2 of 2 sequences are in data.train too" in said and "note" not in said.split("\n")[0][:3]
    assert [line for line in sentences[0] if line.startswith("error")]  # held-out rows that are all trained on
