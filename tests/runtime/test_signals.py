"""Signals: before the first step they end a run at once, after it they have it saved; wherever its main thread is."""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import yaml
from tiny import make_completions, make_llama, make_tokenizer, write_config

import jlora.training.base
import jlora.training.run
import jlora.training.sweep
from jlora.config import load_config
from jlora.errors import Interrupted, Stopped
from jlora.runtime import signals
from jlora.training.evaluator import Evaluator
from jlora.training.metrics import StepMeter, read_metrics
from jlora.training.run import train
from jlora.training.sweep import train_together

ROOT = Path(__file__).parents[2]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
MANY = 400_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    make_completions(folder / "rows.jsonl", 40)
    return folder


def configure(folder, run_dir, rows="rows.jsonl", sweep=(), **training):
    data = {"format": "completion", "max_length": 64, "eval": 0.25}
    path = write_config(
        run_dir.with_suffix(".yaml"), folder / "base", folder / rows, run_dir, data=data, training=training
    )
    if sweep:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) | {"sweep": list(sweep)}
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start(config, first="true"):
    """A training, as a shell starts it after another command; it hears SIGHUP, also where the tests run under nohup."""

    def hear() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    command = ["/bin/sh", "-c", f'{first}; exec "$@"', "sh", sys.executable, "-m", "jlora.train"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*command, "--config", str(config)], env=env, preexec_fn=hear, start_new_session=True, **pipes
    )


def steps(run_dir):
    return [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def committed(run_dir):
    found = run_dir / "checkpoints"
    return sorted(int(each.name) for each in found.iterdir() if each.name.isdigit()) if found.is_dir() else []


def wait_until(condition, process):
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.long
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_run_that_reads_rows_ends_at_once(folder, tmp_path, number):
    if not (folder / "many.jsonl").exists():
        row = '{"prompt": "Row %d: what colour has thing %d?", "completion": " Number %d, as far as anybody knows."}\n'
        with open(folder / "many.jsonl", "w", encoding="utf-8") as stream:
            stream.writelines(row % (i, i * 7 % 1000, i % 97) for i in range(MANY))
    run_dir = tmp_path / "run"
    process = start(configure(folder, run_dir, "many.jsonl"))
    wait_until((run_dir / ".lock").exists, process)
    time.sleep(0.5)
    sent = time.monotonic()
    process.send_signal(number)
    try:
        output, error = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 75 and time.monotonic() - sent < 5
    assert (output, error.splitlines()) == ("", [str(Stopped())])
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "summary.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("owner, name", [(jlora.training.base, "load_pretrained"), (Evaluator, "measure")])
def test_nothing_is_begun_before_the_first_step(folder, tmp_path, monkeypatch, number, owner, name):
    """Weights, the held-out loss of step 0; and nothing is compiled for a step that is not wanted any more."""
    whole = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: [whole(*args), os.kill(os.getpid(), number)][0])
    monkeypatch.setattr(jlora.training.run, "make_train_step", None)
    with pytest.raises(Stopped):
        train(load_config(configure(folder, tmp_path / "run")), quiet=True)
    assert committed(tmp_path / "run") == []
    for again in SIGNALS:  # they change nothing any more
        os.kill(os.getpid(), again)


@pytest.mark.long
def test_run_that_goes_on_and_sweep_end_before_a_new_step(folder, tmp_path, monkeypatch):
    """A run at step 2 stays there; a sweep ends as a run does, with nothing to resume from."""
    config = configure(folder, tmp_path / "run", max_steps=4, save_every=2)
    took = StepMeter.took

    def stop(self, step, *args):
        if step == 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return took(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StepMeter, "took", stop)
        assert train(load_config(config), quiet=True)["steps"] == 2
    before = (tmp_path / "run" / "summary.json").read_bytes()
    sweep = [{"name": "a", "lora.rank": 2}, {"name": "b"}]
    both = configure(folder, tmp_path / "both", sweep=sweep, max_steps=3)
    with monkeypatch.context() as patch:
        read = jlora.training.opening.read_data
        kill = partial(os.kill, os.getpid(), signal.SIGINT)
        patch.setattr(jlora.training.opening, "read_data", lambda *a: [read(*a), kill()][0])
        for run in (train, train_together):
            with pytest.raises(Stopped):
                run(load_config(config if run is train else both), True)
    assert committed(tmp_path / "run") == [2] and (tmp_path / "run" / "summary.json").read_bytes() == before
    assert train(load_config(config), quiet=True)["status"] == "finished"
    with monkeypatch.context() as patch:  # from its first step on a sweep is saved, too
        patch.setattr(StepMeter, "took", lambda *args: [took(*args), os.kill(os.getpid(), signal.SIGHUP)][0])
        summary = train_together(load_config(both), True)
        assert summary["status"] == "preempted" and committed(tmp_path / "both" / "a") == [1]
        assert summary["runs"]["b"] == {"status": "not started", "steps": 0}
    with monkeypatch.context() as patch:  # a signal in the last step takes nothing away
        patch.setattr(signals, "save_on_signals", lambda: lambda step: step == 3)
        assert train_together(load_config(both), True)["status"] == "finished"
    assert json.loads((tmp_path / "both" / "summary.json").read_text(encoding="utf-8"))["status"] == "finished"


@pytest.mark.long
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal", "nohup"])
def test_hangup_saves_the_run_unless_it_is_ignored(folder, tmp_path, ignored):
    run_dir = tmp_path / "run"
    config = configure(folder, run_dir, max_steps=60 if ignored else 2_000)
    process = start(config, "trap '' HUP" if ignored else "true")
    wait_until(lambda: len(steps(run_dir)) >= 2, process)
    process.send_signal(signal.SIGHUP)
    error = process.communicate(timeout=120)[1]
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    if ignored:
        assert process.returncode == 0 and summary["steps"] == 60, error
    else:
        assert process.returncode == 75 and summary["status"] == "preempted", error
    assert committed(run_dir)[-1] == summary["steps"] == steps(run_dir)[-1]


def test_hangup_is_given_back_after_a_training_of_the_effort_report():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with signals.own_signals():
        signals.end_on_signals()
        assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.long
@pytest.mark.parametrize("prepare, code", [("end_on_signals", 75), ("interrupt_on_signal", 130)])
def test_native_code_does_not_keep_a_process(prepare, code):
    """A compiler, for one: the main thread is in it, and comes to no handler."""
    body = f"""
import hashlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from jlora import cli
from jlora.runtime import signals as preemption
def body():
    preemption.{prepare}()
    print("in native code", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2 * 10**9)
cli.run(body)
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", body], env=os.environ | {"PYTHONPATH": str(ROOT)}, **pipes)
    assert process.stdout.readline() == "in native code\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    try:
        error = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert (process.returncode, error) == (code, f"{Stopped() if code == 75 else Interrupted()}\n")


@pytest.mark.long
@pytest.mark.parametrize("error", [Stopped, Interrupted])
def test_a_signal_is_not_lost_in_a_callback_of_the_garbage_collector(error):
    """Python drops what is raised there, and JAX has such a callback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (signals.end_on_signals if error is Stopped else signals.interrupt_on_signal)()
    calls = []

    def callback(phase, info):
        if not calls:
            calls.append(phase)
            signal.raise_signal(signal.SIGINT)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(error):
            gc.collect()
            time.sleep(5)
    finally:
        gc.callbacks.remove(callback)
    assert calls == ["start"]


def test_a_signal_is_not_lost_in_a_callback_of_a_weak_dictionary():
    """Python drops what is raised there, too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.interrupt_on_signal()

    class Key:
        def __hash__(self):
            return 1

    class Raises(dict):
        def __delitem__(self, key):
            super().__delitem__(key)
            signal.raise_signal(signal.SIGINT)

    weak, key = weakref.WeakKeyDictionary(), Key()
    weak.data = Raises()
    weak[key] = 1
    with pytest.raises(Interrupted):
        del key
        time.sleep(5)


@pytest.mark.parametrize("module", ["data", "plan"])
def test_ctrl_c_ends_the_other_commands_with_130(folder, tmp_path, module, monkeypatch, capfd):
    """Heard at once and said in one word."""
    left = []
    monkeypatch.setattr(signals.distributed, "_leave", lambda code: left.append(code) or sys.exit(code))
    command = importlib.import_module("jlora.data.__main__" if module == "data" else f"jlora.{module}")
    monkeypatch.setattr(command, "load_config", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    config = configure(folder, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", [module, "--config", str(config), *(["--topology", "cpu:1"] * (module == "plan"))])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit):
        command.main()
    assert left == [130] and capfd.readouterr().err == "interrupted\n"
