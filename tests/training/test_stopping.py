"""Early stopping, the best weights, and evaluations by the epoch."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from command_line import sentence_of
from safetensors.numpy import load_file
from tiny import make_llama, make_rows, make_tokenizer, write_config
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

import jlora.training.run
from jlora.config import load_config
from jlora.errors import ConfigError
from jlora.training.evaluator import Stopping
from jlora.training.folder import steps_between
from jlora.training.metrics import read_metrics
from jlora.training.run import train
from jlora.training.summary import warn_of_result

LOSSES = [3.0, 2.5, 2.4999, 2.45, 2.6, 2.45, 2.4, 2.39, 2.385, 2.7, float("nan"), 2.2]


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.02])
def test_stops_where_transformers_does(patience, min_delta, tmp_path):
    theirs = EarlyStoppingCallback(patience, min_delta)
    arguments = TrainingArguments(
        tmp_path, metric_for_best_model="loss", greater_is_better=False, load_best_model_at_end=False, report_to="none"
    )
    state, ours = TrainerState(), Stopping(patience, min_delta)
    for loss in LOSSES:
        control = TrainerControl()
        theirs.on_evaluate(arguments, state, control, {"eval_loss": loss})
        lower = state.best_metric is None or loss < state.best_metric
        state.best_metric = loss if lower else state.best_metric
        again = Stopping(patience, min_delta)
        again.set_state(json.loads(json.dumps(ours.get_state())))
        assert ours.saw(loss) == again.saw(loss) == lower
        assert ours == again and ours.over == control.should_training_stop
        if ours.over:
            return
    assert patience == 3


def test_nothing_stops_a_run_without_patience():
    ours = Stopping(None, 0.0)
    assert [ours.saw(loss) for loss in (1.0, 2.0, 3.0, 0.5)] == [True, False, False, True] and not ours.over


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder / "base", hidden_size=24, intermediate_size=24, num_hidden_layers=1)
    make_tokenizer(folder / "base")
    make_rows(folder / "rows.jsonl")
    return folder


def configure(tiny, run, *overrides):
    """A run that learns its rows by heart: the held-out loss falls, then rises."""
    sections = {
        "data": {"max_length": 320, "eval": 0.25},
        "optimizer": {"learning_rate": 0.05, "schedule": "constant"},
        "training": {"batch_size": 2, "epochs": 60, "max_steps": None, "evals_per_epoch": 2},
    }
    path = write_config(tiny / "c.yaml", tiny / "base", tiny / "rows.jsonl", run, **sections)
    return load_config(path, ["training.early_stopping_patience=2", *overrides])


@pytest.fixture(scope="module")
def overfitted(tiny):
    """A run that stops early: (folder, summary)."""
    return tiny / "whole", train(configure(tiny, tiny / "whole"), quiet=True)


def held_out(run):
    return {line["step"]: line["eval_loss"] for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_that_overfits_stops_and_leaves_its_best_weights(tiny, overfitted, here, tmp_path):
    run, summary = overfitted
    losses = held_out(run)
    *_, last = losses
    best = min((step for step in losses if step), key=losses.get)
    assert (summary["status"], summary["stopped_early"], summary["steps"]) == ("finished", True, last)
    assert last < 300 and list(losses).index(last) == list(losses).index(best) + 2
    assert (summary["exported_step"], summary["lowest_eval_step"], summary["lowest_eval_loss"]) == (
        *(best, best),
        losses[best],
    )
    code, _, err = here("export", "--adapter", run, "--step", "best", "--out", tmp_path / "best", "-q")
    assert (code, err) == (0, "")
    ours, theirs = weights(run / "adapter"), weights(tmp_path / "best")
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_a_run_that_stopped_early_is_finished(tiny, overfitted):
    run, summary = overfitted
    assert train(configure(tiny, run), quiet=True) == json.loads((run / "summary.json").read_text()) == summary


@pytest.mark.long
def test_killed_within_its_patience_it_stops_at_the_same_step_with_the_same_bits(tiny, overfitted, monkeypatch):
    """Also where a start takes it up behind its last step: what the evaluations showed is in the checkpoint."""
    whole, summary = overfitted
    run, took = tiny / "broken", jlora.training.run.StepMeter.took
    waiting = list(held_out(whole))[-2] + 1  # one evaluation without a lower loss is behind it, and one to come

    def stop_at(self, step, *args):
        if step in (3, waiting):
            os.kill(os.getpid(), signal.SIGTERM)
        return took(self, step, *args)

    monkeypatch.setattr(jlora.training.run.StepMeter, "took", stop_at)
    assert [train(configure(tiny, run), quiet=True)["steps"] for _ in range(3)] == [3, waiting, summary["steps"]]
    assert held_out(run) == held_out(whole)
    ours, theirs = weights(run / "adapter"), weights(whole / "adapter")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    (run / "summary.json").unlink()  # killed after the last checkpoint, before the summary
    again = train(configure(tiny, run), quiet=True)
    assert {key: again[key] for key in ("steps", "exported_step", "stopped_early")} == {
        key: summary[key] for key in ("steps", "exported_step", "stopped_early")
    }


KILLED = """
import os, signal, sys
import jlora.training.run as run
from jlora.config import load_config
took = run.StepMeter.took
def kill_at(self, step, *args):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return took(self, step, *args)
run.StepMeter.took = kill_at
run.train(load_config(sys.argv[1], sys.argv[3:]), quiet=True)
"""


@pytest.mark.long
def test_kill_9_within_its_patience_changes_nothing(tiny, overfitted):
    """Steps since the last checkpoint are taken again, and their evaluations count once."""
    whole, summary = overfitted
    run = tiny / "shot"
    waiting = list(held_out(whole))[-2] + 1
    configure(tiny, run)
    overrides = ["training.early_stopping_patience=2", "training.save_every=2"]
    for step in (5, waiting):
        command = [sys.executable, "-c", KILLED, str(tiny / "c.yaml"), str(step), *overrides]
        assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
        assert 0 < max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal()) < step
    again = train(configure(tiny, run, "training.save_every=2"), quiet=True)
    assert {key: again[key] for key in ("steps", "exported_step", "stopped_early")} == {
        key: summary[key] for key in ("steps", "exported_step", "stopped_early")
    }
    assert held_out(run) == held_out(whole)
    ours, theirs = weights(run / "adapter"), weights(whole / "adapter")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_more_patience_lets_it_go_on(tiny, overfitted, tmp_path):
    whole, summary = overfitted
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = configure(tiny, run, "training.early_stopping_patience=4")
    more = train(config, quiet=True)
    assert more["steps"] > summary["steps"] and more["stopped_early"]


def test_the_last_weights_are_kept_unless_asked(tiny, tmp_path, capsys):
    config = configure(tiny, tmp_path / "last", "training.export=last")
    summary = train(config, quiet=True)
    assert summary["exported_step"] == summary["steps"] > summary["lowest_eval_step"]
    warn_of_result(summary)
    assert f"at step {summary['lowest_eval_step']}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lowest", "exported", "words"),
    [(2.5, 8, "training raised the held-out loss"), (1.5, 8, "was lower before the end"), (1.5, 4, None)],
)
def test_a_result_that_got_worse_is_said(lowest, exported, words, capsys):
    summary = {"eval_loss_before": 2.0, "eval_loss": 2.5 if lowest == 2.5 else 1.75, "steps": 8}
    summary |= {"lowest_eval_loss": lowest, "lowest_eval_step": 8 if lowest == 2.5 else 4, "exported_step": exported}
    warn_of_result(summary)
    err = capsys.readouterr().err
    assert words in err if words else err == ""


@pytest.mark.parametrize(
    ("every", "per_epoch", "steps"), [(None, None, None), (7, None, 7), (None, 2, 5), (None, 3, 3), (None, 99, 1)]
)
def test_steps_between_evaluations(every, per_epoch, steps):
    assert steps_between(every, per_epoch, 10) == steps


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.eval=null"], "set data.eval"),
        (["training.evals_per_epoch=null"], "set evals_per_epoch or eval_every"),
        (["training.eval_every=3"], "eval_every and evals_per_epoch"),
        (["training.early_stopping_patience=null", "training.early_stopping_min_delta=0.1"], "early_stopping_patience"),
        (["training.early_stopping_patience=null", "training.export=best", "data.eval=null"], "training.export=best"),
        (["training.save_every=3", "training.saves_per_epoch=1"], "save_every and saves_per_epoch"),
        (["optimizer.warmup_steps=3", "optimizer.warmup_ratio=0.1"], "warmup_steps and warmup_ratio"),
        (["optimizer.min_learning_rate_ratio=0.1"], "schedule=cosine or linear"),
    ],
)
def test_keys_that_do_not_go_together(tiny, overrides, words):
    assert words in sentence_of(ConfigError, configure, tiny, tiny / "none", *overrides)
