"""The planner's search, its remedies, its refusals, the counts that they rest on, cards from files, and the picture."""

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml
from rich.console import Console
from tiny import make_llama, make_rows, make_tokenizer, write_config

from jlora.config import load_config
from jlora.errors import ConfigError
from jlora.hf.planned import model_shape
from jlora.model.divisibility import check_divides
from jlora.model.sharding import MESH_AXES
from jlora.planning import layouts, search, speed
from jlora.planning.answer import time_and_cost
from jlora.planning.compiled import Plan, fresh
from jlora.planning.hardware import GPUS, Gpu, read_gpu
from jlora.planning.layouts import arithmetic, smallest
from jlora.planning.program import Program, sent_bytes
from jlora.planning.search import find_remedy, sentence
from jlora.planning.topology import Target
from jlora.reports import plan as plan_page
from jlora.training.auto_remat import Layout, saved_bytes

# A peak for tests of order alone.
TARGET = Target("gpu:a:4", "gpu", [None] * 4, 80, 1e12, 1e11, 1e10)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    make_llama(folder / "base", num_attention_heads=4, head_dim=12)
    make_tokenizer(folder / "base")
    make_rows(folder / "rows.jsonl")
    return write_config(folder / "c.yaml", folder / "base", folder / "rows.jsonl", folder / "run")


LLAMA_7B = model_shape("llama2-7b")


def plan(config: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jlora.plan", "--config", str(config), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def alone(config) -> dict:
    """The plan of the config on one device."""
    return json.loads(plan(config, "--topology", "cpu:1", "--json").stdout)


def mesh_of(data: int, fsdp: int, tensor: int, context: int = 1) -> jax.sharding.Mesh:
    """An abstract mesh, which is all that a check of sizes needs."""
    return jax.sharding.AbstractMesh((data, fsdp, context, tensor), MESH_AXES)


# What divides.


@pytest.mark.parametrize(
    ("model", "mesh", "length", "words"),
    [
        ("llama2-70b", (1, 1, 16), 4096, ["mesh.tensor=16 does not divide num_key_value_heads=8; 1, 2, 4 or 8 would"]),
        ("llama2-70b", (1, 1, 3), 4096, ["num_attention_heads=64", "intermediate_size=28672", "1, 2, 4 or 8 would"]),
        ("llama2-7b", (1, 3, 1), 4096, ["mesh.fsdp=3 does not divide hidden_size=4096", "1, 2, 4 or 8 would"]),
        ("llama2-13b", (1, 1, 16), 4096, ["num_attention_heads=40", "1, 2, 4 or 8 would"]),
        ("llama2-70b", (1, 1, 8), 1004, ["mesh.tensor=8 does not divide data.max_length=1004; 1, 2 or 4 would"]),
        ("llama2-70b", (1, 1, 1, 4), 1004, ["mesh.context=4; make it a multiple of 8, such as 1008, or"]),
        ("llama2-70b", (1, 1, 4, 4), 1016, ["mesh.context=4 x tensor=4; make it a multiple of 16, such as 1024, or"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_would(config, model, mesh, length, words):
    cfg = load_config(config, [f"data.max_length={length}"])
    with pytest.raises(ConfigError) as refused:
        check_divides(model_shape(model), mesh_of(*mesh), cfg)
    for word in words:
        assert word in str(refused.value)


def test_sizes_that_divide_pass(config):
    for mesh in ((1, 1, 8), (2, 4, 2), (1, 64, 4), (1, 1, 8, 64), (1, 1, 1, 2048)):
        check_divides(model_shape("llama2-70b"), mesh_of(*mesh), load_config(config, ["data.max_length=4096"]))


def test_train_refuses_what_does_not_divide_before_it_reads_a_row(config):
    command = [sys.executable, "-m", "jlora.train", "--config", str(config), "mesh.tensor=3", "training.batch_size=3"]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "3"}
    done = subprocess.run([*command, "data.train=absent.jsonl"], capture_output=True, text=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "mesh.tensor=3 does not divide" in done.stderr


# Counts.

HLO = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gather = f32[8,4]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %again = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %start = (bf16[16]{0}, bf16[32]{0}) all-gather-start(%y), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'a'}
  %done = bf16[32]{0} all-gather-done(%start)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (input: f32[64]) -> f32[16] {
  %sum = f32[64]{0} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%add
}

%few (p: f32[8]) -> f32[8] {
  ROOT %small = f32[8]{0} all-reduce(%p), channel_id=4, replica_groups={{0,1}}, to_apply=%add
}

%none (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %told = (s32[], f32[8]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %fused = f32[16]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %either = f32[8]{0} conditional(%p, %a, %a), true_computation=%few, false_computation=%none, metadata={}
  %moved = f32[10]{0} collective-permute(%a), channel_id=5, source_target_pairs={{0,1},{1,0}}
  ROOT %shard = f32[2]{0} reduce-scatter(%a), channel_id=6, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
"""


def test_bytes_of_collectives_by_hand():
    body = 8 * 4 * 4 * 3 / 4 + 32 * 2 / 2
    rest = 64 * 4 * 3 / 4 + 2 * 8 * 4 / 2 + 10 * 4 + 2 * 4 * 3
    assert sent_bytes(Program(HLO).operations()) == 3 * body + rest
    # Without the compiler's own word, the constant of the condition.
    untold = HLO.replace('"known_trip_count":{"n":"3"}', "")
    assert sent_bytes(Program(untold).operations()) == 5 * body + rest


@pytest.mark.long
def test_bytes_of_a_real_program(config, alone):
    """Weights gathered over fsdp, forward and backward: at least both; and nothing at all on one device."""
    split = json.loads(plan(config, "--topology", "cpu:4", "mesh.fsdp=4", "--json").stdout)
    assert alone["sent_bytes_per_step"] == 0
    whole = 4 * split["frozen_params"]
    assert 2 * whole * 3 / 4 * 0.8 < split["sent_bytes_per_step"] < 6 * whole


def test_the_guess_adds_up():
    target = dataclasses.replace(TARGET, product_flops=1e12 / speed.PRODUCTS)
    figures = dict(flops=8e12, temp_bytes=5e9, sent_bytes=1e10, micro_batches=2)
    weights = dict(weight_bytes=1e10, dequantized_bytes=0.0)
    compute, links = 2.0, 1.0 / speed.LINKS
    found = arithmetic(target, **figures, **weights, remat="full")
    assert found == pytest.approx(compute + links + 2 * (3 * 1e10 + 2e10) / 1e11 / speed.MEMORY)
    found = arithmetic(target, **figures, **weights, remat="none")
    assert found == pytest.approx(compute + links + 0.8 / speed.MEMORY)
    assert arithmetic(dataclasses.replace(target, peak_flops=None), **figures, **weights, remat="full") == 0.0
    # In a quarter of the bytes, yet dequantised in each pass: written, and read again.
    quantized = arithmetic(target, **figures, weight_bytes=2.5e9, dequantized_bytes=1e10, remat="full")
    assert quantized == pytest.approx(compute + links + 2 * (3 * 2.25e10 + 2e10) / 1e11 / speed.MEMORY)


def test_hours_and_dollars_follow_the_estimate(config, alone):
    step = {"low": 1.0, "mid": 2.0, "high": 3.0, "seconds_per_step": 2.0, "tokens_per_second_per_device": 5.0}
    step |= {"compute_seconds": 1.0, "memory_seconds": 1.0, "link_seconds": 0.0}
    tree = {field.name: alone[field.name] for field in dataclasses.fields(Plan)} | {"devices": 2, "estimate": step}
    asked = argparse.Namespace(
        tokens=3600.0 * tree["tokens_per_step"], tokens_per_second=None, utilization=[0.5], price=2.5
    )
    found = time_and_cost(Plan(**tree), load_config(config), TARGET, asked)
    assert found["seconds_per_epoch"] == {"given": {"low": 3600.0, "mid": 7200.0, "high": 10800.0}}
    assert found["cost_usd"] == {"given": {"low": 5.0, "mid": 10.0, "high": 15.0}}
    assert found["seconds_per_epoch_at"]["given"].keys() == {"0.5"}
    lines = io.StringIO()
    Console(file=lines, width=200).print(plan_page.time_table(tree | found))
    assert "1 h 00 min to 3 h 00 min" in lines.getvalue() and "5.00 to 15.00" in lines.getvalue()


# Search. What the compiler would say is a formula here: 10 held, and a share of the saved bytes; sizes in KiB.


SIZES = {None: 1.0, "int8": 0.5, "nf4": 0.25}


def weights(quantization: str | None) -> dict[str, float]:
    return {"weight_bytes": 1e9 * SIZES[quantization], "dequantized_bytes": 1e9 if quantization else 0.0}


def fake(monkeypatch, config, capacity: float, per_row: dict[str, float], spread: float = 60.0, batch: int = 8):
    """A config and a target whose plans come from arithmetic; the calls are counted."""
    calls = []

    def plan_of(cfg, target, model, flops):
        calls.append(cfg)
        shards, parts = cfg.mesh.data * cfg.mesh.fsdp, cfg.training.gradient_accumulation_steps
        rows = cfg.training.batch_size // parts // shards
        argument, split = held_bytes(cfg, target, model), cfg.mesh.tensor * cfg.mesh.context
        temporaries = round(2**10 * (1 + rows * per_row[cfg.model.remat] * cfg.data.max_length / 64 / split))
        sent = 1e9 * (cfg.mesh.fsdp - 1) * parts + 1e10 * (cfg.mesh.tensor - 1)
        tokens = cfg.training.batch_size * cfg.data.max_length
        figures = dict(temp_bytes=temporaries, sent_bytes=sent, micro_batches=parts, remat=cfg.model.remat)
        figures |= weights(cfg.model.quantization)
        return Plan(
            **{"topology": target.spec, "devices": 4, "mesh": cfg.mesh.model_dump(), "capacity_bytes": target.capacity},
            remat=cfg.model.remat,
            **{"fits": argument + temporaries <= target.capacity, "peak_bytes": argument + temporaries},
            **{"argument_bytes": argument, "temp_bytes": temporaries, "base_bytes": argument, "adapter_bytes": 0},
            **{"optimizer_bytes": 0, "batch_bytes": 0, "flops_per_step": flops, "sent_bytes_per_step": sent},
            **{"tokens_per_step": tokens, "compile_seconds": 0.0},
            **{"attention": "xla", "offloaded_bytes": None, "trainable_params": 1, "frozen_params": 1, "naive": {}},
            estimate={"seconds_per_step": arithmetic(target, flops=flops, **figures)},
        )

    work = {"none": 4e12, "lean": 4.5e12, "qkv": 4.8e12, "attention": 5e12, "full": 6e12, "offload": 6e12}
    monkeypatch.setattr(search, "plan", plan_of)
    monkeypatch.setattr(search, "saved_bytes", lambda *_: 0.0)
    monkeypatch.setattr(search.Compiler, "flops", lambda self, remat: work[remat])

    def held_bytes(cfg, target, model):
        return round(2**10 * spread * SIZES[cfg.model.quantization] / (cfg.mesh.fsdp * cfg.mesh.tensor))

    monkeypatch.setattr(search, "held_bytes", held_bytes)

    def guess(model, cfg, target, layout, flops):
        shards, parts = layout.fsdp, layout.micro_batches
        sent = 1e9 * (shards - 1) * parts + 1e10 * (layout.tensor - 1)
        figures = dict(temp_bytes=0, sent_bytes=sent, micro_batches=parts, remat=layout.remat)
        figures |= weights(layout.quantization)
        return (arithmetic(target, flops=flops, **figures), 0.0, 0.0)

    monkeypatch.setattr(search, "guess_seconds", guess)
    cfg = load_config(config, [f"training.batch_size={batch}", "data.max_length=64"])
    return cfg, dataclasses.replace(TARGET, capacity=2**10 * capacity), calls


PER_ROW = {"none": 16.0, "lean": 8.0, "qkv": 6.0, "attention": 4.0, "full": 1.0, "offload": 0.75}


@pytest.mark.parametrize("capacity", [20, 30, 45, 70, 400])
def test_search_finds_what_trying_everything_finds(monkeypatch, config, capacity):
    cfg, target, calls = fake(monkeypatch, config, capacity, PER_ROW)
    found = search.search(cfg, target, 1000)
    model = model_shape(cfg.model.path)
    compiler = search.Compiler(cfg, target, model)
    everything = list(layouts.layouts(model, cfg, 4, keep_batch=True))
    searched = len(calls)
    fitting = [layout for layout in everything if compiler.compile(layout).fits]
    best = min(fitting, key=compiler.speed)
    assert found.fits and found.batch_size_kept
    assert found.chosen == best
    assert searched == len(found.tried) < len(everything) / 3


def test_search_says_what_is_smallest_where_nothing_fits(monkeypatch, config):
    cfg, target, _ = fake(monkeypatch, config, 8, PER_ROW)
    found = search.search(cfg, target, 1000)
    assert not found.fits
    assert found.best.peak_bytes == 2**10 * (60 * SIZES["int8"] / 4 + 1 + 1 / 2)  # over fsdp 2 x tensor 2
    cfg, target, calls = fake(monkeypatch, config, 1, PER_ROW)
    found = search.search(cfg, target, 1000)
    assert not found.fits and len(calls) == 1  # the arguments alone are too much: one compilation says by how much


def test_search_keeps_the_batch_and_its_limit(monkeypatch, config):
    cfg, target, calls = fake(monkeypatch, config, 30, PER_ROW)
    found = search.search(cfg, target, 2)
    assert len(calls) == 2 == len(found.tried)
    tree = found.as_json()
    for override in (*tree["overrides"], *(word for tried in tree["tried"] for word in tried["overrides"])):
        assert not override.startswith("training.batch_size") or override == "training.batch_size=8"
    # A batch of 3 rows divides over no mesh of 4 but tensor 4, which the 2 key/value heads refuse.
    cfg, target, _ = fake(monkeypatch, config, 400, PER_ROW, batch=3)
    found = search.search(cfg, target, 10)
    assert found.fits and not found.batch_size_kept and "training.batch_size=4" in found.overrides


def test_layouts_cover_the_run(config):
    cfg = load_config(config, ["training.batch_size=8", "data.max_length=64"])
    found = list(layouts.layouts(model_shape(cfg.model.path), cfg, 8, keep_batch=True))
    assert len(set(found)) == len(found)
    for layout in found:
        assert layout.data * layout.fsdp * layout.tensor == 8 and layout.tensor in (1, 2)  # 2 key/value heads
        assert layout.micro_batches * layout.rows * layout.data * layout.fsdp == 8
        check_divides(model_shape(cfg.model.path), mesh_of(layout.data, layout.fsdp, layout.tensor), cfg)
    assert {layout.remat for layout in found} == {"none", "lean", "qkv", "attention", "full"}
    # The 48 and 60 inputs of its projections are less than a block of 64, which may not be cut.
    cut = {layout.quantization for layout in found if layout.fsdp * layout.tensor > 1}
    assert cut == {None, "int8"} and {layout.quantization for layout in found} == {None, "int8", "nf4"}
    whole = list(layouts.layouts(LLAMA_7B, load_config(config, ["training.batch_size=8"]), 8, keep_batch=True))
    assert {(x.fsdp, x.tensor) for x in whole if x.quantization == "nf4"} == {
        *((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4)),  # 172 blocks do not divide by 8
    }


def test_rows_are_split_where_each_part_is_long(config):
    for length, contexts in ((131_072, {1, 2, 4, 8}), (16_384, {1, 2, 4}), (8191, {1}), (4096, {1})):
        cfg = load_config(config, ["model.path=llama2-7b", "training.batch_size=1", f"data.max_length={length}"])
        found = list(layouts.layouts(LLAMA_7B, cfg, 8, keep_batch=True))
        # One row is one device's by data and fsdp; a tensor of 8 does not divide 8191 tokens.
        assert {layout.context for layout in found} == contexts - ({1} if length % 2 else set())
        for layout in found:
            assert layout.tensor * layout.context == 8 and layout.settings()["mesh.context"] == layout.context
            check_divides(LLAMA_7B, mesh_of(1, 1, layout.tensor, layout.context), cfg)


def test_the_guess_knows_what_splitting_rows_saves_and_sends(config):
    cfg = load_config(config, ["model.path=llama2-7b", "training.batch_size=8", "data.max_length=65536"])
    whole = Layout(8, 1, 1, "full", None, 1, 8)
    split = dataclasses.replace(whole, data=1, context=8)
    assert saved_bytes(LLAMA_7B, cfg, split) == saved_bytes(LLAMA_7B, cfg, whole) / 8
    sent = [layouts.guess_seconds(LLAMA_7B, cfg, TARGET, layout, 1e15)[2] * 8 * 65536 for layout in (whole, split)]
    # Both reduce the adapter's gradients over 8; each of 8 micro-batches goes three times through every layer.
    keys_and_values, queries_and_answers = 2 * 7 / 8, 2 / 8
    assert sent[1] - sent[0] == pytest.approx(8 * 3 * 32 * 65536 * (keys_and_values + queries_and_answers) * 4096 * 4)


def test_a_quantised_layout_is_never_the_faster(config):
    cfg = load_config(config, ["model.path=llama2-7b", "training.batch_size=8", "model.dtype=bfloat16"])
    found = list(layouts.layouts(LLAMA_7B, cfg, 4, keep_batch=True))
    for layout in found:
        plain = dataclasses.replace(layout, quantization=None)
        guesses = [layouts.guess_seconds(LLAMA_7B, cfg, TARGET, x, 1e15)[0] for x in (plain, layout)]
        assert guesses[0] < guesses[1] or layout == plain


@pytest.mark.slow
def test_search_from_the_command_line(config):
    sizes = ("--topology", "cpu:4", "training.batch_size=8", "--compilations", "3")
    done = plan(config, *sizes, "--search", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["best"]["fits"] and 1 <= len(found["tried"]) <= 3
    assert {word.partition("=")[0] for word in found["overrides"]} >= {
        *("mesh.data", "mesh.fsdp", "mesh.tensor", "model.remat"),
        *("training.batch_size", "training.gradient_accumulation_steps"),
    }
    again = plan(config, "--topology", "cpu:4", *found["overrides"], "--json")
    assert json.loads(again.stdout)["peak_bytes"] == found["best"]["peak_bytes"]
    table = plan(config, *sizes, "--search")
    assert f"fastest that fits: {' '.join(found['overrides'])}" in table.stdout.replace("\n", " ")


# Remedies.


def remedy_of(monkeypatch, config, capacity, per_row, *overrides, spread=60.0):
    cfg, target, calls = fake(monkeypatch, config, capacity, per_row, spread)
    monkeypatch.setattr("jlora.planning.search.larger", lambda target: iter(()))
    now = Layout(1, 4, 1, "lean", None, 2, 8)
    settings = now.settings() | dict(word.split("=") for word in overrides)
    cfg = load_config(config, ["data.max_length=512", *layouts.as_overrides(settings)])
    result = search.plan(cfg, target, None, 4.5e12)
    assert not result.fits
    calls.clear()
    remedy = find_remedy(cfg, target, result)
    assert len(calls) <= 12
    return remedy, sentence(result, remedy)


@pytest.mark.parametrize(
    ("capacity", "per_row", "overrides"),
    [
        (15 + 1 + 64, PER_ROW, ["training.gradient_accumulation_steps=2"]),
        (15 + 1 + 16, PER_ROW, ["model.remat=full"]),
        (15 + 1 + 8, PER_ROW, ["model.remat=full", "training.gradient_accumulation_steps=2"]),
        (15 + 1 + 6, PER_ROW, ["model.remat=offload", "training.gradient_accumulation_steps=2"]),
        (
            15 + 1 + 4,
            PER_ROW,
            ["mesh.fsdp=2", "mesh.tensor=2", "model.remat=full", "training.gradient_accumulation_steps=4"],
        ),
        (
            15 + 1 + 2,
            PER_ROW,
            ["model.remat=full", "training.gradient_accumulation_steps=2", "model.quantization=int8"],
        ),
    ],
)
def test_the_cheapest_change_comes_first(monkeypatch, config, capacity, per_row, overrides):
    remedy, says = remedy_of(monkeypatch, config, capacity, per_row)
    assert [word for word in remedy.overrides if word in overrides] == overrides
    assert remedy.peak_bytes <= 2**10 * capacity
    assert "does not fit by" in says and "temporaries (activations) take" in says and "cheapest change" in says


def test_a_row_that_no_device_holds_is_split(monkeypatch, config):
    cfg, target, _ = fake(monkeypatch, config, 100, PER_ROW)
    cfg = load_config(config, ["training.batch_size=4", "data.max_length=16384", "mesh.fsdp=4", "model.remat=full"])
    result = search.plan(cfg, target, None, 6e12)
    remedy = find_remedy(cfg, target, result)
    assert not result.fits
    assert {"mesh.fsdp=1", "mesh.tensor=2", "mesh.context=2"} <= {*remedy.overrides}
    assert remedy.peak_bytes == 2**10 * (60 / 2 + 1 + 16384 / 64 / 4)


def test_a_remedy_of_more_devices_or_of_none(monkeypatch, config):
    remedy, says = remedy_of(monkeypatch, config, 3, PER_ROW)
    assert remedy is None and "base weights" not in says and "more devices" in says
    remedy, says = remedy_of(monkeypatch, config, 3, PER_ROW, spread=6000.0)
    assert remedy is None and "base weights take" in says


@pytest.mark.long
def test_a_run_that_does_not_fit_names_the_change(config):
    """70B in float32 fits on no CPU of ours: exit 5, one sentence, and the figures still on stdout."""
    done = plan(config, "--topology", "cpu:1", "model.path=llama2-70b", "--json")
    assert done.returncode == 5 and done.stderr.count("\n") == 1
    result = json.loads(done.stdout)
    assert result["remedy"] is None and not result["fits"]
    assert "base weights take" in done.stderr and "take more devices" in done.stderr
    done = plan(config, "--topology", "cpu:1", "model.path=llama2-70b", "--search", "-q")
    assert done.returncode == 5 and "nothing fits; the smallest" in done.stderr and "too much" in done.stderr


# Cards from files.


def card(tmp_path: Path, **changes) -> Path:
    tree = dataclasses.asdict(GPUS["h100-80gb"]) | changes
    tree = {key: list(value) if isinstance(value, tuple) else value for key, value in tree.items() if value is not ...}
    path = tmp_path / "card.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_card_in_a_file_is_the_card(tmp_path):
    assert read_gpu(card(tmp_path)) == GPUS["h100-80gb"]
    assert read_gpu(card(tmp_path, memory=10**9)).memory == 10**9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": ...}, ["key 'memory' is missing", "link_bandwidth"]),
        ({"memry": 3}, ["unknown key 'memry'", "memory"]),
        ({"memory": -1}, ["memory: ", "greater than 0", "-1"]),
        ({"capability": 9}, ["capability: "]),
    ],
)
def test_a_card_that_is_wrong_is_refused_by_key(tmp_path, changes, words):
    with pytest.raises(ConfigError) as refused:
        read_gpu(card(tmp_path, **changes))
    for word in ("card.yaml", *words):
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_documented_card_is_whole(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")
    (tmp_path / "card.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert isinstance(read_gpu(tmp_path / "card.yaml"), Gpu)


# The picture.


@pytest.mark.slow
def test_one_picture_shows_every_topology(config, tmp_path):
    path = tmp_path / "memory.png"
    sizes = ("training.batch_size=2",)
    done = plan(config, "--topology", "cpu:1", "--topology", "cpu:2", f"--plot={path}", "--json", *sizes)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["topology"] for result in results] == ["cpu:1", "cpu:2"]
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    one = tmp_path / "one.png"
    plan_page.draw(results[:1], one)
    heights = [int.from_bytes(file.read_bytes()[20:24], "big") for file in (one, path)]
    assert heights[0] < heights[1]  # a row more


def test_bars_end_at_the_peak(alone):
    assert math.isclose(sum(plan_page._ours(alone).values()) * 2**30, alone["peak_bytes"])
    assert math.isclose(sum(plan_page._full(alone).values()) * 2**30, alone["naive"]["total"])


def test_without_matplotlib_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'jlora\[plot\] @ git\+https"):
        plan_page.require_matplotlib()


def test_a_plan_compiles_anew():
    jax.config.update("jax_enable_compilation_cache", True)
    with fresh():
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache
    assert smallest(Layout(1, 4, 1, "lean", None, 2, 8)) == Layout(1, 4, 1, "full", None, 1, 8)
