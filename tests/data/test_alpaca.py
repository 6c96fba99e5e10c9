"""Columns beside instruction, input and output, and prompts of preference rows in every form that people have."""

import numpy as np
import pytest
from tiny import make_tokenizer

from jlora.config import Counted
from jlora.data.alpaca import PREAMBLE, PREAMBLE_WITH_INPUT, stanford_prompt
from jlora.data.formats import Columns
from jlora.data.prompts import encode_pair, encode_row, reference_answer, shown_prompt
from jlora.data.row import BadRow
from jlora.data.tokens import load_tokenizer

ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}
COUNTED = Counted("response", "turn", "keep")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_tokenizer(folder)
    return load_tokenizer(folder, "llama2")


def encoded(tokenizer, row, format, prompt):
    example = encode_row(tokenizer, row, format=format, prompt=prompt, counted=COUNTED)
    return example.ids.tolist(), example.trained.tolist()


def test_stanfords_prompts():
    """As tatsu-lab/stanford_alpaca has them; a system text takes the place of the preamble, as in LLaMA-Factory."""
    assert (
        stanford_prompt(ROW) == f"{PREAMBLE_WITH_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert stanford_prompt(ROW | {"input": " "}) == f"{PREAMBLE}\n\n### Instruction:\nAdd.\n\n### Response:"
    assert stanford_prompt(ROW | {"system": "Be brief.", "input": None}) == (
        "Be brief.\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    assert stanford_prompt(ROW | {"system": "", "history": []}) == stanford_prompt(ROW)
    with pytest.raises(BadRow, match='"history" holds earlier turns, which only data.prompt=chat writes'):
        stanford_prompt(ROW | {"history": [["a", "b"]]})


def test_system_and_history_are_turns_of_a_chat(chat):
    row = ROW | {"system": "Be brief.", "history": [["1 1?", "2"], ("And 2 2?", "4")]}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert encoded(chat, row, "alpaca", "chat") == encoded(chat, {"messages": turns}, "messages", "chat")
    assert shown_prompt(row, format="alpaca") == "Add.\n\n1 2"


@pytest.mark.parametrize("history", ["a", [["a"]], [["a", 1]], [{"a": "b"}], [["a", "b", "c"]]])
def test_history_that_is_none(chat, history):
    with pytest.raises(BadRow, match='the field "history" is'):
        encoded(chat, ROW | {"history": history}, "alpaca", "chat")


ASKED = [{"role": "user", "content": "1 1?"}]
GOOD, BAD = [{"role": "assistant", "content": "2"}], [{"role": "assistant", "content": "3"}]


def test_prompt_that_the_answers_repeat_is_there_once(chat):
    once = encode_pair(chat, {"prompt": ASKED, "chosen": GOOD, "rejected": BAD})
    for row in (
        {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"prompt": "1 1?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    ):
        for ours, theirs in zip(encode_pair(chat, row), once, strict=True):
            np.testing.assert_array_equal(ours.ids, theirs.ids)
            np.testing.assert_array_equal(ours.trained, theirs.trained)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": 7, "chosen": " a", "rejected": " b"}, 'the field "prompt" is int, not str'),
        ({"prompt": ASKED, "chosen": " a", "rejected": " b"}, 'the field "prompt" is list, not str'),
        ({"prompt": {"a": 1}, "chosen": GOOD, "rejected": BAD}, 'the field "prompt" is dict, not list'),
        ({"prompt": "1 1?", "chosen": GOOD, "rejected": BAD}, 'the field "prompt" is str, but the answers are turns'),
        ({"prompt": "1 1?", "chosen": GOOD[0], "rejected": BAD[0]}, "is str, but the answers are turns"),
        ({"prompt": "1 1?", "chosen": {"answer": "2"}, "rejected": {}}, 'the field "chosen" is dict, not str'),
    ],
)
def test_prompt_of_another_type_is_not_thrown_away(chat, row, words):
    with pytest.raises(BadRow, match=words):
        encode_pair(chat, row)


THEIRS = {"conversations": [{"from": "human", "value": "1 1?"}]}
THEIRS |= {"chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"}}


@pytest.mark.parametrize(
    "row",
    [
        THEIRS,
        {"messages": ASKED, "chosen": GOOD[0], "rejected": BAD[0]},
        {"prompt": ASKED, "chosen": GOOD[0], "rejected": BAD[0]},
        {"prompt": ASKED, "conversations": "of another", "chosen": GOOD[0], "rejected": BAD},
    ],
)
def test_answers_that_are_single_turns(chat, row):
    """LLaMA-Factory's and Axolotl's pairs: the turns before, and one turn for each answer."""
    read = Columns("preference", {}).read(row)
    once = encode_pair(chat, {"prompt": ASKED, "chosen": GOOD, "rejected": BAD})
    for ours, theirs in zip(encode_pair(chat, read), once, strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.trained, theirs.trained)
    assert reference_answer(read, format="preference") == "2"


def test_turns_beside_whole_answers_are_no_prompt():
    """They are often the chosen conversation again, which would then stand twice."""
    row = {"messages": ASKED + GOOD, "chosen": ASKED + GOOD, "rejected": ASKED + BAD}
    columns = Columns("preference", {})
    assert columns.read(row) == row and columns.unused == {"messages": 1}
