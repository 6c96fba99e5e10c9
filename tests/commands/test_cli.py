"""The commands as a user types them: what they print, where, and with which exit code.

A failure is one sentence on stderr and the exit code of its kind; the commands run in this process, but
for one whole story of subprocesses.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import one_sentence
from safetensors.numpy import load_file
from shared_data import SHARED, needs_data
from tiny import copy_folder, make_llama, make_rows, make_tokenizer, write_config

from jlora import cli
from jlora.config import load_config
from jlora.errors import DataError, MemoryExceeded
from jlora.files import manifest

ROOT = Path(__file__).parents[2]
FLAGS = {
    "train": ["--config", "-q", "--json"],
    "generate": [
        *("--base", "--adapter", "--tokenizer", "--chat-template", "--dtype", "--quantization", "--format"),
        *(
            "--prompt-style",
            "--prompt",
            "--prompts",
            "--chat",
            "--max-new-tokens",
            "--temperature",
            "--top-p",
            "--seed",
        ),
        *("--batch-size", "-q", "--json"),
    ],
    "evaluate": [
        *("--base", "--adapter", "--tokenizer", "--chat-template", "--dtype", "--quantization", "--format"),
        *("--prompt-style", "--data", "--max-length", "--train-on", "--on-bad-row", "--batch-size", "-q", "--json"),
        *("--generate", "--max-new-tokens", "--compare", "--html"),
    ],
    "effort": [
        *("--config", "--base", "--rows", "--shots", "--heldout", "--max-new-tokens", "--batch-size", "--price"),
        *("-q", "--json"),
    ],
    "export": [
        *(
            "--run",
            "--adapters",
            "--base",
            "--combination",
            "--rank",
            "--step",
            "--out",
            "--merge",
            "--dtype",
            "--cost",
            "--verify",
        ),
        *("-q", "--json"),
    ],
    "report": ["--out"],
    "config": ["--schema", "--from", "--devices", "--out", "--json"],
}


def shell(module, *arguments, stdin=None):
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"jlora.{module}", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with a base, rows, a config, and a finished run of it in `run` with what it printed."""
    folder = tmp_path_factory.mktemp("world")
    make_llama(folder / "base", max_position_embeddings=512)
    make_tokenizer(folder / "base")
    make_rows(folder / "rows.jsonl")
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "eval.jsonl").write_text("".join(rows[:6]), encoding="utf-8")
    write_config(
        folder / "config.yaml",
        folder / "base",
        folder / "rows.jsonl",
        folder / "run",
        data={"max_length": 320, "eval": str(folder / "eval.jsonl")},
        training={"save_every": 2, "eval_every": 2, "samples": 2},
    )
    done = shell("train", "--config", folder / "config.yaml", "-q", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    (folder / "stderr").write_text(done.stderr, encoding="utf-8")
    return folder


# Help


@pytest.mark.parametrize("command", FLAGS)
def test_help_lists_every_flag(here, command):
    code, out, err = here(command, "--help")
    assert (code, err) == (0, "")
    for flag in FLAGS[command]:
        assert f" {flag}" in out, flag


def test_no_option_is_abbreviated(capsys):
    """What a script abbreviates would mean something else once an option is added; in scripts/ neither."""
    parser = cli.Parser(prog="jlora")
    parser.add_argument("--config")
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        with pytest.raises(SystemExit) as end:
            parse(["--conf", "c.yaml"])
        assert end.value.code == 2
        assert capsys.readouterr().err == "error: unrecognized arguments: --conf c.yaml; see jlora --help\n"
    files = [path for folder in ("jlora", "scripts") for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", "")}
    made = {path: re.findall(r"argparse\.ArgumentParser\(\s*(\w*)", text) for path, text in texts.items()}
    assert {word for words in made.values() for word in words} == {"allow_abbrev"}


@pytest.mark.parametrize("command", FLAGS)
def test_every_flag_in_the_help_is_known_here(here, command):
    """A new flag belongs in the table above."""
    found = set(re.findall(r"(?<!\S)\W?(--[a-z-]+)", here(command, "--help")[1]))
    assert found <= {*FLAGS[command], "--help", "--quiet"}


def test_console_script_carries_the_commands(here):
    code, out, _ = here("__main__", "--help")
    assert code == 0 and all(command in out for command in FLAGS)
    for command in FLAGS:
        code, out, _ = here("__main__", command, "--help")
        assert (code, all(f" {flag}" in out for flag in FLAGS[command])) == (0, True)
    code, out, _ = here("__main__", "config")
    assert code == 0 and out.startswith("# Configuration reference")


def test_console_script_as_a_program():
    done = shell("__main__", "export", "--run")
    assert done.returncode == 2 and one_sentence(done.stderr) == done.stderr.rstrip("\n")
    assert "argument --run" in done.stderr and "--help" in done.stderr


# A run


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
    assert {p.name for p in (run / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
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
    assert len(samples) == 2 and all(sample.keys() == {"prompt", "wanted", "before", "after"} for sample in samples)
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
    code, out, err = here("report", world / "base")
    assert code == 2 and "is no run folder" in one_sentence(err)
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


# Evaluate


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
        *("evaluate", "--base", world / "base", "--data", world / "eval.jsonl"),  # alpaca, the config's default
        *("--dtype", "float32", "--max-length", 320, "--json", "-q"),
    )
    assert (code, err) == (0, "")
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert json.loads(out)["loss"] == pytest.approx(summary["eval_loss_before"], rel=1e-5)


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


# Generate


def generate(here, world, *arguments, stdin=""):
    code, out, err = here(
        *("generate", "--base", world / "base", "--dtype", "float32", "--max-new-tokens", 8, "-q", *arguments),
        stdin=stdin,
    )
    assert (code, err) == (0, ""), err
    return out


def test_greedy_text_is_the_same_each_time_and_no_seed_matters(world, here):
    texts = {generate(here, world, "--prompt", "Say blue", "--seed", seed) for seed in (0, 0, 1)}
    assert len(texts) == 1 and texts.pop().strip()


def test_sampled_text_follows_the_seed(world, here):
    def text(seed, top_p):
        common = ("--prompt", "Say blue", "--temperature", 5.0)
        return generate(here, world, *common, "--seed", seed, "--top-p", top_p)

    assert text(3, 0.9) == text(3, 0.9)
    assert len({text(seed, 0.9) for seed in (3, 4, 5)}) == 3
    # The likeliest token alone is greedy decoding.
    assert text(3, 1e-6) == generate(here, world, "--prompt", "Say blue")


def test_adapter_changes_the_text(world, here):
    prompts = world / "eval.jsonl"
    common = ("--prompts", prompts, "--json", "--format", "alpaca")
    assert generate(here, world, *common) != generate(here, world, *common, "--adapter", world / "run")


def test_prompts_of_a_file_as_json_rows_in_order(world, here):
    lines = (world / "eval.jsonl").read_text().splitlines()
    common = ("--adapter", world / "run", "--json")
    printed = generate(here, world, "--prompts", world / "eval.jsonl", *common).splitlines()
    answers = [json.loads(line) for line in printed]
    assert [answer["prompt"] for answer in answers] == [json.loads(line) for line in lines]
    for answer in answers:
        assert answer.keys() == {"prompt", "text", "tokens", "ended"}
        assert answer["tokens"] <= 8 and answer["ended"] == (answer["tokens"] < 8)
    # Neighbours and padding in the batch change nothing.
    alone = generate(here, world, "--prompts", world / "eval.jsonl", "--batch-size", 1, *common)
    assert alone.splitlines() == printed


def test_prompt_is_the_instruction_of_an_alpaca_run(world, here, tmp_path):
    row = {"instruction": "Say blue 3 times."}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    common = ("--adapter", world / "run" / "adapter", "--json")  # the run is found from its adapter/ too
    by_flag = json.loads(generate(here, world, "--prompt", row["instruction"], *common))
    by_file = json.loads(generate(here, world, "--prompts", tmp_path / "one.jsonl", *common))
    assert by_flag == by_file and by_flag["prompt"] == row


def test_generate_says_its_format_on_stderr_alone(world, here):
    code, out, err = here("generate", "--base", world / "base", "--prompt", "a", "--max-new-tokens", 1)
    assert (code, err) == (0, "format completion, prompt style stanford\n") and "format" not in out


def test_chat_over_a_pipe(world):
    """Single instructions to an alpaca run, which has no chat template."""
    done = shell(
        *("generate", "--base", world / "base", "--adapter", world / "run", "--chat", "--max-new-tokens", 8, "-q"),
        stdin="Say blue.\nSay tree.\n\nnot reached\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") >= 2 and "> " not in done.stdout


def test_chat_remembers_its_turns(world, here):
    def chat(stdin, *arguments):
        return generate(here, world, "--chat", "--chat-template", "llama2", *arguments, stdin=stdin)

    first, both = chat("Say blue.\n"), chat("Say blue.\nSay tree.\n")
    assert both.startswith(first) and len(both) > len(first)
    assert both.removeprefix(first) != chat("Say tree.\n")
    assert chat("") == "" and chat("\n") == ""


def test_chat_goes_on_after_an_empty_answer(world, here, monkeypatch):
    """An answer that ends at once is no turn that a template would accept."""
    import jlora.generate

    seen = []

    def silent(pretrained, adapter, prompts, **options):
        seen.append(prompts[0])
        yield [[]]

    monkeypatch.setattr(jlora.generate, "generate", silent)
    out = generate(here, world, "--chat", "--chat-template", "llama2", stdin="one\none\n")
    assert out == "\n\n" and len(seen) == 2 and seen[0] == seen[1]


# Export


def test_export_of_the_adapter(world, here, tmp_path):
    code, out, err = here("export", "--run", world / "run", "--out", tmp_path / "a", "--verify", "--json", "-q")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["kind"], result["step"], result["out"]) == ("adapter", 4, str(tmp_path / "a"))
    assert result["logits_relative_difference"] <= 1e-6 and result["peft_relative_difference"] <= 1e-4
    ours, final = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "a", world / "run" / "adapter")
    )
    assert ours.keys() == final.keys() and all((ours[name] == final[name]).all() for name in ours)


def test_export_of_an_earlier_step(world, here, tmp_path):
    code, out, _ = here("export", "--run", world / "run", "--out", tmp_path / "deep" / "a", "--step", 2)
    assert code == 0 and "step 2" in out and str(tmp_path / "deep" / "a") in out
    name = "adapter_model.safetensors"
    early, final = load_file(tmp_path / "deep" / "a" / name), load_file(world / "run" / "adapter" / name)
    assert any((early[key] != final[key]).any() for key in final)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_export_is_a_base_of_its_own(world, here, tmp_path, dtype):
    out = tmp_path / "merged"
    code, printed, err = here(
        "export", "--run", world / "run", "--out", out, "--merge", "--dtype", dtype, "--json", "-q"
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
    assert here("export", "--run", world / "run", "--out", tmp_path / "a", "-q") == (0, "", "")


# What goes wrong

CONFIG_ERRORS = [
    ("lora.rnak=4", ["config.yaml", "unknown key 'lora.rnak'", "did you mean 'rank'"]),
    ("lora.rank=0", ["config.yaml", "lora.rank", "greater than 0"]),
    ("training.gradient_accumulation_steps=3", ["batch_size 4", "3 equal parts", "divisor"]),
    ("mesh.data=1009", ["mesh data=1009", "devices"]),
    ("training.wandb=project", ["training.wandb", "pip install wandb"]),
    ("output_dir={world}/rows.jsonl", ["output_dir", "rows.jsonl", "set another"]),
    ("output_dir={world}/rows.jsonl/run", ["output_dir", "rows.jsonl/run", "set another"]),
    ("data.prompt=chat", ["no chat template", "data.chat_template"]),
    ("data.chat_template=none.jinja", ["none.jinja", "llama2, chatml"]),
    ("data.chat_template=chatml", ["<|im_end|>"]),
    ("training.batch_size", ["'training.batch_size'", "dotted.key=value"]),
]
ROW_ERRORS = [
    (b'{"instruction": "a", "output": "b"}\n{"instruction"\n', ["rows.jsonl:2", "malformed JSON"]),
    (b'\n{"instruction": "a", "output": "\xff"}\n', ["rows.jsonl:2", "not valid UTF-8"]),
    (b'{"instruction": "a", "output": ""}\n', ["rows.jsonl:1", '"output" is empty']),
    (b'{"instruction": "a"}\n', ["rows.jsonl:1", '"output" is missing']),
    (b'{"instruction": "' + b"a" * 300 + b'", "output": "b"}\n', ["rows.jsonl:1", "data.max_length=320"]),
    (b"", ["rows.jsonl", "no usable row"]),
]


@pytest.mark.parametrize(("override", "words"), CONFIG_ERRORS, ids=[override for override, _ in CONFIG_ERRORS])
def test_bad_config(world, here, tmp_path, monkeypatch, override, words):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    code, out, err = here(
        "train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run", override.format(world=world)
    )
    assert (code, out) == (2, "")
    message = one_sentence(err)
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(("content", "words"), ROW_ERRORS, ids=[words[-1] for _, words in ROW_ERRORS])
def test_bad_rows(world, here, tmp_path, command, content, words):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(content)
    arguments = {
        "train": ["--config", world / "config.yaml", f"output_dir={tmp_path}/run", f"data.train={rows}"],
        "evaluate": ["--base", world / "base", "--adapter", world / "run", "--data", rows],
    }[command]
    code, out, err = here(command, *arguments, "-q")
    assert (code, out) == (3, "")
    message = one_sentence(err)
    assert [word for word in words if word not in message] == []


def test_rows_that_are_all_dropped(world, here, tmp_path):
    code, _, err = here(
        *("train", "--config", world / "config.yaml", "-q", f"output_dir={tmp_path}/run"),
        *("data.max_length=16", "data.on_bad_row=skip"),
    )
    message = one_sentence(err)
    assert code == 3 and "all 24 rows were dropped" in message and "rows.jsonl:1" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=missing.jsonl", ["missing.jsonl: no such file"]),
        ("data.eval=missing.jsonl", ["missing.jsonl: no such file"]),
        ("data.train=no-such-owner/no-such-data", ["no-such-owner/no-such-data: no such file", "data set"]),
        ("data.train={world}/base", ["base: holds no"]),
        ("data.train={world}/config.yaml", ["config.yaml: files ending in '.yaml'"]),
    ],
)
def test_bad_data_source(world, here, tmp_path, override, words):
    code, _, err = here(
        *("train", "--config", world / "config.yaml", "-q", f"output_dir={tmp_path}/run", override.format(world=world))
    )
    message = one_sentence(err)
    # A folder of a model holds .json files, which are then read as rows.
    assert code == 3 and ([w for w in words if w not in message] == [] or "base/config.json:1" in message)


def damage(world, tmp_path, how):
    """A copy of the base with one thing wrong."""
    base = copy_folder(world / "base", tmp_path / "damaged")
    weights, config = base / "model.safetensors", json.loads((base / "config.json").read_text())
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "missing weights":
        weights.unlink()
    elif how == "missing config":
        (base / "config.json").unlink()
    elif how == "torn config":
        (base / "config.json").write_text("{")
    elif how == "another size":
        (base / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif how == "another architecture":
        (base / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    elif how == "torn tokenizer":
        (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text()[:200])
    elif how == "no tokenizer":
        (base / "tokenizer.json").unlink()
    return base


BASE_ERRORS = [
    ("truncated", ["model.safetensors", "cut short or damaged"]),
    ("empty", ["model.safetensors", "cut short or damaged"]),
    ("missing weights", ["no model.safetensors"]),
    ("missing config", ["config.json: missing"]),
    ("torn config", ["config.json: can not be read as JSON"]),
    ("another size", ["misshapen", "embed_tokens"]),
    ("another architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"]),
    ("torn tokenizer", ["tokenizer"]),
    ("no tokenizer", ["tokenizer.json", "tokenizer.model"]),
]


@pytest.mark.parametrize(("how", "words"), BASE_ERRORS, ids=[how for how, _ in BASE_ERRORS])
def test_damaged_base(world, here, tmp_path, how, words):
    base = damage(world, tmp_path, how)
    code, out, err = here("generate", "--base", base, "--prompt", "a", "-q")
    assert (code, out) == (4, "")
    message = one_sentence(err)
    assert str(base) in message and [word for word in words if word not in message] == []


def test_damaged_base_as_a_program(world, tmp_path):
    base = damage(world, tmp_path, "truncated")
    done = shell("train", "--config", world / "config.yaml", f"model.path={base}", f"output_dir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (4, "")
    assert "cut short or damaged" in one_sentence(done.stderr)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("/no/such/folder", "no such folder or GGUF file"),
        ("nowhere", "not a hub name"),
        ("no-such-owner/no-such-model", "the hub did not deliver it"),
    ],
)
def test_missing_base(world, here, tmp_path, base, words):
    for arguments in (
        ("generate", "--base", base, "--prompt", "a"),
        ("evaluate", "--base", base, "--data", world / "eval.jsonl"),
        ("train", "--config", world / "config.yaml", f"model.path={base}", f"output_dir={tmp_path}/run"),
    ):
        code, _, err = here(*arguments)
        message = one_sentence(err)
        assert code == 4 and base in message and words in message


def test_tokenizer_of_another_model(world, here, tmp_path):
    """Too large for the embedding, and far too small for it."""
    make_tokenizer(tmp_path / "large", vocab_size=400)
    code, _, err = here("generate", "--base", world / "base", "--tokenizer", tmp_path / "large", "--prompt", "a")
    message = one_sentence(err)
    assert code == 4 and "400 tokens" in message and "300" in message and str(tmp_path / "large") in message
    make_llama(tmp_path / "base", vocab_size=500)
    code, _, err = here(
        *("train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run"),
        *(f"model.path={tmp_path}/base", f"model.tokenizer={world}/base"),
    )
    message = one_sentence(err)
    assert code == 4 and "300 tokens" in message and "500" in message


@needs_data
def test_llama_2_tokenizer_on_a_small_model(here):
    base, tokenizer = SHARED / "stories260K", SHARED / "llama2_tokenizer"
    code, _, err = here("generate", "--base", base, "--tokenizer", tokenizer, "--prompt", "a")
    message = one_sentence(err)
    assert code == 4 and "32000 tokens" in message and "512" in message


# Adapters and runs


def test_adapter_of_another_base(world, here, tmp_path):
    make_llama(tmp_path / "base", seed=1)
    make_tokenizer(tmp_path / "base")
    for arguments in (
        ("generate", "--base", tmp_path / "base", "--adapter", world / "run", "--prompt", "a"),
        ("evaluate", "--base", tmp_path / "base", "--adapter", world / "run", "--data", world / "eval.jsonl"),
    ):
        code, _, err = here(*arguments, "-q")
        assert code == 4 and "was trained on another base" in one_sentence(err)


def change_adapter(world, tmp_path, **changes):
    folder = copy_folder(world / "run" / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 8}, ["does not fit", "lora_A", "[4, 48] instead of [8, 48]"]),
        ({"r": "x"}, ["rank", "'x'"]),
        ({"target_modules": ["q_proj"]}, ["does not fit", "is not known"]),
        ({"target_modules": ["q_proj", "c_attn"]}, ["c_attn"]),
        ({"target_modules": None}, ["not a usable LoRA configuration"]),
        ({"peft_type": "IA3"}, ["'IA3'", "LORA"]),
        ({"use_dora": True}, ["does not fit", "lora_magnitude_vector is missing"]),
        ({"rank_pattern": {"q_proj": 2}}, ["does not fit", "q_proj.lora_A", "[4, 48] instead of [2, 48]"]),
        ({"use_qalora": True}, ["use_qalora", "not supported"]),
    ],
)
def test_adapter_that_does_not_fit(world, here, tmp_path, changes, words):
    folder = change_adapter(world, tmp_path, **changes)
    code, _, err = here("generate", "--base", world / "base", "--adapter", folder, "--prompt", "a", "-q")
    message = one_sentence(err)
    assert code == 4 and str(folder) in message and [word for word in words if word not in message] == []
    assert "pydantic" not in message


def test_damaged_adapter(world, here, tmp_path):
    folder = change_adapter(world, tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = ("generate", "--base", world / "base", "--adapter", folder, "--prompt", "a", "-q")
    code, _, err = here(*arguments)
    assert code == 4 and "cut short or damaged" in one_sentence(err)
    weights.unlink()
    code, _, err = here(*arguments)
    assert code == 4 and "adapter_model.safetensors: missing" in one_sentence(err)


def test_folder_that_is_no_adapter(world, here, tmp_path):
    for folder in (tmp_path, world / "base", tmp_path / "none"):
        code, _, err = here("generate", "--base", world / "base", "--adapter", folder, "--prompt", "a", "-q")
        assert code == 4 and f"{folder}: neither a PEFT adapter folder nor a run folder" in one_sentence(err)


def test_adapter_to_go_on_from_must_be_the_configs(world, here, tmp_path):
    common = ("train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run", "-q")
    for folder in (world / "run", world / "run" / "adapter"):
        code, _, err = here(*common, f"lora.init_from={folder}", "lora.rank=8")
        assert code == 4 and "set lora.rank=4" in one_sentence(err)


def test_run_of_another_config_is_not_gone_on_with(world, here):
    code, _, err = here("train", "--config", world / "config.yaml", "optimizer.learning_rate=1e-3", "-q")
    message = one_sentence(err)
    assert code == 4 and "optimizer.learning_rate: 0.005 -> 0.001" in message and "output_dir" in message


@pytest.mark.parametrize(
    ("arguments", "expected", "words"),
    [
        (["--run", "{tmp}/none"], 4, "not a run folder"),
        (["--run", "{world}/base"], 4, "not a run folder"),
        (["--run", "{world}/run", "--step", "3"], 4, "no checkpoint of step 3; it has 2, 4"),
        (["--run", "{world}/run", "--step", "0"], 4, "no checkpoint of step 0"),
        (["--run", "{world}/run", "--step", "last"], 2, "--step"),
        (["--run", "{world}/run", "--merge", "--verify"], 2, "leave --merge out"),
        (["--run", "{world}/run", "--out", "{world}/base"], 2, "exists and is not an empty folder"),
        (["--run", "{world}/run", "--out", "{world}/rows.jsonl"], 2, "exists and is not an empty folder"),
        (["--run", "{world}/run", "--out", "{world}/rows.jsonl/out"], 2, "can not be made"),
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
    code, _, err = here("export", "--run", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 4 and "another base" in one_sentence(err)


def test_damaged_checkpoint_as_a_program(world, tmp_path):
    """One that was written wrong: Orbax's threads have much to say then, and none of it may reach the user."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    (run / "summary.json").unlink()  # as if it had been stopped before its end
    for file in (run / "checkpoints" / "4" / "state" / "d").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    manifest.write(run / "checkpoints" / "4", manifest.read(run / "checkpoints" / "4"))
    done = shell("train", "--config", world / "config.yaml", f"output_dir={run}", "-q")
    assert done.returncode == 4 and done.stderr.count("\n") == 1
    message = one_sentence(done.stderr)
    assert "checkpoints/4" in message and "can not be restored" in message


def test_damaged_checkpoint_is_not_exported(world, here, tmp_path):
    """The newest gives way to the one before, with a word; one that is asked for by its step is refused."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    [array] = [file for file in (run / "checkpoints" / "4" / "state").rglob("d/*")][:1]
    array.write_bytes(array.read_bytes()[:-1])
    code, _, err = here("export", "--run", run, "--step", 4, "--out", tmp_path / "out")
    assert code == 4 and "checkpoints/4: the checkpoint is damaged (state/" in one_sentence(err)
    assert not (tmp_path / "out").exists()
    code, out, err = here("export", "--run", run, "--out", tmp_path / "out")
    assert code == 0 and "of step 2" in out
    assert "checkpoints/4: the checkpoint is damaged" in err and "passed over; step 2 is taken" in err
    assert (run / "checkpoints" / "4").is_dir() and not (run / "quarantine").exists()


# Usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "--config"),
        (["train", "--config", "{world}/config.yaml", "--bogus"], "--bogus"),
        (["train", "--config", "{world}/none.yaml"], "none.yaml: can not be read"),
        (["train", "--config", "{world}"], "can not be read"),
        (["generate", "--prompt", "a"], "--base"),
        (["generate", "--base", "{world}/base"], "--prompt"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--chat"], "not allowed with"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--temperature", "warm"], "--temperature"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--top-p", "0"], "--top-p"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--top-p", "1.1"], "--top-p"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--seed", "-1"], "--seed"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--seed", "1e30"], "--seed"),
        (["generate", "--base", "{world}/base", "--chat", "--json"], "--chat"),
        (["generate", "--base", "{world}/base", "--chat"], "--chat-template"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--format", "messages"], "no chat template"),
        (["evaluate", "--base", "{world}/base"], "--data"),
        (["evaluate", "--base", "{world}/base", "--data", "x", "--max-length", "1"], "--max-length"),
        (["evaluate", "--base", "{world}/base", "--data", "x", "--batch-size", "0"], "--batch-size"),
        (["evaluate", "--base", "{world}/base", "--data", "x", "--dtype", "int3"], "--dtype"),
        (["export", "--out", "x"], "--run"),
        (["__main__"], "command"),
        (["__main__", "trian"], "trian"),
        (["config", "--bogus"], "--bogus"),
    ],
)
def test_bad_usage(world, here, arguments, words):
    code, out, err = here(*[argument.format(world=world) for argument in arguments])
    assert (code, out) == (2, "")
    assert words in one_sentence(err)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("{tmp}/none.jsonl", "none.jsonl: no such file"),
        ("{tmp}", "no such file"),
        ("{world}/config.yaml", "files ending in '.yaml'"),
        ("{tmp}/second.jsonl", 'second.jsonl:3: the field "prompt" is missing'),
        ("{tmp}/empty.jsonl", "empty.jsonl: holds no prompt"),
        ("{tmp}/torn.jsonl", "torn.jsonl:2: malformed JSON"),
        ("{tmp}/bytes.jsonl", "bytes.jsonl:1: not valid UTF-8"),
    ],
)
def test_bad_prompts(world, here, tmp_path, prompts, words):
    (tmp_path / "second.jsonl").write_text('{"prompt": "a"}\n\n{"instruction": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    path = prompts.format(world=world, tmp=tmp_path)
    code, out, err = here("generate", "--base", world / "base", "--prompts", path, "-q")
    assert (code, out) == (3, "") and words in one_sentence(err)


def test_empty_prompt(world, here):
    code, _, err = here("generate", "--base", world / "base", "--prompt", " ", "-q")
    assert code == 3 and "--prompt" in one_sentence(err)


# Exit codes of what a test can not bring about at will


def end_of(body, capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as exit:
        cli.run(body)
    return exit.value.code, capfd.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nBuffer 1:\n"),
        RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."),
        MemoryError("Unable to allocate 9 bytes"),
    ],
)
def test_out_of_memory(error, capfd, monkeypatch):
    def body():
        raise error

    code, err = end_of(body, capfd, monkeypatch)
    message = one_sentence(err)
    assert code == MemoryExceeded.exit_code == 5
    assert "9 bytes" in message and "training.batch_size" in message and "Buffer" not in message


def test_full_disk(capfd, monkeypatch):
    def body():
        raise OSError(28, "No space left on device", "/runs/a/metrics.jsonl")

    code, err = end_of(body, capfd, monkeypatch)
    assert code == 2 and "/runs/a/metrics.jsonl: No space left on device" in one_sentence(err)


def test_message_of_several_lines_becomes_one(capfd, monkeypatch):
    def body():
        raise DataError("first\nsecond")

    code, err = end_of(body, capfd, monkeypatch)
    assert (code, err) == (3, "error: first second\n")


def test_bug_of_ours_is_not_dressed_up(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def body():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(body)


def test_preemption_has_a_code_of_its_own(capfd, monkeypatch):
    assert end_of(lambda: cli.PREEMPTED, capfd, monkeypatch) == (75, "")


def test_loss_that_is_not_finite(world, here, tmp_path):
    code, out, err = here(
        *("train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run", "-q", "data.eval=null"),
        *("optimizer.learning_rate=1e30", "optimizer.max_grad_norm=null", "training.max_nonfinite_steps=0"),
    )
    assert (code, out) == (6, "")
    message = one_sentence(err)
    assert err.count("\n") == 1
    assert "training.max_nonfinite_steps=0" in message and "optimizer.learning_rate" in message
