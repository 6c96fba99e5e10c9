"""Runs that are killed, stopped or changed, and go on: every bit as if nothing had happened."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from shared_data import SHARED, read_rows
from tiny import make_completions, make_llama, make_tokenizer, write_config

import jlora.train
from jlora.config import load_config
from jlora.errors import ModelError
from jlora.metrics import StepMeter, read_metrics
from jlora.train import train

ROOT = Path(__file__).parents[1]
REVIEWS = "reviews/sephora_reviews.jsonl"
NUM_STEPS, SAVE_EVERY = 18, 4
# What a clock tells is not compared.
CLOCK = ("tokens_per_second",)


def command(config, *overrides):
    return [sys.executable, "-m", "jlora.train", "--config", str(config), "-q", *overrides]


def start(config, *overrides):
    return subprocess.Popen(command(config, *overrides), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(config, *overrides):
    """Run to the end; returns exit code and output."""
    done = subprocess.run(command(config, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def last_step(run_dir):
    return max((line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line), default=0)


def committed(run_dir):
    folder = run_dir / "checkpoints"
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit()) if folder.is_dir() else []


def send_when(process, number, condition):
    """Send a signal as soon as `condition` holds; the process must still be at work then."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.communicate(timeout=120)
    return process.returncode


def final_state(run_dir, step=NUM_STEPS):
    """SHA-256 over every leaf of a checkpoint, and the saved position in the data."""
    folder = run_dir.absolute() / "checkpoints" / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder / "state")
    found = hashlib.sha256()
    for name in sorted(arrays):
        leaf = np.asarray(arrays[name])
        found.update(f"{name} {leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
    kinds = {name.split("/")[0] for name in arrays}
    assert kinds == {"step", "skipped", "trained", "opt_state", "key"}
    return found.hexdigest(), json.loads((folder / "data" / "metadata").read_text(encoding="utf-8"))


def curve(run_dir):
    """Every logged line but what a clock tells, as written."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_as_unbroken(run_dir, unbroken):
    assert final_state(run_dir) == final_state(unbroken)
    assert [line["step"] for line in curve(run_dir) if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert curve(run_dir) == curve(unbroken)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run_dir / "adapter" / name).read_bytes() == (unbroken / "adapter" / name).read_bytes()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A base and rows: the real ones, or else random ones."""
    folder = tmp_path_factory.mktemp("material")
    section = {"format": "completion", "max_length": 256, "on_bad_row": "skip"}
    if SHARED.is_dir():
        rows = [{"prompt": row["input"], "completion": " " + row["output"]} for row in read_rows(REVIEWS)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        return SHARED / "stories260K", folder / "rows.jsonl", section
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    rows = make_completions(folder / "rows.jsonl", count=100)
    return folder / "base", rows, section


def configure(material, folder):
    """The config of one run: dropout, packing, checkpoints and held-out loss on the way."""
    base, rows, section = material
    folder.mkdir(exist_ok=True)
    return write_config(
        folder / "run.yaml",
        base,
        rows,
        folder / "run",
        lora={"dropout": 0.1},
        data=section | {"eval": 0.1},
        training={"batch_size": 2, "max_steps": NUM_STEPS, "save_every": SAVE_EVERY, "eval_every": 6, "seed": 5},
    )


@pytest.fixture(scope="module")
def unbroken(material, tmp_path_factory):
    """The run folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    code, output = finish(configure(material, folder))
    assert code == 0, output
    assert committed(folder / "run")[-2:] == [16, 18]
    return folder / "run"


@pytest.fixture
def finished(unbroken, material, tmp_path):
    """A copy of the finished run, to be started again: (config, run folder)."""
    config = configure(material, tmp_path / "again")
    shutil.copytree(unbroken, tmp_path / "again" / "run")
    return config, tmp_path / "again" / "run"


def test_killed_before_and_after_a_checkpoint(material, unbroken, tmp_path):
    config, run_dir = configure(material, tmp_path / "killed"), tmp_path / "killed" / "run"
    code = send_when(start(config), signal.SIGKILL, lambda: last_step(run_dir) >= 1)
    assert code == -signal.SIGKILL and committed(run_dir) == []

    code = send_when(
        start(config), signal.SIGKILL, lambda: committed(run_dir) and last_step(run_dir) > committed(run_dir)[-1]
    )
    assert code == -signal.SIGKILL and not (run_dir / "adapter").exists()
    at = committed(run_dir)[-1]
    assert SAVE_EVERY <= at < NUM_STEPS and last_step(run_dir) > at

    code, output = finish(config)
    assert code == 0, output
    assert_as_unbroken(run_dir, unbroken)


def test_killed_while_a_checkpoint_is_written(material, unbroken, tmp_path):
    config, run_dir = configure(material, tmp_path / "killed"), tmp_path / "killed" / "run"
    code = send_when(start(config), signal.SIGKILL, lambda: any(run_dir.glob("checkpoints/*.orbax-checkpoint-tmp*")))
    assert code == -signal.SIGKILL
    # A later one that was cut short, too, and a line of metrics that was.
    (run_dir / "checkpoints" / "999.orbax-checkpoint-tmp-1700000000000000" / "state").mkdir(parents=True)
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 17, "loss": 0.')
    code, output = finish(config)
    assert code == 0, output
    assert_as_unbroken(run_dir, unbroken)
    assert all(folder.name.isdigit() for folder in (run_dir / "checkpoints").iterdir())


def test_sigterm_saves_and_exits_75(material, unbroken, tmp_path):
    config, run_dir = configure(material, tmp_path / "stopped"), tmp_path / "stopped" / "run"
    code = send_when(start(config), signal.SIGTERM, lambda: last_step(run_dir) >= 5)
    assert code == 75
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "preempted" and summary["adapter"] is None
    assert committed(run_dir)[-1] == summary["steps"] == last_step(run_dir) >= 5
    assert not (run_dir / "adapter").exists()
    code, output = finish(config)
    assert code == 0, output
    assert_as_unbroken(run_dir, unbroken)


def contents(run_dir, *folders):
    return {
        str(file.relative_to(run_dir)): file.read_bytes()
        for folder in folders
        for file in sorted((run_dir / folder).rglob("*"))
        if file.is_file()
    }


def test_finished_run_stays_as_it_is(finished):
    config, run_dir = finished
    before, lines = contents(run_dir, "adapter", "checkpoints"), (run_dir / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    summary = train(load_config(config), quiet=True)
    assert time.monotonic() - began < 30
    assert summary["status"] == "finished" and summary["steps"] == NUM_STEPS
    assert contents(run_dir, "adapter", "checkpoints") == before
    assert (run_dir / "metrics.jsonl").read_bytes() == lines


def test_another_run_is_refused(finished, material, tmp_path):
    config, run_dir = finished
    before = contents(run_dir, ".")
    code, output = finish(config, "lora.rank=8")
    assert code == 4 and "config.lora.rank: 4 -> 8" in output and "Traceback" not in output
    refusals = {
        "config.training.seed: 5 -> 6": ["training.seed=6"],
        "config.optimizer.learning_rate": ["optimizer.learning_rate=1e-3"],
        "config.training.max_steps: 18 -> 20": ["training.max_steps=20"],
        "config.lora.dropout": ["lora.dropout=0.2"],
        "config.data.packing": ["data.packing=false"],
    }
    for message, overrides in refusals.items():
        with pytest.raises(ModelError) as error:
            train(load_config(config, overrides), quiet=True)
        assert message in str(error.value) and str(run_dir) in str(error.value)

    base, rows, _ = material
    changed = tmp_path / "rows.jsonl"
    changed.write_text(rows.read_text(encoding="utf-8").replace("a", "e", 1), encoding="utf-8")
    with pytest.raises(ModelError, match="hashes.data"):
        train(load_config(config, [f"data.train={changed}"]), quiet=True)
    original = rows.read_bytes()
    try:
        shutil.copyfile(changed, rows)  # the same path with other content
        with pytest.raises(ModelError, match=r"\(hashes.data: [^;]*; hashes.eval: [^;]*\)"):
            train(load_config(config), quiet=True)
    finally:
        rows.write_bytes(original)
    assert contents(run_dir, ".") == before


def test_another_base_is_refused(tmp_path):
    base, rows = tmp_path / "base", make_completions(tmp_path / "rows.jsonl")
    make_llama(base)
    make_tokenizer(base)
    section = {"format": "completion", "max_length": 64}
    config = load_config(write_config(tmp_path / "c.yaml", base, rows, tmp_path / "run", data=section))
    train(config, quiet=True)
    make_llama(base, seed=1)
    with pytest.raises(ModelError, match=r"\(hashes.base: [^;]*\)"):
        train(config, quiet=True)


def test_free_keys_may_change(finished):
    config, run_dir = finished
    before = contents(run_dir, "adapter")
    keys = ["log_every=3", "save_every=5", "eval_every=9", "keep_checkpoints=1", "max_nonfinite_steps=2"]
    summary = train(load_config(config, [f"training.{key}" for key in keys]), quiet=True)
    assert summary["status"] == "finished"
    assert contents(run_dir, "adapter") == before


def test_damaged_newest_checkpoint_is_named(finished):
    """One that was cut short without Orbax's knowing, as by a copy that failed."""
    config, run_dir = finished
    (run_dir / "checkpoints" / "999").mkdir()
    with pytest.raises(ModelError, match=r"checkpoints/999: the checkpoint can not be restored .* delete this"):
        train(load_config(config), quiet=True)
    (run_dir / "checkpoints" / "999").rmdir()
    assert train(load_config(config), quiet=True)["status"] == "finished"


def test_figures_do_not_depend_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Between two logged steps, in the first epoch or a later one."""
    base, rows = tmp_path / "base", make_completions(tmp_path / "rows.jsonl", count=20)
    make_llama(base)
    make_tokenizer(base)

    def run(name, stops):
        took = StepMeter.took

        def stop_at(self, step, *args):
            if step in stops:
                os.kill(os.getpid(), signal.SIGTERM)
            return took(self, step, *args)

        config = load_config(
            write_config(
                tmp_path / "c.yaml",
                base,
                rows,
                tmp_path / name,
                data={"format": "completion", "max_length": 64},
                training={"batch_size": 2, "max_steps": 14, "log_every": 3, "save_every": 100},
            )
        )
        with monkeypatch.context() as patch:
            patch.setattr(jlora.train.StepMeter, "took", stop_at)
            for stop in stops:
                summary = train(config, quiet=True)
                assert (summary["status"], summary["steps"]) == ("preempted", stop)
            summary = train(config, quiet=True)
        assert (summary["status"], summary["steps"]) == ("finished", 14)
        return curve(tmp_path / name), summary["tokens"]["total"], final_state(tmp_path / name, 14)

    lines, tokens, state = run("whole", [])
    assert lines[-1]["epoch"] > 1
    broken_lines, broken_tokens, broken_state = run("broken", [4, 11])
    assert broken_state == state
    assert broken_lines == lines
    assert broken_tokens == tokens == lines[-1]["tokens"]
