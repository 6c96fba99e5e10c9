"""scripts/benchmark at a tiny size: its JSON, that both sides train the same, and that it refuses where they do not.

No test asks for a speed.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from load_script import load_script

from jlora.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmark"
benchmark = load_script("benchmark")

CONTRACT = {
    "mode": str,
    "ours_tokens_per_second": float,
    "peer_tokens_per_second": float,
    "peer_mode": str,
    "ratio": float,
    "ours_peak_rss": int,
    "peer_peak_rss": int,
    "rss_ratio": float,
    "alternations": int,
}
TINY = "--dim 32 --ffn 64 --layers 2 --heads 4 --vocab 300 --rank 4 --alternations 2 --threads 1".split()


def run(*arguments: str) -> subprocess.CompletedProcess:
    """The script in a process of its own, with this checkout's jlora."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def figures(*arguments: str) -> dict:
    """What it prints with --json, which is all that it prints on stdout."""
    done = run(*arguments, *TINY, "--json", "-q")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {name: type(result[name]) for name in CONTRACT} == CONTRACT
    assert result["alternations"] == 2
    assert min(result[name] for name, kind in CONTRACT.items() if kind is not str) > 0
    # Each process holds an interpreter and its libraries, and no process counts another's memory.
    assert 2**27 < result["ours_peak_rss"] < 2**32 and 2**27 < result["peer_peak_rss"] < 2**32
    assert result["rss_ratio"] == result["ours_peak_rss"] / result["peer_peak_rss"]
    return result


@pytest.mark.slow
def test_dense_trains_the_same_on_both_sides():
    result = figures("--mode", "dense", "--length", "32", "--batch", "2", "--peer-modes", "checkpointing")
    assert result["mode"] == "dense" and result["peer_mode"] == "checkpointing"
    assert set(result["trained"]) == {"ours", "checkpointing"}
    assert result["tokens"] == 2 * 3 * 2 * 32
    assert abs(result["losses"]["ours"] - np.log(300)) < 0.1  # random weights know nothing of random tokens
    assert result["loss_difference"] < 1e-4  # over all steps


@pytest.mark.slow
def test_rows_packs_ours_and_pads_the_peers(tmp_path):
    tiny.make_tokenizer(tmp_path / "tokenizer")
    data = tiny.make_rows(tmp_path / "rows.jsonl", 40)
    result = figures(
        *("--mode", "rows", "--data", str(data), "--tokenizer", str(tmp_path / "tokenizer"), "--length", "320"),
        *("--rows", "12", "--peer-batch", "4", "--peer-modes", "eager"),
    )
    assert result["mode"] == "rows" and result["peer_mode"] == "eager"
    # The losses are those of the first batch, whose rows are packed on one side and padded on the other.
    assert result["loss_difference"] < 1e-4 and 5 < result["losses"]["ours"] < 6.5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dense", "rows"])
def test_the_peer_compiled(mode, tmp_path):
    tiny.make_tokenizer(tmp_path / "tokenizer")
    data = tiny.make_rows(tmp_path / "rows.jsonl", 40)
    result = figures(
        *("--mode", mode, "--data", str(data), "--tokenizer", str(tmp_path / "tokenizer"), "--length", "320"),
        *("--rows", "12", "--peer-batch", "4", "--peer-modes", "compile"),
    )
    assert result["peer_mode"] == "compile" and result["loss_difference"] < 1e-4


@pytest.mark.slow
def test_every_weight_trained_on_both_sides():
    result = figures("--mode", "dense", "--method", "full", "--length", "32", "--batch", "2", "--peer-modes", "eager")
    assert result["method"] == "full" and result["loss_difference"] < 1e-4
    assert abs(result["losses"]["ours"] - np.log(300)) < 0.1  # of the base, whose adapter is not there


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dense", "rows"])
@pytest.mark.parametrize("package", ["tunix", "torchtune"])
def test_a_peer_with_an_interpreter_of_its_own(mode, package, tmp_path):
    python = ROOT / "build" / f"venv-{package}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{package} has no environment here; docs/performance.md says how to make one")
    tiny.make_tokenizer(tmp_path / "tokenizer")
    data = tiny.make_rows(tmp_path / "rows.jsonl", 40)
    result = figures(
        *("--mode", mode, "--data", str(data), "--tokenizer", str(tmp_path / "tokenizer"), "--length", "320"),
        *("--rows", "12", "--peer-batch", "4", "--peer-python", f"{package}={python}", "--peer-modes", package),
    )
    assert result["peer_mode"] == package and result["loss_difference"] < 1e-4
    assert package in " ".join(result["versions"][package])  # google-tunix, or torchtune


@pytest.mark.slow
def test_ceiling_and_sweep(tmp_path):
    shape = ("--length", "64", "--batch", "2", "--json", *TINY)
    ceiling = json.loads(run("--mode", "ceiling", *shape).stdout)
    # More than the base's products, which the step has beside attention, adapters and the logits made twice.
    products = benchmark_costs().products(argparse.Namespace(batch=2, length=64, dim=32, ffn=64, layers=2, vocab=300))
    base = sum(2 * rows * inner * columns * times for rows, inner, columns, times in products.values())
    assert base < ceiling["step_flops"] < 2 * base
    assert ceiling["utilisation"] == pytest.approx(
        ceiling["step_flops"] / ceiling["step_seconds"] / ceiling["xla_flops_per_second"]
    )
    picture = tmp_path / "sweep.png"
    done = run("--mode", "sweep", *shape, "--lengths", "32", "64", "--ranks", "4", "8", "--plot", str(picture))
    sweep = json.loads(done.stdout)
    assert [point["tokens"] for point in sweep["lengths"]] == [32, 64]
    assert sweep["ranks"][0]["flops"] < sweep["ranks"][1]["flops"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def benchmark_costs():
    """The script's other half."""
    import benchmark_costs

    return benchmark_costs


def answers(rates: list[float], losses: list[float], tokens: int = 100, peak: int = 1000) -> list[dict]:
    """What a process would say: two warm-ups, then one part for each rate."""
    said = [
        {"seconds": tokens / rate, "cpu": 2 * tokens / rate, "tokens": tokens, "losses": losses}
        for rate in [1.0, 1.0, *rates]
    ]
    rest = {
        "peak_rss": peak,
        "peak_device": None,
        "idle_cpu": 0.0,
        "idle": 1.0,
        "attention": "reference",
        "versions": {},
    }
    return [answer | rest for answer in said]


def arguments(**changed) -> argparse.Namespace:
    """Those of a mode with two peers."""
    return argparse.Namespace(
        **({"mode": "dense", "peer_modes": ("eager", "compile"), "alternations": 3} | changed),
        threads=1,
        platform="cpu",
        dtype="float32",
        peer_huge_pages=False,
        devices=1,
        method="lora",
    )


def test_the_best_peer_counts_and_neighbours_in_time_are_compared():
    said = {
        "ours": answers([30.0, 60.0, 90.0], [5.0, 4.0], peak=900),
        "eager": answers([10.0, 20.0, 30.0], [5.0, 4.0], peak=500),
        "compile": answers([20.0, 30.0, 90.0], [5.0004, 4.0], peak=600),
    }
    result = benchmark.result_of(arguments(), said)
    assert result["peer_mode"] == "compile" and result["peer_tokens_per_second"] == pytest.approx(30.0)
    assert result["ours_tokens_per_second"] == pytest.approx(60.0)
    assert result["trained"]["ours"]["tokens_per_core_second"] == pytest.approx(30.0)
    assert result["ratio"] == pytest.approx(1.5)  # of 1.5, 2 and 1
    assert result["rss_ratio"] == 1.5 and result["loss_difference"] == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (answers([10.0] * 3, [5.0, 4.002]), "losses differ by 0.002"),
        (answers([10.0] * 3, [5.0, float("nan")]), "losses differ by nan"),
        (answers([10.0] * 3, [5.0, 4.0], tokens=99), "number of tokens"),
    ],
)
def test_sides_that_differ_are_refused(theirs, message):
    said = {"ours": answers([10.0] * 3, [5.0, 4.0]), "eager": theirs}
    with pytest.raises(benchmark.Disagreement, match=message) as refused:
        benchmark.result_of(arguments(peer_modes=("eager",)), said)
    assert refused.value.exit_code == 1


def test_a_law_is_found_again_in_its_points():
    costs = benchmark_costs()
    lengths = [
        {"tokens": t, "seconds": 0.1 + 2e-3 * t + 1e-6 * t**2, "flops": 1.0, "rank": 16} for t in (256, 512, 2048, 8192)
    ]
    ranks = [{"tokens": 100, "rank": r, "seconds": s, "flops": 1.0} for r, s in ((4, 1.0), (64, 1.1), (256, 3.0))]
    found = costs.conclude(lengths, ranks)
    fit = found["fit"]
    assert (fit["seconds"], fit["per_token"], fit["per_token_squared"]) == pytest.approx((0.1, 2e-3, 1e-6))
    assert fit["deviation"] < 1e-6 and found["rank_spread"] == pytest.approx(0.1)  # rank 256 is not asked about


def test_what_is_missing_is_named(monkeypatch):
    done = run("--mode", "rows")
    assert done.returncode == 2 and "--tokenizer" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run("--mode", "fast")
    assert done.returncode == 2 and "invalid choice" in done.stderr
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"torch and peft, not installed here; pip install 'jlora\[test\]'"):
        benchmark.check(argparse.Namespace())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--peer-modes", "tunix"], "--peer-modes: tunix needs --peer-python tunix=PYTHON; python3.12 -m venv"),
        (["--peer-python", "tunix=/none/python"], "--peer-python: /none/python does not run: No such file"),
        (["--peer-python", f"torchtune={sys.executable}"], f"--peer-python: {sys.executable} has no torchtune"),
        (["--peer-python", "axolotl=python"], "--peer-python: axolotl is not known"),
        (["--peer-python", "tunix=python", "--platform", "gpu"], "are timed on CPUs alone"),
    ],
)
def test_an_interpreter_that_does_not_do_is_named(given, message):
    done = run("--mode", "dense", *given)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_rows_of_one_batch_are_counted_as_they_lie():
    import benchmark_sides

    assert [benchmark_sides._in_order([6, 5, 4, 1], count, 10) for count in range(5)] == [0, 1, 2, 2, 2]
    assert benchmark_sides._in_order([6, 5, 4, 2], 4, 10) == 3


def test_a_bad_row_ends_it_with_the_exit_code_of_bad_data(tmp_path):
    tiny.make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a"}\n', encoding="utf-8")
    done = run(
        "--mode", "rows", "--data", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), *TINY
    )
    assert done.returncode == 3 and "rows.jsonl:1: the field" in done.stderr and done.stderr.count("error") == 1
