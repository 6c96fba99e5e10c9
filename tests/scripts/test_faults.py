"""The table of fault cases names tests that exist; the campaigns of scripts/faults, a little of each (slow)."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from jlora.training import opening

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_fault_case_has_tests_and_they_exist():
    cases = re.findall(r"^\| (\d+) \| (.*) \|$", TABLE, flags=re.MULTILINE)
    assert [int(number) for number, _ in cases] == list(range(1, 31))
    for number, row in cases:
        assert "`test" in row, number
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", TABLE)
    assert len(named) > 60
    for file, test in named:
        texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob(file)]
        assert any(re.search(rf"^def {test}\(", text, flags=re.MULTILINE) for text in texts), f"{file}::{test}"


def run(name: str, seed: int, count: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "faults" / "campaign", name]
    command += ["--seed", str(seed), "--count", str(count)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def campaign(name: str, count: int) -> str:
    """Run a campaign; its summary line."""
    done = run(name, 0, count)
    assert done.returncode == 0, done.stdout + done.stderr
    if "skipped" in done.stdout:
        pytest.skip(done.stdout)
    assert "0 commits lost" in done.stdout
    return done.stdout


@pytest.mark.parametrize("start", [0, 12])
def test_campaigns_read_where_a_start_began(tmp_path, monkeypatch, start):
    """What `train` says of it, which a campaign that reads nothing there would take for no fault."""
    monkeypatch.syspath_prepend(ROOT / "scripts" / "faults")
    said: list[str] = []
    cfg = SimpleNamespace(
        model=SimpleNamespace(path="base", quantization=None),
        data=SimpleNamespace(max_length=64, sources=[], eval=None),
    )
    rows = SimpleNamespace(examples=[], read=0, dropped={}, truncated=0)
    run = SimpleNamespace(
        cfg=cfg, train_data=rows, pretrained=SimpleNamespace(base={}), state=SimpleNamespace(trained={}), kernel="x",
        num_steps=40, start=start, eval_data=None,
    )  # fmt: skip
    opening.announce.__wrapped__(run, SimpleNamespace(say=said.append, plain=False))
    (tmp_path / "log").write_text("\n".join(said) + "\n")
    with mock.patch.dict(os.environ), mock.patch.object(sys, "path", [*sys.path]):  # which it sets for campaigns
        trials = importlib.import_module("trials")
    assert trials.began_at(tmp_path / "log") == start


@pytest.mark.slow
def test_random_kills():
    assert campaign("kills", 10).startswith("kills seed 0: 10 kills")


@pytest.mark.slow
def test_kills_at_write_boundaries():
    assert "10 of " in campaign("boundaries", 10)


@pytest.mark.slow
def test_damage():
    assert "10 of " in campaign("damage", 10)


@pytest.mark.slow
def test_a_seed_without_cases_is_no_success():
    done = run("damage", 9, 10)
    assert done.returncode == 1 and "take a lower one" in done.stderr, done.stdout + done.stderr


@pytest.mark.slow
def test_full_disk():
    assert "3 runs on a disk" in campaign("full-disk", 3)


@pytest.mark.slow
def test_signals():
    assert "3 storms" in campaign("signals", 3)


@pytest.mark.slow
def test_stuck():
    assert "1 jobs of four" in campaign("stuck", 1)
