"""Runs that are killed, stopped or changed, and go on: every bit as if nothing had happened."""

import errno
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

import jlora.training.run
from jlora import cli
from jlora.config import load_config
from jlora.errors import ConfigError, ModelError
from jlora.files import lock, manifest
from jlora.training.metrics import MetricsLog, StepMeter, read_metrics
from jlora.training.run import train

ROOT = Path(__file__).parents[2]
REVIEWS = "reviews/sephora_reviews.jsonl"
NUM_STEPS, SAVE_EVERY = 18, 4
# What a clock tells is not compared.
CLOCK = ("tokens_per_second", "wall_seconds", "host_bytes", "device_bytes")


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


def wait_while_running(process, condition):
    """Until `condition` holds; the process must still be at work then."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def send_when(process, number, condition):
    """Send a signal as soon as `condition` holds."""
    wait_while_running(process, condition)
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
    assert kinds == {"step", "skipped", "moved", "losses", "trained", "opt_state", "key"}
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


@pytest.mark.slow
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


@pytest.mark.long
def test_killed_while_a_checkpoint_is_written(material, unbroken, tmp_path):
    config, run_dir = configure(material, tmp_path / "killed"), tmp_path / "killed" / "run"
    code = send_when(start(config), signal.SIGKILL, lambda: any(run_dir.glob("checkpoints/*.saving*")))
    assert code == -signal.SIGKILL
    # A later one that was cut short, too, and a line of metrics that was.
    (run_dir / "checkpoints" / "999.orbax-checkpoint-tmp-1700000000000000" / "state").mkdir(parents=True)
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as stream:
        stream.write('{"step": 17, "loss": 0.')
    code, output = finish(config)
    assert code == 0, output
    assert_as_unbroken(run_dir, unbroken)
    assert all(folder.name.isdigit() for folder in (run_dir / "checkpoints").iterdir())


@pytest.mark.long
def test_sigterm_saves_and_exits_75(material, unbroken, tmp_path):
    """The first is enough, and those that follow, of all kinds, until the process is gone, change nothing."""
    config, run_dir = configure(material, tmp_path / "stopped"), tmp_path / "stopped" / "run"
    process = start(config)
    wait_while_running(process, lambda: last_step(run_dir) >= 5)
    while process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process.send_signal(number)
        time.sleep(0.005)
    output = process.communicate()[0].decode()
    assert process.returncode == 75, output
    assert "Traceback" not in output
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


@pytest.mark.long
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
    elsewhere = [f"data.train={changed}"]
    with pytest.raises(ModelError, match=r"\(config.data.train: [^;]*\)"):  # before the rows are read
        train(load_config(config, elsewhere), quiet=True)
    with pytest.raises(ModelError, match="hashes.data"):
        train(load_config(config, [*elsewhere, "resume.allow_changes=[config.data.train]"]), quiet=True)
    original = rows.read_bytes()
    try:
        shutil.copyfile(changed, rows)  # the same path with other content
        with pytest.raises(ModelError, match=r"\(hashes.data: [^;]*; hashes.eval: [^;]*\)"):
            train(load_config(config), quiet=True)
    finally:
        rows.write_bytes(original)
    assert contents(run_dir, ".") == before


@pytest.mark.long
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


def test_a_line_separator_in_a_row_does_not_cut_its_line(tmp_path):
    """Names of files go into the log, and JSON lets U+2028 stand in a string."""
    line = {"step": 1, "loss": 2.5, "rows": ["of\u2028two lines.jsonl:1"]}
    for resume_step in (0, 1):
        log = MetricsLog(tmp_path, resume_step, None)
        if not resume_step:
            log.write(line)
        log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [line]


def test_free_keys_may_change(finished):
    config, run_dir = finished
    before = contents(run_dir, "adapter")
    keys = ["log_every=3", "save_every=5", "eval_every=9", "keep_checkpoints=1", "max_nonfinite_steps=2"]
    summary = train(load_config(config, [f"training.{key}" for key in keys]), quiet=True)
    assert summary["status"] == "finished"
    assert contents(run_dir, "adapter") == before


@pytest.mark.long
def test_a_damaged_newest_checkpoint_is_gone_on_without(finished, unbroken, capsys):
    """One bit of the newest, and a later one that a copy has left empty: the one before, and the same end."""
    config, run_dir = finished
    (run_dir / "checkpoints" / "999").mkdir()
    [array] = [file for file in (run_dir / "checkpoints" / "18" / "state").rglob("d/*")][:1]
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 16
    array.write_bytes(content)
    assert train(load_config(config), quiet=True)["status"] == "finished"
    said = capsys.readouterr().err
    assert "checkpoints/999: the checkpoint is damaged (manifest.json is missing)" in said
    assert "checkpoints/18: the checkpoint is damaged (state/" in said and said.count("step 16 is taken") == 2
    assert_as_unbroken(run_dir, unbroken)
    assert sorted(path.name for path in (run_dir / "quarantine").iterdir()) == ["18", "999"]


def test_no_whole_checkpoint_is_refused(finished):
    config, run_dir = finished
    for step in committed(run_dir):
        (run_dir / "checkpoints" / str(step) / "manifest.json").write_text("{}", encoding="utf-8")
    before = contents(run_dir, ".")
    with pytest.raises(ModelError, match="no checkpoint is whole"):
        train(load_config(config), quiet=True)
    assert contents(run_dir, ".") == before


@pytest.mark.long
def test_a_change_that_is_allowed_is_recorded(finished, unbroken):
    config, run_dir = finished
    shutil.rmtree(run_dir / "checkpoints" / "18")
    before = json.loads((unbroken / "summary.json").read_text(encoding="utf-8"))
    assert before["history"] == []
    changed = ["optimizer.learning_rate=1e-3", "resume.allow_changes=[config.optimizer.learning_rate]"]
    with pytest.raises(ConfigError, match="resume.allow_changes holds 'config.optimizer.rate'; did you mean"):
        train(load_config(config, ["resume.allow_changes=[config.optimizer.rate]"]), quiet=True)
    summary = train(load_config(config, changed), quiet=True)
    history = [{"step": 16, "changes": {"config.optimizer.learning_rate": [5e-3, 1e-3]}}]
    assert summary["status"] == "finished" and summary["history"] == history
    assert json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["history"] == history
    assert final_state(run_dir) != final_state(unbroken)
    # From now on it is what the run is; back is a change again.
    assert train(load_config(config, changed[:1]), quiet=True)["history"] == history
    with pytest.raises(ModelError, match="learning_rate: 0.001 -> 0.005"):
        train(load_config(config), quiet=True)
    fewer = ["training.max_steps=10", "resume.allow_changes=[config.training.max_steps]"]
    with pytest.raises(ConfigError, match="is at step 18 already, past the 10 asked for"):
        train(load_config(config, changed[:1] + fewer), quiet=True)


def test_two_runs_in_one_folder_are_refused(finished, monkeypatch):
    config, run_dir = finished
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.0)
    with lock.locked(run_dir), pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is training there"):
        train(load_config(config), quiet=True)
    assert train(load_config(config), quiet=True)["status"] == "finished"


def test_a_disk_too_small_is_refused_before_training(finished, monkeypatch):
    config, run_dir = finished
    shutil.rmtree(run_dir / "checkpoints" / "18")
    before = contents(run_dir, "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 2**20))
        patch.setattr(jlora.training.run, "make_train_step", None)
        with pytest.raises(ConfigError, match="1 MiB are free, and 1 more checkpoints of .* make room"):
            train(load_config(config), quiet=True)
    assert contents(run_dir, "checkpoints") == before


@pytest.mark.long
def test_a_disk_that_fills_up_stops_the_run_with_one_sentence(finished, unbroken, monkeypatch):
    """At the log's next line, or in a save in the background; the checkpoint before stays, and room lets it go on."""
    config, run_dir = finished
    shutil.rmtree(run_dir / "checkpoints" / "18")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name, sentence in (
        (
            manifest,
            "write",
            "checkpoints/18: the checkpoint could not be saved (No space left on device); checkpoint 16",
        ),
        (MetricsLog, "write", "No space left on device; make room"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises((ConfigError, OSError)) as error:
                train(load_config(config), quiet=True)
        known = cli.explain(error.value)
        assert known.exit_code == 2 and sentence in str(known) and "\n" not in str(known)
        assert committed(run_dir)[-1] == 16
    assert train(load_config(config), quiet=True)["status"] == "finished"
    assert_as_unbroken(run_dir, unbroken)


@pytest.mark.long
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
            patch.setattr(jlora.training.run.StepMeter, "took", stop_at)
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
