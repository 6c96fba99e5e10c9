"""Weights & Biases, MLflow and trackio: offline with the real libraries, and what a run meets without an account."""

import contextlib
import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import make_llama, make_rows, make_tokenizer, write_config

from jlora.config import load_config
from jlora.config.sections import TrainingSection
from jlora.errors import ConfigError
from jlora.training.metrics import MetricsLog, read_metrics
from jlora.training.run import train
from jlora.training.trackers import ASKED_FOR, Tracker, open_trackers, require_trackers


class Refused(Exception):
    """As wandb.Error."""


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in: who is logged in, and what runs were begun."""
    begun = []

    def init(**given):
        if "bad" in given["project"]:
            raise Refused("cannot contain characters\nor be empty")
        begun.append(given)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    module = SimpleNamespace(api=SimpleNamespace(api_key=None), Error=Refused, init=init, begun=begun, __spec__=True)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def section(**given):
    return TrainingSection(**given)


def test_nobody_logged_in_is_said_before_anything_is_read(wandb, monkeypatch):
    with pytest.raises(ConfigError, match="nobody is logged in"):
        require_trackers(section(wandb="project"))
    require_trackers(section())
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_trackers(section(wandb="project"))
    monkeypatch.delenv("WANDB_MODE")
    wandb.api.api_key = "k"
    require_trackers(section(wandb="project"))


@pytest.mark.parametrize("key", ASKED_FOR)
def test_a_library_that_is_not_installed_is_said(key, monkeypatch):
    monkeypatch.setitem(sys.modules, key, None)
    with pytest.raises(ConfigError, match=f"training.{key} is set, but {key} is not installed; pip install {key}"):
        require_trackers(section(**{key: "project"}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_llama(folder / "base", num_hidden_layers=1, max_position_embeddings=512)
    make_tokenizer(folder / "base")
    make_rows(folder / "rows.jsonl")
    training = {"max_steps": 4, "save_every": 2, "seed": 11}
    write_config(
        folder / "c.yaml", folder / "base", folder / "rows.jsonl", folder / "run", training=training,
        data={"max_length": 320},
    )  # fmt: skip
    return folder


def start(world, folder: Path, step: int = 0, project: str = "p") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cfg = load_config(world / "c.yaml", [f"training.wandb={project}"])
    MetricsLog(folder, step, open_trackers(cfg, folder, step)).close()


def test_a_run_has_an_id_of_its_own_and_keeps_it(world, wandb, tmp_path, monkeypatch):
    start(world, tmp_path / "p1" / "exp")
    start(world, tmp_path / "p2" / "exp")
    start(world, tmp_path / "p1" / "exp", step=3)
    start(world, tmp_path / "lr:1e-3")
    monkeypatch.chdir(tmp_path / "p1" / "exp")
    start(world, Path("."), step=3)
    start(world, tmp_path / "p2" / "exp")  # from the beginning: another run
    one, two, again, odd, here, anew = wandb.begun
    assert one["id"] == again["id"] == here["id"] and len({run["id"] for run in (one, two, odd, anew)}) == 4
    assert [one["name"], two["name"], odd["name"], here["name"]] == ["exp", "exp", "lr:1e-3", "exp"]
    assert all(run["id"].isalnum() and run["resume"] == "allow" for run in wandb.begun)


def test_what_it_refuses_is_one_sentence(world, wandb, tmp_path):
    with pytest.raises(ConfigError) as refused:
        start(world, tmp_path / "run", project="bad")
    assert "training.wandb=bad: Weights & Biases refuses the run (cannot contain" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_tracker_that_fails_is_told_no_more_and_the_run_goes_on(tmp_path, capsys):
    told = []

    def fail(numbers, step):
        told.append(("fails", step))
        raise RuntimeError("the server\nis gone")

    trackers = {
        "Fails": Tracker(fail, lambda: told.append(("fails", "closed"))),
        "Works": Tracker(lambda numbers, step: told.append((step, numbers)), lambda: told.append("closed")),
    }
    log = MetricsLog(tmp_path, 0, trackers)
    log.write({"step": 1, "loss": 2.5, "skipped": "a spike"})
    log.write({"step": 2, "loss": 2.0})
    log.close()
    assert told == [("fails", 1), (1, {"loss": 2.5}), (2, {"loss": 2.0}), "closed"]
    err = capsys.readouterr().err
    assert err == "warning: Fails is told no more (the server is gone); metrics.jsonl has all figures\n"
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_was_told_before_a_crash_is_not_told_again(tmp_path):
    """But to one that rewinds it is."""
    lines = [
        {"step": 2, "loss": 3.0},
        {"step": 3, "loss": 2.0},
        {"step": 3, "eval_loss": 1.0},
        {"step": 4, "loss": 1.0},
    ]
    told = {False: [], True: []}
    for given, resume_step in ((lines[:2], 0), (lines[1:], 2)):
        log = MetricsLog(
            tmp_path,
            resume_step,
            {
                str(rewinds): Tracker(
                    lambda numbers, step, to=to: to.extend((step, *item) for item in numbers.items()),
                    lambda: None,
                    rewinds,
                )
                for rewinds, to in told.items()
            },
        )
        for line in given:
            log.write(line)
        log.close()
    once = [(2, "loss", 3.0), (3, "loss", 2.0), (3, "eval_loss", 1.0), (4, "loss", 1.0)]
    assert told[False] == once and told[True] == [*once[:2], *once[1:]]


# With the real libraries, offline


def curve_of_mlflow(folder):
    """Step and loss of the only run, and its status; MLflow's files in the folder `store`."""
    [metric] = (folder / "store").glob("*/*/metrics/loss")
    lines = [line.split() for line in metric.read_text().splitlines()]
    parameters = metric.parents[1] / "params"
    assert (parameters / "training.seed").read_text() == "11"
    return [(int(step), float(value)) for _, value, step in lines]


def curve_of_trackio(folder):
    [path] = (folder / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert len({name for name, *_ in rows}) == 1
    return [(step, found["loss"]) for _, step, found in ((n, s, json.loads(m)) for n, s, m in rows) if "loss" in found]


def curve_of_wandb(folder):
    """Of what `wandb sync` would send: a file of records for each start, all of one run."""
    kept, curve = (folder / "run" / "wandb" / "jlora-id").read_text(), []
    lines = [line for line in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in line]
    for path in sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb")):
        assert path.name == f"run-{kept}.wandb"
        records = path.read_bytes()
        curve += [(line["step"], line["loss"]) for line in lines if json.dumps(line["loss"]).encode() in records]
    return curve


CURVES = {"wandb": curve_of_wandb, "mlflow": curve_of_mlflow, "trackio": curve_of_trackio}


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # of the libraries to themselves
@pytest.mark.parametrize("key", ASKED_FOR)
def test_a_run_that_resumes_is_one_run_of_the_tracker(key, world, tmp_path, monkeypatch, capfd):
    """With the real library, offline: stopped after two of four steps and taken up again."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(key, reason=f"the extra {key} is not installed")
    cfg = load_config(world / "c.yaml", [f"training.{key}=reviews", f"output_dir={tmp_path}/run"])
    capfd.readouterr()
    assert train(cfg, quiet=True, until=2)["status"] == "preempted"
    kept = (tmp_path / "run" / key / "jlora-id").read_text()
    assert train(cfg, quiet=True)["status"] == "finished"
    assert (tmp_path / "run" / key / "jlora-id").read_text() == kept
    losses = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert CURVES[key](tmp_path) == losses
    assert capfd.readouterr().out == ""
