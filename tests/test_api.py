"""`import jlora` in a program: what it runs, what it hears of a run, and what it leaves as it was."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import sentence_of
from safetensors.numpy import load_file
from tiny import make_llama, make_rows, make_tokenizer, write_config

import jlora
from jlora.errors import ConfigError, DataError, ModelError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_llama(folder / "base", max_position_embeddings=512)
    make_tokenizer(folder / "base")
    make_rows(folder / "rows.jsonl")
    data, training = {"max_length": 320, "eval": 0.25}, {"eval_every": 2, "save_every": 2, "max_steps": 4}
    write_config(
        folder / "c.yaml", folder / "base", folder / "rows.jsonl", folder / "run", data=data, training=training
    )
    return folder


@pytest.fixture(scope="module")
def heard():
    return {"steps": [], "evals": [], "saves": []}


@pytest.fixture(scope="module")
def run(world, heard):
    """A run with callbacks, one of which has a metric of its own."""

    def on_eval(step, figures):
        heard["evals"].append((step, figures["loss"]))
        return {"half": figures["loss"] / 2}

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    found = jlora.finetune(
        world / "c.yaml",
        quiet=True,
        on_step=lambda step, line: heard["steps"].append((step, line["loss"])),
        on_eval=on_eval,
        on_save=lambda step, folder: heard["saves"].append((step, folder.name)),
        **{"lora.rank": 3},
    )
    assert {number: signal.getsignal(number) for number in before} == before
    return found


def test_a_run_knows_what_its_folder_holds(world, run):
    assert run.folder == world / "run" and run.config.lora.rank == 3
    assert run.summary == json.loads((world / "run" / "summary.json").read_text())
    assert repr(run) == f"Run('{world}/run', finished)"
    assert run.adapter == world / "run" / "adapter"
    lines = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics == lines and run.metrics_frame().shape[0] == len(lines)


def test_callbacks_hear_of_steps_evaluations_and_saves(run, heard):
    losses = {line["step"]: line["loss"] for line in run.metrics if "loss" in line}
    held_out = {line["step"]: line["eval_loss"] for line in run.metrics if "eval_loss" in line}
    assert heard["steps"] == list(losses.items()) and heard["evals"] == list(held_out.items())
    assert heard["saves"] == [(2, "2"), (4, "4")]
    halves = {line["step"]: line["eval_half"] for line in run.metrics if "eval_loss" in line}
    assert halves == {step: loss / 2 for step, loss in held_out.items()}


def test_it_answers_and_measures_as_the_commands_do(world, run, here):
    prompts = ["Say blue 2 times.", {"instruction": "Say red.", "input": "Politely."}]
    texts = run.generate(prompts, max_new_tokens=6)
    assert texts == jlora.open_run(world / "run").generate(prompts, max_new_tokens=6) and run.generate([]) == []
    code, out, _ = here(
        *("generate", "--adapter", world / "run", "--prompt", prompts[0], "--max-new-tokens", 6, "--json", "-q")
    )
    assert code == 0 and json.loads(out)["text"] == texts[0]
    code, out, _ = here("evaluate", "--adapter", world / "run", "--data", world / "rows.jsonl", "--json", "-q")
    assert code == 0 and run.evaluate(world / "rows.jsonl") == json.loads(out)
    assert "prompt 1: " in sentence_of(DataError, run.generate, [{"prompt": "a"}])
    assert "takes no rows" in sentence_of(ConfigError, run.evaluate, world / "rows.jsonl", rows=3)


def test_it_exports(run, tmp_path):
    found = run.export(tmp_path / "early", step=2)
    assert (found["step"], found["kind"]) == (2, "adapter")
    name = "adapter_model.safetensors"
    assert load_file(tmp_path / "early" / name).keys() == load_file(run.adapter / name).keys()
    assert run.export(tmp_path / "merged", merge=True, dtype="float32")["kind"] == "full"


def test_a_config_may_be_a_dict(world, tmp_path):
    tree = {"model": {"path": str(world / "base"), "dtype": "float32"}, "data": {"train": str(world / "rows.jsonl")}}
    tree |= {"output_dir": str(tmp_path / "run"), "training": {"max_steps": 1}}
    before = json.dumps(tree)
    run = jlora.finetune(tree, quiet=True, **{"data.max_length": 320, "lora.rank": 2})
    assert run.summary["steps"] == 1 and run.config.lora.rank == 2 and json.dumps(tree) == before
    with pytest.raises(ConfigError, match="the config: unknown key 'lora.rnak'.*rank"):
        jlora.finetune(tree, **{"lora.rnak": 2})
    with pytest.raises(ConfigError, match=r"the config: training\.epochs"):
        jlora.finetune(tree, **{"training.epochs": -1})
    with pytest.raises(ModelError, match="not a run folder"):
        jlora.open_run(world)


def test_it_trains_outside_the_main_thread(world, tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            jlora.finetune(world / "c.yaml", quiet=True, output_dir=str(tmp_path / "r"), **{"training.max_steps": 1})
        )
    )
    thread.start()
    thread.join()
    assert found[0].summary["steps"] == 1


def test_a_plan_for_hardware_that_is_not_here(world):
    found = jlora.plan_for(world / "c.yaml", "cpu:2", **{"mesh.fsdp": 2})
    assert found["devices"] == 2 and found["fits"] and found["peak_bytes"] > 0
    with pytest.raises(ConfigError, match="abacus"):
        jlora.plan_for(world / "c.yaml", "abacus:1")


def test_import_starts_and_changes_nothing():
    code = """
import signal, sys, threading
before = [signal.getsignal(number) for number in range(1, 65)], threading.active_count()
import jlora
assert ([signal.getsignal(number) for number in range(1, 65)], threading.active_count()) == before
assert not {"jax", "transformers", "numpy", "jlora.api"} & sys.modules.keys()
assert "finetune" in dir(jlora) and not hasattr(jlora, "fintune")
jlora.finetune
assert ([signal.getsignal(number) for number in range(1, 65)], threading.active_count()) == before
assert "jax" not in sys.modules
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.prose
def test_the_snippets_of_the_page_run(world, tmp_path, monkeypatch):
    """On a tiny base, for hardware that is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("quickstart", "configs/llama2_70b_2xh100"):
        text = (world / "c.yaml").read_text(encoding="utf-8").replace(str(world / "run"), str(tmp_path / "run"))
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 3
    names = {}
    for snippet in snippets:
        tiny = snippet.replace("gpu:h100-80gb:2", "cpu:1").replace('max_steps": 20', 'max_steps": 4')
        exec(compile(tiny, "docs/python.md", "exec"), names)
    assert names["run"].summary["steps"] == 4 and names["plan"]["fits"]
