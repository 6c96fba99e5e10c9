"""`jlora export`: the adapter of any step, a merged base, and what it refuses before it writes."""

import json
import shutil

import pytest
from command_line import one_sentence
from safetensors.numpy import load_file
from tiny import copy_folder, make_llama, make_tokenizer

from jlora.files import manifest


def test_export_of_the_adapter(world, here, tmp_path):
    code, out, err = here("export", "--adapter", world / "run", "--out", tmp_path / "a", "--verify", "--json", "-q")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["kind"], result["step"], result["out"]) == ("adapter", 4, str(tmp_path / "a"))
    assert result["logits_relative_difference"] <= 1e-6 and result["peft_relative_difference"] <= 1e-4
    ours, final = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "a", world / "run" / "adapter")
    )
    assert ours.keys() == final.keys() and all((ours[name] == final[name]).all() for name in ours)


def test_export_of_an_earlier_step(world, here, tmp_path):
    code, out, _ = here("export", "--adapter", world / "run", "--out", tmp_path / "deep" / "a", "--step", 2)
    assert code == 0 and "step 2" in out and str(tmp_path / "deep" / "a") in out
    name = "adapter_model.safetensors"
    early, final = load_file(tmp_path / "deep" / "a" / name), load_file(world / "run" / "adapter" / name)
    assert any((early[key] != final[key]).any() for key in final)


def test_export_of_the_best_step(world, here, tmp_path):
    """By held-out loss, not by its number; a run that has none says so."""
    run = copy_folder(world / "run", tmp_path / "run")
    for step, loss in ((2, 1.0), (4, 2.0)):
        folder = run / "checkpoints" / str(step)
        manifest.write(folder, manifest.read(folder) | {"eval_loss": loss})
    code, out, err = here("export", "--adapter", run, "--out", tmp_path / "best", "--step", "best", "--json", "-q")
    assert (code, err) == (0, "") and json.loads(out)["step"] == 2
    for step in (2, 4):
        manifest.write(run / "checkpoints" / str(step), {"step": step, "eval_loss": None})
    code, _, err = here("export", "--adapter", run, "--out", tmp_path / "none", "--step", "best")
    assert code == 4 and "no checkpoint has a held-out loss" in one_sentence(err)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_export_is_a_base_of_its_own(world, here, tmp_path, dtype):
    out = tmp_path / "merged"
    code, printed, err = here(
        "export", "--adapter", world / "run", "--out", out, "--merge", "--dtype", dtype, "--json", "-q"
    )
    assert (code, err) == (0, "")
    assert json.loads(printed)["dtype"] == dtype
    assert {p.name for p in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    code, printed, _ = here(
        *("evaluate", "--base", out, "--data", world / "eval.jsonl", "--format", "alpaca", "--max-length", 320),
        *("--dtype", "float32", "--json"),
    )
    summary = json.loads((world / "run" / "summary.json").read_text())
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert json.loads(printed)["loss"] == pytest.approx(summary["eval_loss"], rel=tolerance)


def test_quiet_export_prints_nothing(world, here, tmp_path):
    assert here("export", "--adapter", world / "run", "--out", tmp_path / "a", "-q") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "expected", "words"),
    [
        (["--adapter", "{tmp}/none"], 4, "not a run folder"),
        (["--adapter", "{world}/base"], 4, "not a run folder"),
        (["--adapter", "{world}/run", "--step", "3"], 4, "no checkpoint of step 3; it has 2, 4"),
        (["--adapter", "{world}/run", "--step", "0"], 4, "no checkpoint of step 0"),
        (["--adapter", "{world}/run", "--step", "last"], 2, "--step"),
        (["--adapter", "{world}/run", "--merge", "--verify"], 2, "leave --merge out"),
        (["--adapter", "{world}/run", "--out", "{world}/base"], 2, "exists and is not an empty folder"),
        (["--adapter", "{world}/run", "--out", "{world}/rows.jsonl"], 2, "exists and is not an empty folder"),
        (["--adapter", "{world}/run", "--out", "{world}/rows.jsonl/out"], 2, "cannot be made"),
    ],
)
def test_bad_export(world, here, tmp_path, arguments, expected, words):
    before = sorted(path.name for path in (world / "base").iterdir())
    arguments = [argument.format(world=world, tmp=tmp_path) for argument in arguments]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    code, out, err = here("export", *arguments)
    assert (code, out) == (expected, "") and words in one_sentence(err)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (world / "base").iterdir()) == before


def test_export_of_a_run_whose_base_has_changed(world, here, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    make_llama(tmp_path / "base", seed=1)
    make_tokenizer(tmp_path / "base")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(world / "base"), str(tmp_path / "base")))
    code, _, err = here("export", "--adapter", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 4 and "another base" in one_sentence(err)


def test_damaged_checkpoint_is_not_exported(world, here, tmp_path):
    """The newest gives way to the one before, with a word; one that is asked for by its step is refused."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    [array] = [file for file in (run / "checkpoints" / "4" / "state").rglob("d/*")][:1]
    array.write_bytes(array.read_bytes()[:-1])
    code, _, err = here("export", "--adapter", run, "--step", 4, "--out", tmp_path / "out")
    assert code == 4 and "checkpoints/4: the checkpoint is damaged (state/" in one_sentence(err)
    assert not (tmp_path / "out").exists()
    code, out, err = here("export", "--adapter", run, "--out", tmp_path / "out")
    assert code == 0 and "of step 2" in out
    assert "checkpoints/4: the checkpoint is damaged" in err and "passed over; step 2 is taken" in err
    assert (run / "checkpoints" / "4").is_dir() and not (run / "quarantine").exists()


def test_a_moved_base_is_named(world, here, tmp_path):
    """A run folder that was taken elsewhere, without its base at the same path."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(world / "base"), str(tmp_path / "gone")))
    code, _, err = here("export", "--adapter", run, "--out", tmp_path / "a", "-q")
    assert code == 4 and "gone: no such folder" in err and "say where it lies with --base" in err
    assert here("export", "--adapter", run, "--out", tmp_path / "a", "--base", world / "base", "-q") == (0, "", "")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(world / "base")


@pytest.mark.parametrize("flags", [("--combination", "cat"), ("--rank", 2), ("--dtype", "float16")])
def test_flags_that_do_not_apply_are_refused(world, here, tmp_path, flags):
    code, _, err = here("export", "--adapter", world / "run", "--out", tmp_path / "a", *flags)
    assert code == 2 and flags[0] in err and not (tmp_path / "a").exists()


def test_a_finished_run_without_its_weights_writes_them_again(world, here, tmp_path):
    """A run folder that was copied, but for the large file."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    weights = run / "adapter" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    code, _, err = here("train", "--config", world / "config.yaml", f"output_dir={run}", "-q")
    assert (code, err) == (0, "") and weights.read_bytes() == before
