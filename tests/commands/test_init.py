"""`jlora init`: the config that it writes for rows, and what it says of rows that no config fits."""

import json
import re
import shutil

import pytest
from command_line import one_sentence

from jlora.config import load_config
from jlora.data.formats import COLUMNS, columns_of, format_of

ROWS = {
    "alpaca": {"instruction": "Say blue.", "output": "blue."},
    "completion": {"prompt": "a:", "completion": " bcd"},
    "text": {"text": "abc abc"},
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    "preference": {"prompt": "a:", "chosen": " b", "rejected": " c"},
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def many(format, mark):
    """80 rows that differ in their last column."""
    last, value = list(ROWS[format].items())[-1]
    return [ROWS[format] | {last: f"{value} {n}{mark[:1]}"} for n in range(80)]


@pytest.mark.parametrize("format", ROWS)
def test_a_row_is_of_the_format_that_reads_it(format):
    assert format_of(ROWS[format]) == format and set(COLUMNS[format]) <= ROWS[format].keys()
    assert format_of(ROWS[format] | {"id": 7, "input": ""}) == format


def test_a_row_is_of_the_format_whose_columns_are_given():
    turns = {"dialog": ROWS["messages"]["messages"]}
    assert format_of(turns) is None and format_of(turns, given={"messages": "dialog"}) == "messages"
    assert format_of({"q": "a", "r": "b"}, given={"prompt": "q", "completion": "r"}) == "completion"
    assert format_of({"q": "a", "output": "b"}, given={"instruction": "q"}) == "alpaca"


def test_a_row_of_no_format():
    assert format_of({"title": "a", "body": "b", "output": None}) is None
    assert columns_of({str(n): n for n in range(9)}) == "0, 1, 2, 3, 4, 5, 6, 7, ..." and columns_of({}) == "no column"


@pytest.mark.long
@pytest.mark.parametrize("format", ["alpaca", "completion", "text", "preference"])
def test_the_config_trains_as_it_stands(world, here, tmp_path, monkeypatch, format):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.jsonl", many(format, ""))
    code, out, err = here("init", "--data", "mine.jsonl", "--base", world / "base")
    assert (code, err) == (0, "") and "80 rows" in out and "jlora train mine.yaml" in out
    cfg = load_config("mine.yaml")
    assert (cfg.data.format, cfg.data.eval, cfg.output_dir) == (format, 0.1, "runs/mine")
    assert cfg.objective.name == ("dpo" if format == "preference" else "sft")
    assert cfg.data.max_length == (256 if format == "alpaca" else 128)  # the least that holds every row
    assert cfg.training.samples == 3 and cfg.training.exports_best and cfg.model.dtype == "float32"
    code, out, err = here("data", "mine.yaml", "--json", "--rows", 0)
    found = json.loads(out)
    assert code == 0 and found["ok"]
    assert cfg.training.epochs == 10 or found["steps"] >= 100
    code, out, err = here("train", "mine.yaml", "-q", "training.max_steps=2", "training.evals_per_epoch=9")
    assert (code, err) == (0, "")


def test_held_out_rows_of_ones_own_and_a_name(world, here, tmp_path):
    out = tmp_path / "run.yaml"
    rows, held_out = (write(tmp_path / name, many("completion", name)) for name in ("rows.jsonl", "others.jsonl"))
    arguments = ("--data", rows, "--base", world / "base", "--eval", held_out, "--out", out)
    assert here("init", *arguments, "-q") == (0, "", "")
    assert load_config(out).data.eval == str(held_out)
    before = out.read_bytes()
    code, _, err = here("init", *arguments)
    assert code == 2 and "is there already" in one_sentence(err) and out.read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "code", "words"),
    [
        ([{"title": "a", "body": "b"}], 3, "has the columns title, body"),
        ([ROWS["alpaca"], ROWS["text"]], 3, ":2: is of format text, the rows before it of alpaca"),
        ([[1, 2], "text"], 3, "none of the first rows"),
        ([ROWS["messages"]] * 3, 2, "chat template"),
    ],
)
def test_rows_that_no_config_fits(world, here, tmp_path, rows, code, words):
    path = write(tmp_path / "rows.jsonl", rows)
    given = here("init", "--data", path, "--base", world / "base", "--out", tmp_path / "out.yaml")
    assert given[0] == code and words in one_sentence(given[2])
    assert not (tmp_path / "out.yaml").exists()


def test_columns_of_other_names_are_said_by_a_flag(world, here, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"q": f"Say {n}.", "reply": f"{n}.", "topic": "a"} for n in range(30)])
    arguments = ("--data", path, "--base", world / "base", "--out", tmp_path / "out.yaml")
    code, _, err = here("init", *arguments)
    assert code == 3 and "lack instruction and output" in err
    columns = re.search(r"such as --columns (\S+),", err)[1]
    assert columns == "instruction=q,output=reply"
    shown = here("init", *arguments[:-1], tmp_path / "shown.yaml", "--columns", columns)
    assert shown[0] == 0 and "note: the rows' own columns are not read: topic; " in shown[1]
    assert here("init", *arguments, "--columns", columns, "-q") == (0, "", "")
    cfg = load_config(tmp_path / "out.yaml")
    assert (cfg.data.format, cfg.data.columns) == ("alpaca", {"instruction": "q", "output": "reply"})
    assert here("data", tmp_path / "out.yaml", "-q") == (0, "", "")
    for given, code, words in (
        ("output=answer_text", 3, 'has no column "answer_text" (--columns output=answer_text); it has q, reply, topic'),
        ("question=q", 2, "no format has question"),
        ("question=q,output=reply", 2, "no format has question; they have"),
        ("q", 2, "not of the form instruction=q,output=reply"),
    ):
        other = here("init", *arguments[:-1], tmp_path / "other.yaml", "--columns", given)
        assert other[0] == code and words in one_sentence(other[2])


def test_lines_of_the_config_say_what_holds(world, here, tmp_path):
    """Steps an epoch times epochs, how few rows choose the best, and the rate of a small base."""
    write(tmp_path / "rows.jsonl", many("completion", "")[:30])
    out = tmp_path / "out.yaml"
    assert here("init", "--data", tmp_path / "rows.jsonl", "--base", world / "base", "--out", out, "-q")[0] == 0
    text, cfg = out.read_text(encoding="utf-8"), load_config(out)
    each, total = (
        int(re.search(words, text)[1]) for words in (r"about (\d+) steps an epoch", r"(\d+) optimizer steps")
    )
    assert abs(each * cfg.training.epochs - total) <= cfg.training.epochs / 2
    assert "a noisy choice by 3 rows" in text and cfg.optimizer.learning_rate == 1e-3


def test_what_is_missing_is_asked_for_on_a_terminal_alone(here):
    code, _, err = here("init")
    assert code == 2 and "--data is missing" in one_sentence(err)


def test_a_missing_field_names_those_there_are(world, here, tmp_path):
    write(tmp_path / "rows.jsonl", [ROWS["completion"]])
    code, _, err = here("train", world / "config.yaml", f"data.train={tmp_path}/rows.jsonl", f"output_dir={tmp_path}/r")
    assert code == 3
    assert '"instruction" is missing (it has prompt, completion; data.format=completion reads' in one_sentence(err)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_base_that_was_published_in_nf4_stays_so(world, here, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    config["quantization_config"] = packed
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    write(tmp_path / "mine.jsonl", many("completion", ""))
    assert here("init", "--data", "mine.jsonl", "--base", "base")[0] == 0
    assert load_config("mine.yaml").model.quantization == (kind if kind == "nf4" else None)
