"""Weights & Biases, as far as a run meets it without an account."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jlora.errors import ConfigError
from jlora.training import metrics
from jlora.training.metrics import MetricsLog, ProgressLine, require_wandb


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


def test_nobody_logged_in_is_said_before_anything_is_read(wandb, monkeypatch):
    with pytest.raises(ConfigError, match="nobody is logged in"):
        require_wandb("project")
    require_wandb(None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_wandb("project")
    monkeypatch.delenv("WANDB_MODE")
    wandb.api.api_key = "k"
    require_wandb("project")


def start(folder: Path, step: int = 0, project: str = "p") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    MetricsLog(folder, step, project, {}, True).close()


def test_a_run_has_an_id_of_its_own_and_keeps_it(wandb, tmp_path, monkeypatch):
    start(tmp_path / "p1" / "exp")
    start(tmp_path / "p2" / "exp")
    start(tmp_path / "p1" / "exp", step=3)
    start(tmp_path / "lr:1e-3")
    monkeypatch.chdir(tmp_path / "p1" / "exp")
    start(Path("."), step=3)
    one, two, again, odd, here = wandb.begun
    assert one["id"] == again["id"] == here["id"] and len({one["id"], two["id"], odd["id"]}) == 3
    assert [one["name"], two["name"], odd["name"], here["name"]] == ["exp", "exp", "lr:1e-3", "exp"]
    assert all(run["id"].isalnum() and run["resume"] == "allow" for run in wandb.begun)


def test_what_it_refuses_is_one_sentence(wandb, tmp_path):
    with pytest.raises(ConfigError) as refused:
        start(tmp_path / "run", project="bad")
    assert "training.wandb=bad: Weights & Biases refuses the run (cannot contain" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_time_left_is_that_of_steps(monkeypatch, capsys):
    """Not of the compilation before the first; and 101 seconds are 1:41."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    line = ProgressLine(total=103, start=0, quiet=False)
    for step, at in ((1, 90.0), (2, 100.5), (52, 151.0)):
        now[0] = at
        line.update(step, 1.0, 10.0)
    first, second, third = capsys.readouterr().err.splitlines()
    assert "time left" not in first
    assert second.endswith(f"time left {int(10.5 * 101) // 60}:{round(10.5 * 101) % 60:02}")
    assert third.endswith("time left 1:01")  # 61 s for 51 steps so far, and 51 to go
