"""Preference rows with several rejected answers, with scores of answers, and as other trainers have them."""

import json

import pytest
from chat_templates import answer, encode, ours, shown, user
from data_files import jsonl, section, write

from jlora.config import Config
from jlora.data.checks import check_rows
from jlora.data.encoding import read_data, tokenize
from jlora.data.formats import rows_of
from jlora.data.pairs import pairs_of
from jlora.data.row import BadRow, Row
from jlora.errors import DataError

TEXTS = {"prompt": "1+1=", "chosen": " 2", "rejected": [" 3", " 4", " 11"]}
ASKED = [user("1+1?")]
QWEN = "qwen2_5"


def pairs(tmp_path, rows, tokenizer, **changes):
    """A file of rows, tokenised."""
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    return tokenize(str(path), tokenizer, section(format="preference", **changes))


def same(found, expected):
    assert [example.second for example in found.examples] == [example.second for example in expected.examples]
    for ours_, theirs in zip(found.examples, expected.examples, strict=True):
        assert ours_.ids.tolist() == theirs.ids.tolist() and ours_.trained.tolist() == theirs.trained.tolist()


def test_each_rejected_text_becomes_a_pair(tmp_path, tokenizer):
    apart = [TEXTS | {"rejected": each} for each in TEXTS["rejected"]]
    found, expected = (pairs(tmp_path, rows, tokenizer) for rows in ([TEXTS, apart[0]], [*apart, apart[0]]))
    same(found, expected)
    assert found.read == 4 and found.digest == expected.digest
    names = [f"rows.jsonl:1, rejected {number}" for number in (1, 2, 3)]
    assert [*found.places] == [*names, "rows.jsonl:2"]


@pytest.mark.parametrize("prompt", [ASKED, None])
def test_each_rejected_list_of_turns_becomes_a_pair(tmp_path, prompt):
    before = [] if prompt else ASKED
    row = {"chosen": [*before, answer("2")], "rejected": [[*before, answer("3")], [*before, answer("4")]]}
    row |= {"prompt": prompt} if prompt else {}
    apart = [row | {"rejected": each} for each in row["rejected"]]
    found, expected = (pairs(tmp_path, rows, ours(QWEN), max_length=400) for rows in ([row], apart))
    same(found, expected)
    assert len(found.examples) == 2
    _, rejected = found.examples[1].sequences()
    assert shown(QWEN, rejected).endswith("<|im_start|>assistant\n⟦4<|im_end|>\n⟧")


@pytest.mark.parametrize("rejected", [answer("3"), [answer("3")], [[answer("3")]]])
def test_one_turn_stands_for_a_list_of_it(tmp_path, rejected):
    """As LLaMA-Factory's rows have it."""
    expected = pairs(
        tmp_path, [{"prompt": ASKED, "chosen": [answer("2")], "rejected": [answer("3")]}], ours(QWEN), max_length=400
    )
    found = pairs(
        tmp_path, [{"prompt": ASKED, "chosen": answer("2"), "rejected": rejected}], ours(QWEN), max_length=400
    )
    same(found, expected)
    assert [*found.places] == ["rows.jsonl:1"]


def test_two_turns_are_one_answer():
    """Of which one may be a tool's, and so no list of two answers."""
    row = {"prompt": ASKED, "chosen": [answer("2")], "rejected": [answer("3"), user("No."), answer("4")]}
    assert [*pairs_of(Row("x", row))] == [Row("x", row)]


def test_a_bad_answer_of_several_is_named_and_dropped_alone(tmp_path, tokenizer):
    row = TEXTS | {"rejected": [" 3", " 2", 7, " "]}
    with pytest.raises(DataError, match=r'rows.jsonl:1, rejected 2: the fields "chosen" and "rejected" are equal'):
        pairs(tmp_path, [row], tokenizer)
    found = pairs(tmp_path, [row], tokenizer, on_bad_row="skip")
    assert found.dropped == {"equal_answers": 1, "wrong_type": 1, "empty_response": 1} and len(found.examples) == 1
    with pytest.raises(DataError, match='rows.jsonl:1: the field "rejected" holds no answer'):
        pairs(tmp_path, [TEXTS | {"rejected": []}], tokenizer)


def test_what_is_no_row_of_pairs_stays_as_it_is():
    objects = {"chosen": {"answer": "a"}, "rejected": {"answer": "b"}}
    for value in (
        BadRow("x", "y"),
        {"prompt": "a"},
        {"chosen": "a", "rejected": None},
        {"chosen": 1, "rejected": "b"},
        objects,
    ):
        (row,) = pairs_of(Row("x", value))
        assert row.value is value or row.value == value


def test_scores_and_margins_are_read_past(tmp_path, tokenizer):
    """As in TRL's DPOTrainer, whose losses have no margin."""
    rows = [TEXTS | {"chosen_score": 9.5, "rejected_score": [4, 3, 1], "margin": 0.5, "score_chosen": 1}]
    path = str(write(tmp_path / "rows.jsonl", jsonl(rows)))
    data = {"train": path, "format": "preference", "max_length": 64}
    cfg = Config.model_validate({"data": data, "model": {"path": "x"}, "output_dir": "y", "objective": {"name": "dpo"}})
    found, _ = read_data(cfg, tokenizer)
    same(found, pairs(tmp_path, [TEXTS], tokenizer, max_length=64))
    assert check_rows(cfg, found, None) == []


def test_names_of_argilla(tmp_path, tokenizer):
    row = {"instruction": TEXTS["prompt"], "chosen_response": " 2", "rejected_response": " 3"}
    found = pairs(tmp_path, [row], tokenizer)
    same(found, pairs(tmp_path, [TEXTS | {"rejected": " 3"}], tokenizer))
    assert found.renamed[("chosen_response", "chosen")] == 1


def test_tools_beside_a_pair_are_read(tmp_path):
    from chat_templates import TOOLS

    row = {"prompt": ASKED, "chosen": [answer("2")], "rejected": [answer("3")], "tools": json.dumps(TOOLS)}
    found = pairs(tmp_path, [row], ours(QWEN), max_length=2000)
    assert not found.unused and '"weather"' in shown(QWEN, found.examples[0])
    rows = [row.value for row in rows_of(str(tmp_path / "rows.jsonl"), section(format="preference"))]
    assert rows[0]["tools"] == row["tools"]
    assert (
        encode(ours(QWEN), {"messages": [*ASKED, answer("2")], "tools": TOOLS}).ids.tolist()
        == found.examples[0].sequences()[0].ids.tolist()
    )
