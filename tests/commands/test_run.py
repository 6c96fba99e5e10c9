"""A run as a user sees it: what it prints, and what its folder holds."""

import json
import math
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml
from command_line import one_sentence
from safetensors.numpy import load_file

from jlora.config import load_config


def test_run_prints_one_json_object_and_nothing_else(world):
    assert (world / "stderr").read_text() == ""
    printed = (world / "stdout").read_text()
    assert printed.count("\n") == 1 and printed.endswith("\n")
    assert json.loads(printed) == json.loads((world / "run" / "summary.json").read_text())


def test_run_folder(world):
    run = world / "run"
    assert load_config(run / "config.yaml") == load_config(world / "config.yaml")
    assert set(yaml.safe_load((run / "config.yaml").read_text())["training"]) > {"seed", "log_every"}  # resolved
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir()) == ["2", "4"]
    assert {p.name for p in (run / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "provenance.json",
    }
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "</html>" in page
    assert not list(run.glob("*.partial"))


def test_checkpoints_hold_the_adapter_alone(world):
    base = (world / "base" / "model.safetensors").stat().st_size
    for step in ("2", "4"):
        size = sum(p.stat().st_size for p in (world / "run" / "checkpoints" / step).rglob("*") if p.is_file())
        assert size < base / 2


def test_metrics_file(world):
    lines = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert line.keys() >= {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"}
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values())
    assert [line["tokens"] for line in steps] == sorted({line["tokens"] for line in steps})
    evals = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evals] == [0, 2, 4]
    for line in evals:
        assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))


def test_samples_before_and_after(world):
    """The first held-out rows, answered by the base and by what was trained, in the run folder and in its report."""
    samples = json.loads((world / "run" / "samples.json").read_text(encoding="utf-8"))["samples"]
    first = json.loads((world / "eval.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert len(samples) == 2 and all(
        sample.keys() == {"prompt", "turns", "wanted", "before", "after", "cut"} for sample in samples
    )
    # A random base ends no answer, and rows are whole here.
    assert all(sorted(sample["cut"]) == ["after", "before"] for sample in samples)
    assert ["Instruction", first["instruction"]] in samples[0]["turns"]
    assert first["instruction"] in samples[0]["prompt"] and first["output"] not in samples[0]["prompt"]
    assert first["output"] in samples[0]["wanted"]
    assert [sample["before"] for sample in samples] != [sample["after"] for sample in samples]
    page = (world / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<h3>Before</h3>") == page.count("<h3>In the data</h3>") == 2


def test_report_again_and_of_two_runs(world, here, tmp_path):
    code, out, err = here("report", world / "run", "--out", tmp_path / "one.html")
    assert (code, out.strip(), err) == (0, str(tmp_path / "one.html"), "")
    assert (tmp_path / "one.html").read_bytes() == (world / "run" / "report.html").read_bytes()
    code, out, err = here("report", world / "run", world / "run")
    assert code == 2 and "--out FILE" in one_sentence(err)
    code, out, err = here("report", world / "eval.jsonl")
    assert code == 2 and "--out FILE" in one_sentence(err)
    code, out, err = here("report", *[world / "eval.jsonl"] * 5, "--out", tmp_path / "page.html")
    assert code == 2 and "at most 4" in one_sentence(err)
    code, out, err = here("report", world / "base")
    assert code == 2 and "is not a run folder" in one_sentence(err)
    code, out, err = here("report", world / "runn")
    assert code == 2 and f"no such folder; did you mean {world / 'run'}?" in one_sentence(err)
    code, out, err = here("report", world / "run", "--out", tmp_path / "none" / "one.html")
    assert code == 2 and "none" in one_sentence(err)


def test_summary(world):
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 4
    assert summary["rows"] == {"read": 24, "used": 24, "dropped": {}, "truncated": 0, "eval": 6}
    assert summary["trainable_params"] == sum(
        array.size for array in load_file(world / "run" / "adapter" / "adapter_model.safetensors").values()
    )
    assert summary["frozen_params"] == sum(a.size for a in load_file(world / "base" / "model.safetensors").values())
    assert summary["hashes"].keys() == {"base", "tokenizer", "data", "eval"}
    assert all(len(value) == 64 for value in summary["hashes"].values())
    for key in ("train_loss", "eval_loss_before", "eval_loss", "wall_seconds", "tokens_per_second"):
        assert math.isfinite(summary[key]) and summary[key] > 0, key
    assert summary["eval_loss"] < summary["eval_loss_before"]
    assert summary["tokens"]["total"] > 0 and summary["peak_memory_bytes"]["host"] > 0
    assert summary["versions"].keys() >= {"jax", "flax", "python"} and summary["device"]


def test_run_that_is_done_is_done_again_at_once(world, here, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    arguments = ("train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run")
    code, out, err = here(*arguments)
    assert code == 0
    assert f"{tmp_path}/run: this run is finished" in err
    for words in ("held-out loss", f"adapter: {tmp_path}/run/adapter", f"report: {tmp_path}/run/report.html"):
        assert words in out, words
    code, out, err = here(*arguments, "--json", "-q")
    assert (code, err) == (0, "")
    summary, before = json.loads(out), json.loads((world / "stdout").read_text())
    assert summary == before | {"adapter": f"{tmp_path}/run/adapter"}


def test_loss_that_is_not_finite(world, here, tmp_path):
    code, out, err = here(
        *("train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run", "-q", "data.eval=null"),
        *("optimizer.learning_rate=1e30", "training.max_nonfinite_steps=0"),
    )
    assert (code, out) == (6, "")
    message = one_sentence(err)
    assert err.count("\n") == 1
    assert "training.max_nonfinite_steps=0" in message and "optimizer.learning_rate" in message


@pytest.mark.long
def test_a_fresh_run_keeps_the_one_before_beside_it(world, here, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    before = {path.relative_to(run) for path in run.rglob("*")} - {Path(".lock")}
    arguments = ("train", world / "config.yaml", f"output_dir={run}", "training.max_steps=2", "-q")
    code, _, err = here(*arguments)
    assert code in (2, 4) and "error: " in err
    for number in (1, 2):
        code, out, err = here(*arguments, "--fresh")
        assert (code, out) == (0, "") and f"is in {run}.before-{number} now" in err
        assert json.loads((run / "summary.json").read_text())["steps"] == 2
    aside = tmp_path / "run.before-1"
    assert {path.relative_to(aside) for path in aside.rglob("*")} == before
    assert (aside / "summary.json").read_bytes() == (world / "run" / "summary.json").read_bytes()


def test_fresh_moves_nothing_but_a_run(world, here, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear", encoding="utf-8")
    arguments = ("train", world / "config.yaml", f"output_dir={tmp_path}/mine", "--fresh", "-q")
    code, _, err = here(*arguments)
    assert code == 2 and "holds files, but no run" in one_sentence(err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_runs_are_listed_the_newest_first(world, here, tmp_path):
    for name, age in (("old", 100), ("sweep/new", 0)):
        shutil.copytree(world / "run", tmp_path / name)
        changed = time.time() - age
        os.utime(tmp_path / name / "metrics.jsonl", (changed, changed))
    (tmp_path / "sweep" / "new" / "summary.json").write_text("[" * 10_000, encoding="utf-8")
    (tmp_path / "link").symlink_to(world / "run")
    code, out, err = here("runs", tmp_path, "--json")
    listed = json.loads(out)
    assert (code, err) == (0, "") and [run["run"] for run in listed] == [f"{tmp_path}/sweep/new", f"{tmp_path}/old"]
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert [run["status"] for run in listed] == ["stopped", "finished"]
    for key in ("steps", "eval_loss", "eval_loss_before", "train_loss"):
        assert listed[0][key] == listed[1][key] == summary[key], key
    assert (listed[1]["method"], listed[1]["wall_seconds"]) == ("lora", summary["wall_seconds"])
    code, out, _ = here("runs", tmp_path)
    assert code == 0 and out.index("sweep/new") < out.index(f"{tmp_path}/old") and f"{summary['eval_loss']:.4f}" in out
    assert here("runs", tmp_path / "none")[0] == 2
    assert here("runs", world / "base")[:2] == (0, f"no run in {world}/base\n")
