"""Weights & Biases, as far as a run meets it without an account."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jlora.errors import ConfigError
from jlora.training.metrics import MetricsLog, require_wandb


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
