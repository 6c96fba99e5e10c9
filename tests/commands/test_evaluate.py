"""`jlora evaluate` gives the losses that the run itself reported."""

import json
import math

import pytest
from command_line import shell


@pytest.mark.long
def test_evaluate_gives_the_final_loss_of_the_run(world):
    done = shell(
        *("evaluate", "--base", world / "base", "--adapter", world / "run", "--data", world / "eval.jsonl", "--json")
    )
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result.keys() >= {"loss", "perplexity", "tokens", "rows"}
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert result["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["rows"] == 6
    # Every byte of an output, and EOS.
    outputs = [json.loads(line)["output"] for line in (world / "eval.jsonl").read_text().splitlines()]
    assert result["tokens"] == sum(len(text) + 1 for text in outputs)


def test_evaluate_without_the_adapter_gives_the_loss_before(world, here):
    code, out, err = here(
        *("evaluate", "--base", world / "base", "--data", world / "eval.jsonl"),  # alpaca, by its columns
        *("--dtype", "float32", "--max-length", 320, "--json", "-q"),
    )
    assert (code, err) == (0, "")
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert json.loads(out)["loss"] == pytest.approx(summary["eval_loss_before"], rel=1e-5)


@pytest.mark.long
def test_evaluate_for_people_and_its_options(world, here):
    common = ("evaluate", "--base", world / "base", "--adapter", world / "run", "--data", world / "eval.jsonl")
    code, out, _ = here(*common)
    assert code == 0 and "loss " in out and "perplexity " in out and "6 rows" in out
    response = json.loads(here(*common, "--json")[1])
    whole = json.loads(here(*common, "--json", "--train-on", "all")[1])
    assert whole["tokens"] > 10 * response["tokens"] and whole["loss"] != response["loss"]


def test_evaluate_counts_what_it_drops(world, here, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((world / "eval.jsonl").read_text() + "{\n" + json.dumps({"instruction": "a"}) + "\n")
    code, out, _ = here(
        *("evaluate", "--base", world / "base", "--adapter", world / "run", "--data", rows),
        *("--on-bad-row", "skip", "--json"),
    )
    result = json.loads(out)
    assert (code, result["rows"]) == (0, 6)
    assert result["dropped"] == {"malformed_json": 1, "missing_field": 1}


def test_rows_of_another_format_are_told_by_the_commands_own_flag(world, here, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Say", "completion": " blue."}) + "\n", encoding="utf-8")
    common = ("evaluate", "--base", world / "base", "--adapter", world / "run", "-q", "--data", rows)
    code, out, err = here(*common)
    assert (code, out) == (3, "") and "; --format completion reads such rows" in err
    assert "data.format" not in err and "skip" not in err  # of which all are bad
    rows.write_text((world / "eval.jsonl").read_text() + "{\n", encoding="utf-8")
    assert here(*common)[2].endswith("fix it, or drop such rows (--on-bad-row skip)\n")


@pytest.mark.long
def test_without_a_run_rows_are_read_by_their_columns(world, here, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Say", "completion": " blue."}) + "\n", encoding="utf-8")
    common = ("evaluate", "--base", world / "base", "--data", rows, "--dtype", "float32", "--json", "-q")
    found = here(*common)
    assert found[0] == 0 and found == here(*common, "--format", "completion")
    asked = ("generate", "--base", world / "base", "--max-new-tokens", 2, "--dtype", "float32", "--prompts", rows)
    rows.write_text(json.dumps({"instruction": "Say blue."}) + "\n", encoding="utf-8")
    found = here(*asked)
    assert found[0] == 0 and found[2].startswith("format alpaca,") and found == here(*asked, "--format", "alpaca")
