"""The planner: the real step compiled from shapes, its counts against arithmetic, and its refusals."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import GPU_COMPILERS, needs_gpu_compiler
from load_script import load_script
from tiny import make_llama, make_rows, make_tokenizer, write_config

import jlora.plan
from jlora.config import load_config
from jlora.errors import ConfigError
from jlora.hf.planned import model_shape
from jlora.hf.shapes import SHAPES
from jlora.model import attention
from jlora.model.llama import abstract_decoder
from jlora.model.sharding import make_mesh
from jlora.planning import topology
from jlora.planning.compiled import abstract_step, naive
from jlora.planning.flops import count_flops
from jlora.planning.hardware import GPUS, TPUS
from jlora.planning.topology import resolve
from jlora.reports.figures import duration
from jlora.training.step import Forward, count_parameters

CONTRACT = {
    *("topology", "devices", "fits", "capacity_bytes", "peak_bytes", "argument_bytes", "temp_bytes", "base_bytes"),
    *("adapter_bytes", "optimizer_bytes", "flops_per_step", "tokens_per_step", "trainable_params", "frozen_params"),
    *("compile_seconds", "seconds_per_epoch_at", "cost_usd_at", "naive"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    # Head counts and widths that divide over two tensor and four fsdp devices.
    make_llama(folder / "base", num_attention_heads=4, head_dim=12)
    make_tokenizer(folder / "base")
    make_rows(folder / "rows.jsonl")
    return write_config(folder / "c.yaml", folder / "base", folder / "rows.jsonl", folder / "run")


def plan(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A real `python -m jlora.plan`: what it sets up for absent hardware must not reach other tests."""
    command = [sys.executable, "-m", "jlora.plan", "--config", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


# Longer than the rows, so that several pack into one.
PRICED = ("--topology", "cpu:1", "--price", "2.5", "--tokens-per-second", "100", "data.max_length=800")


@pytest.fixture(scope="module")
def table(config) -> str:
    """What a plan prints for people."""
    done = plan(config, *PRICED)
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout


def test_json_holds_the_contract_and_the_arithmetic(config):
    overrides = (
        "mesh.tensor=2",
        "training.batch_size=8",
        "data.max_length=800",
        "--price",
        "2.5",
        "--tokens-per-second",
        "100",
    )
    done = plan(config, "--topology", "cpu:8", "--json", *overrides)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() >= CONTRACT
    assert result["devices"] == 8 and result["fits"]
    assert result["mesh"] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert result["tokens_per_step"] == 8 * 800
    # Two moments in float32 for each trained parameter, laid out like it, and two counters.
    assert result["optimizer_bytes"] == pytest.approx(2 * result["adapter_bytes"], abs=16)
    held = sum(result[f"{name}_bytes"] for name in ("base", "adapter", "optimizer", "batch"))
    assert result["argument_bytes"] == pytest.approx(held, rel=0.01)
    # Split over 8 devices, but for norms and factors that have only one of the two axes.
    total = 4 * result["frozen_params"]
    assert total / 8 <= result["base_bytes"] < total / 8 * 1.2
    assert result["data"]["rows"] == 24 and result["data"]["packed"] < result["data"]["padded"]
    for name in ("packed", "padded"):
        (seconds,), (cost,) = (result[k][name].values() for k in ("seconds_per_epoch_at", "cost_usd_at"))
        assert seconds == pytest.approx(result["data"][name] * 8 * 800 / (100 * 8))
        assert cost == pytest.approx(seconds / 3600 * 8 * 2.5)


def test_table_for_people(table):
    for words in (
        "cpu:1: fits",
        "capacity",
        "full fine-tuning would take",
        " MB over all devices",
        "FLOPs",
        "the process takes more",
    ):
        assert words in table, words


@pytest.mark.long
def test_held_out_rows_take_no_time_and_cpus_have_no_peak(config):
    whole, part = (json.loads(plan(config, *PRICED, f"data.eval={share}", "--json").stdout) for share in ("null", 0.25))
    assert (whole["data"]["rows"], part["data"]["rows"]) == (24, 18)
    table = plan(config, "--topology", "cpu:1").stdout
    trained, frozen = whole["trainable_params"], whole["frozen_params"]
    assert f"{frozen:,} parameters, {trained:,} trained" in table and "--tokens-per-second" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology", "gpu:h1000:2"], ["unknown topology 'gpu:h1000:2'", "h100-80gb", "--topology list"]),
        (["--topology", "cpu:0"], ["unknown topology"]),
        (["--topology", "gpu:absent.yaml:2"], ["absent.yaml: no such file"]),
        (["--topology", "cpu:1", "--search", "--compilations", "0"], ["--compilations"]),
        (["--topology", "cpu:1", "--tokens-per-second", "0"], ["--tokens-per-second 0", "positive"]),
        (["--topology", "cpu:1", "--tokens-per-second", "nan"], ["--tokens-per-second nan", "positive"]),
        (["--topology", "cpu:1", "--tokens", "0"], ["--tokens 0", "positive"]),
        (["--topology", "cpu:1", "--price", "-2.5"], ["--price -2.5", "positive"]),
        (["--topology", "cpu:1", "--utilization", "0.4", "0"], ["--utilization 0", "share of the peak"]),
        (["--topology", "cpu:1", "--utilization", "40"], ["--utilization 40", "share of the peak"]),
        ([], ["--topology"]),
    ],
)
def test_refusals_before_a_device_is_asked_for(config, arguments, words, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["jlora.plan", "--config", str(config), *arguments, "-q"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as exit:
        jlora.plan.main()
    said = capfd.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    for word in words:
        assert word in said, word


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--topology", "cpu:8", "mesh.tensor=3"], 2, ["does not cover 8 devices"]),
        (["--topology", "cpu:1", "--plot", "a.nonsense"], 2, ["a.nonsense", ".png"]),
        (["--topology", "cpu:3", "mesh.tensor=3"], 2, ["mesh.tensor=3 does not divide", "1 or 2 would"]),
        (["--topology", "cpu:8"], 2, ["cannot be split over 8"]),
        (["--topology", "cpu:1", "model.path=llama2-70b"], 5, ["does not fit by", "GiB"]),
    ],
)
def test_refusals(config, arguments, code, words):
    done = plan(config, *arguments, "-q")
    assert done.returncode == code and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, word


def test_topology_list():
    command = [sys.executable, "-m", "jlora.plan", "--topology", "list"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    for name in (*GPUS, *TPUS):
        assert name in done.stdout


def flops_per_token_and_parameter(config: Path, *overrides: str) -> float:
    cfg = load_config(config, ["model.path=llama2-7b", "data.max_length=512", "training.batch_size=1", *overrides])
    model = model_shape("llama2-7b")
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    forward = Forward(attention.reference, cfg.model.remat, jax.numpy.dtype("bfloat16"))
    with jax.set_mesh(mesh):
        step, arguments, params = abstract_step(cfg, model, mesh, forward)
        flops = count_flops(jax.make_jaxpr(step)(*arguments).jaxpr)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params["base"]))
    return flops / 512 / num_params


def test_lora_makes_no_gradient_of_the_base(config):
    """4 N a token: forward and activation gradients; the weights' own gradients would make it 6 N."""
    assert 3.9 < flops_per_token_and_parameter(config, "model.remat=none") < 4.6
    # Recomputing a layer stops short of its last product, whose result nothing needs.
    assert 5.4 < flops_per_token_and_parameter(config, "model.remat=full") < 6.4
    assert 5.9 < flops_per_token_and_parameter(config, "model.remat=none", "method=full") < 6.8


@pytest.mark.long
def test_flops_are_the_same_over_every_mesh(config):
    """Also where devices take their shares of a product by hand."""
    settings = ("--topology", "cpu:2", "--json", "training.batch_size=2", "data.max_length=1024")
    found = [plan(config, *settings, *mesh) for mesh in (("mesh.fsdp=2",), ("mesh.fsdp=1", "mesh.tensor=2"))]
    assert all(done.returncode == 0 for done in found), [done.stderr for done in found]
    flops = {json.loads(done.stdout)["flops_per_step"] for done in found}
    assert len(flops) == 1


def test_flops_are_the_compilers_where_it_can_count(config, monkeypatch):
    """XLA counts a loop's body once, so one layer and one chunk are compared."""
    monkeypatch.setattr("jlora.training.objective.chunk_size", lambda num_tokens, vocab: num_tokens)
    cfg = load_config(config, ["data.max_length=128", "training.batch_size=4"])
    model = type(m := model_shape(cfg.model.path))(**vars(m) | {"num_hidden_layers": 1})
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        forward = Forward(attention.reference, "none", jax.numpy.dtype("float32"))
        step, arguments, _ = abstract_step(cfg, model, mesh, forward)
        ours = count_flops(jax.make_jaxpr(step)(*arguments).jaxpr)
        theirs = jax.jit(step).lower(*arguments).compile().cost_analysis()["flops"]
    # XLA counts elementwise work too, which is not small at this width.
    assert ours < theirs < 1.6 * ours


# Parameters in billions, as the models' makers say them.
PUBLISHED = {"llama2-7b": 6.74, "llama2-13b": 13.02, "llama2-70b": 68.98, "qwen3-8b": 8.19, "qwen3-32b": 32.76}
PUBLISHED |= {"distilgpt2": 0.0819, "gpt2": 0.1244, "gpt2-medium": 0.3548, "gpt2-large": 0.7740, "gpt2-xl": 1.5576}
PUBLISHED |= {"gemma3-12b": 11.77, "gemma3-27b": 27.01, "phi4-14b": 14.66}


def test_named_sizes_are_those_of_the_models():
    assert SHAPES.keys() == PUBLISHED.keys()
    for name, billions in PUBLISHED.items():
        decoder = abstract_decoder(model_shape(name), jnp.dtype("bfloat16"))
        assert count_parameters(decoder) / 1e9 == pytest.approx(billions, rel=1e-3), name


def test_naive_column_of_70b():
    model = model_shape("llama2-70b")
    assert (model.hidden_size, model.num_key_value_heads, model.head_dim) == (8192, 8, 128)
    figures = naive(68_976_648_192)
    assert round(figures["total_min"] / 1e9) == 414 and round(figures["total"] / 1e9) == 828


def test_the_lectures_sum(config):
    """200 million tokens at 400 tokens a second on each of 7 devices take about 20 hours, from the command line."""
    speed = ("--tokens", "200e6", "--tokens-per-second", "400", "--price", "2")
    done = plan(config, "--topology", "cpu:7", "training.batch_size=7", "mesh.data=7", "mesh.fsdp=1", *speed, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    (hours,) = (seconds / 3600 for seconds in result["seconds_per_epoch_at"]["given"].values())
    assert hours == pytest.approx(200e6 / (400 * 7) / 3600) and 19.5 < hours < 20.5
    assert result["cost_usd_at"]["given"]["400 tokens/s/device"] == pytest.approx(hours * 7 * 2)
    assert result["epoch_tokens"]["given"] == 200e6


def test_time_and_cost_are_a_table_of_the_users_own_rows(config, table):
    counts = json.loads(plan(config, *PRICED, "--json").stdout)["data"]
    for name in ("packed", "padded"):
        (line,) = (line for line in table.splitlines() if f" {name} " in line)
        tokens, speed, time, dollars = (cell.strip() for cell in line.split("│")[2:6])
        assert tokens == f"{counts[name + '_tokens']:,}" == f"{counts[name] * 4 * 800:,}"
        assert speed == "100 tokens/s/device"
        assert time == duration(counts[name + "_tokens"] / 100)
        assert dollars == f"{counts[name + '_tokens'] / 100 / 3600 * 2.5:,.2f}"
    assert f"{counts['rows']} rows" in table and counts["packed_tokens"] < counts["padded_tokens"]


@pytest.mark.slow
def test_the_planned_step_is_taken_on_random_weights(config, capsys):
    script = load_script("plan_measured")
    sizes = ["data.max_length=64", "training.batch_size=2", "model.quantization=int8"]
    result = script.measure(load_config(config, sizes), 2)
    assert len(result["seconds"]) == 3 and min(result["seconds"]) > 0.0
    assert result["planned_bytes"] > result["argument_bytes"] > 0 and result["measured_bytes"] is None
    assert result["tokens_per_second"] == pytest.approx(2 * 64 / result["seconds_per_step"])
    assert abs(result["loss"] - np.log(300)) < 1.0  # random weights know nothing of random tokens
    script.show(result)
    assert "GiB planned, not counted by this backend" in capsys.readouterr().out
    # As `train` does it: the fastest that fits, for which the whole machine has room.
    assert script.measure(load_config(config, ["model.remat=auto", *sizes]), 1)["remat"] == "none"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_a_missing_compiler_is_named():
    with pytest.raises(Exception, match=r"pip install 'jlora\[tpu\] @ git\+https"):
        resolve("tpu:v5e:2x4")


@pytest.mark.parametrize("installed", GPU_COMPILERS)
def test_either_compiler_for_gpus_will_do(installed, monkeypatch):
    """None is looked for where one is there; what compiles is JAX's own choice."""
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: name == installed or None)
    described = mock.Mock(return_value=mock.Mock(devices=["a", "b"]))
    monkeypatch.setattr(topology.topologies, "get_topology_desc", described)
    assert resolve("gpu:h100-80gb:2").devices == ["a", "b"]
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jlora\[cuda12\] @ git\+https"):
        resolve("gpu:h100-80gb:2")


@needs_gpu_compiler
def test_7b_on_an_absent_h100(config):
    overrides = ("model.path=llama2-7b", "model.remat=full", "model.dtype=bfloat16", "data.max_length=4096")
    done = plan(config, "--topology", "gpu:h100-80gb:1", "--json", "training.batch_size=1", *overrides)
    assert done.returncode == 0, done.stderr
    assert 13 * 2**30 < json.loads(done.stdout)["peak_bytes"] < 22 * 2**30


@pytest.mark.parametrize("flag", ["--topo", "--to"])
def test_options_are_not_abbreviated(config, flag, monkeypatch, capsys):
    """A child that took another topology than its own for one more would start children without end."""
    monkeypatch.setattr(jlora.plan.subprocess, "run", mock.Mock(side_effect=AssertionError("a child is started")))
    monkeypatch.setattr(sys, "argv", ["jlora.plan", "--config", str(config), flag, "cpu:1", flag, "cpu:2"])
    with pytest.raises(SystemExit) as end:
        jlora.plan.main()
    assert end.value.code == 2 and f"unrecognized arguments: {flag}" in capsys.readouterr().err


def test_a_child_has_no_children_and_imports_from_where_this_process_does(config, tmp_path, monkeypatch):
    """Code that lies in the folder of the moment, which the console script does not run, is not run by its children."""
    for name in ("yaml", "optax", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the folder was run')", encoding="utf-8")
    arguments = ["--config", str(config), "--topology=abacus:1", "--topology", "abacus:2", "-q", "lora.rank=2"]
    show = f"import sys; sys.argv = ['plan', *{arguments}]; from jlora.plan import main; main()"
    env = os.environ | {"PYTHONPATH": str(Path(jlora.plan.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", show], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    said = [line.partition(";")[0] for line in done.stderr.splitlines()]
    assert said == [f"error: unknown topology 'abacus:{n}'" for n in (1, 2)], done.stderr
    assert (done.returncode, done.stdout) == (2, "")

    started = []
    answer = subprocess.CompletedProcess([], 0, "")
    monkeypatch.setattr(jlora.plan.subprocess, "run", lambda command, **_: started.append(command) or answer)
    monkeypatch.setattr(sys, "argv", ["jlora.plan", *arguments])
    with pytest.raises(SystemExit):
        jlora.plan.main()
    assert [next(part for part in command if "--nth" in part) for command in started] == ["--nth=0", "--nth=1"]
    monkeypatch.setattr(sys, "argv", ["jlora.plan", "--nth=1", *arguments])
    monkeypatch.setattr(topology, "resolve", mock.Mock(side_effect=RuntimeError))
    monkeypatch.setattr(topology, "prepare", lambda: None)
    with pytest.raises(RuntimeError):
        jlora.plan.main()
    assert topology.resolve.call_args.args == ("abacus:2",) and len(started) == 2
