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


@pytest.mark.long
def test_a_callback_that_raises_is_told_as_it_is_and_the_run_resumes(world, run, tmp_path):
    """From its last checkpoint, to the same adapter."""

    def on_eval(step, figures):
        return {"inverse": 1 / (4 - step)}

    settings = {"lora.rank": 3, "output_dir": str(tmp_path / "run")}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(ZeroDivisionError) as raised:
        jlora.finetune(world / "c.yaml", quiet=True, on_eval=on_eval, **settings)
    assert raised.traceback[-1].name == "on_eval" and raised.value.__cause__ is None
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert [line["eval_inverse"] for line in jlora.open_run(tmp_path / "run").metrics if "eval_loss" in line] == [
        0.25,
        0.5,
    ]
    steps = []
    again = jlora.finetune(world / "c.yaml", quiet=True, on_step=lambda step, line: steps.append(step), **settings)
    assert steps == [3, 4] and again.summary["status"] == "finished"
    name = "adapter_model.safetensors"
    assert (again.adapter / name).read_bytes() == (run.adapter / name).read_bytes()


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (3.0, "returned float; let it return a dict"),
        ({"loss": 1.0}, "named 'loss'"),
        ({1: 1.0}, "named 1"),
        ({"bleu": "high"}, "bleu='high'; let it be a number"),
        ({"bleu": [1.0]}, "let it be a number"),
    ],
)
def test_what_on_eval_returns_is_checked(world, tmp_path, returned, words):
    settings = {"output_dir": str(tmp_path / "run")}
    run = {"quiet": True, "on_eval": lambda step, figures: returned}
    assert words in sentence_of(ConfigError, jlora.finetune, world / "c.yaml", **run, **settings)


@pytest.mark.long
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
    assert "prompt 1: " in sentence_of(DataError, run.generate, [{"colour": "a"}])
    assert "takes no rows" in sentence_of(ConfigError, run.evaluate, world / "rows.jsonl", rows=3)


def test_it_exports(run, tmp_path):
    found = run.export(tmp_path / "early", step=2)
    assert (found["step"], found["kind"]) == (2, "adapter")
    name = "adapter_model.safetensors"
    assert load_file(tmp_path / "early" / name).keys() == load_file(run.adapter / name).keys()
    assert run.export(tmp_path / "merged", merge=True, dtype="float32")["kind"] == "full"


@pytest.mark.long
def test_a_config_may_be_a_dict(world, tmp_path):
    tree = {"model": {"path": str(world / "base"), "dtype": "float32"}, "data": {"train": str(world / "rows.jsonl")}}
    tree |= {"output_dir": str(tmp_path / "run"), "training": {"max_steps": 1}}
    before = json.dumps(tree)
    run = jlora.finetune(tree, quiet=True, **{"data.max_length": 320, "lora.rank": 2})
    assert run.summary["steps"] == 1 and run.config.lora.rank == 2 and json.dumps(tree) == before
    rows = map(json.loads, (world / "rows.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [{"ask": row["instruction"], "reply": row["output"]} for row in rows]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tree["data"] = {"train": str(tmp_path / "own.jsonl"), "columns": {"instruction": "ask", "output": "reply"}}
    other = jlora.finetune(tree, quiet=True, output_dir=str(tmp_path / "own"), **{"data.max_length": 320})
    asked = [row["ask"] for row in rows[:2]]
    answers = other.generate([{"ask": text} for text in asked], max_new_tokens=4)
    assert answers == other.generate(asked, max_new_tokens=4)
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


@pytest.mark.long
def test_a_plan_for_hardware_that_is_not_here(world):
    found = jlora.plan_for(world / "c.yaml", "cpu:2", **{"mesh.fsdp": 2})
    assert found["devices"] == 2 and found["fits"] and found["peak_bytes"] > 0
    with pytest.raises(ConfigError, match="abacus"):
        jlora.plan_for(world / "c.yaml", "abacus:1")


# What belongs to a program: its signals, threads (of native code, too), children and streams.
STATE = """
import os, signal, sys
from pathlib import Path
def state():
    tasks = sorted(Path("/proc/self/task").iterdir())
    children = [(task / "children").read_text() for task in tasks]
    handlers = [signal.getsignal(number) for number in range(1, 65)]
    return len(tasks), children, handlers, sys.stdin, sys.stdout, sys.stderr, sys.excepthook, sys.unraisablehook
before = state()
"""


def in_a_program(code):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STATE + code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_import_starts_and_changes_nothing():
    code = """
import jlora
assert state() == before
assert not {"jax", "transformers", "numpy", "jlora.api"} & sys.modules.keys()
assert "finetune" in dir(jlora) and not hasattr(jlora, "fintune")
jlora.finetune
assert state() == before
assert "jax" not in sys.modules
"""
    in_a_program(code)


def test_a_program_keeps_its_signals_and_streams(world, run):
    """JAX has threads of its own by then."""
    code = f"""
import jlora
jlora.open_run({str(run.folder)!r}).evaluate({str(world / "rows.jsonl")!r})
jlora.finetune({str(world / "c.yaml")!r}, quiet=True, **{{"lora.rank": 3}})
assert state()[2:] == before[2:]
print("done")
"""
    assert in_a_program(code) == "done\n"


@pytest.mark.long
def test_the_api_has_types_for_others(tmp_path):
    """As a type checker sees them in a program."""
    pytest.importorskip("mypy", reason="the extra dev is not installed")
    (tmp_path / "program.py").write_text(
        "import jlora\nfrom jlora import finetune\n"
        "reveal_type(finetune('c.yaml').evaluate)\nreveal_type(jlora.open_run)\nfinetune(3)\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--follow-imports", "silent", "program.py"]
    env = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("program.py")]
    assert len(lines) == 3, done.stdout
    assert "def (data: str | pathlib.Path, **options: Any) -> dict[str, Any]" in lines[0]
    assert "-> jlora.api.Run" in lines[1] and 'incompatible type "int"' in lines[2]


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
