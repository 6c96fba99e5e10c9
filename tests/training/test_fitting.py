"""The ladder of rematerialisation, compiled: what each policy holds and computes, and which of them `auto` takes."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import pytest
from tiny import make_completions, make_llama, make_tokenizer, shape_of, write_config

import jlora.planning.compiled
import jlora.runtime.signals
import jlora.train
from jlora.config import load_config
from jlora.model.remat import LADDER
from jlora.planning.compiled import held_bytes, plan
from jlora.planning.layouts import with_settings
from jlora.planning.topology import Target
from jlora.training import auto_remat
from jlora.training.auto_remat import Layout, saved_bytes
from jlora.training.run import train
from jlora.training.summary import peak_memory

SHAPE = shape_of(128, 344, layers=24, heads=4, kv_heads=2, vocab_size=512)
ON_CPU = [name for name in LADDER if name != "offload"]


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """(config, target, what `plan` says of each policy) of a step that is large enough for its activations to count."""
    folder = tmp_path_factory.mktemp("ladder")
    cfg = load_config(
        write_config(folder / "c.yaml", "llama2-7b", "rows.jsonl", folder / "run", data={"max_length": 256})
    )
    target = Target("cpu:1", "cpu", jax.devices()[:1], 2**40)
    return cfg, target, {name: plan(with_settings(cfg, {"model.remat": name}), target, SHAPE) for name in ON_CPU}


def temporaries(result):
    return result.temporaries


@pytest.mark.slow
def test_each_policy_holds_less_and_computes_more(ladder):
    """The order that docs/remat.md tells, `auto` walks and the search relies on."""
    cfg, _, plans = ladder
    held = [temporaries(plans[name]) for name in ON_CPU]
    assert all(more > 1.1 * less for more, less in itertools.pairwise(held)), held
    flops = [plans[name].flops_per_step for name in ON_CPU]
    assert flops == sorted(flops) and len(set(flops)) == 5


@pytest.mark.slow
def test_arithmetic_never_rules_out_what_fits(ladder):
    cfg, _, plans = ladder
    for name, result in plans.items():
        layout = Layout(1, 1, 1, name, None, cfg.training.batch_size, cfg.training.batch_size)
        assert saved_bytes(SHAPE, cfg, layout) / 2 < temporaries(result)


@pytest.mark.long
@pytest.mark.parametrize("chosen", ON_CPU)
def test_auto_takes_the_first_that_fits(ladder, monkeypatch, chosen):
    cfg, target, plans = ladder
    asked = []

    def known(cfg, target, model):
        asked.append(cfg.model.remat)
        return plans[cfg.model.remat]

    room = temporaries(plans[chosen]) if chosen != "full" else 0
    held = held_bytes(with_settings(cfg, {"model.remat": "full"}), target, SHAPE)
    target = dataclasses.replace(target, capacity=int((held + room) / (1 - auto_remat.HEADROOM)) + 1)
    cfg = with_settings(cfg, {"model.remat": "auto"})
    monkeypatch.setattr(jlora.planning.compiled, "plan", known)
    result = plan(cfg, target, SHAPE)
    assert result.remat == chosen and asked == ON_CPU[: ON_CPU.index(chosen) + 1][-len(asked) :]
    assert len(asked) == 1 or chosen != "full"  # where there is no room at all, arithmetic says so


@pytest.mark.parametrize(("files", "free"), [({}, 7000), ({"max": "max"}, 7000), ({"max": "6000"}, 2500)])
def test_what_a_container_allows_counts(tmp_path, monkeypatch, files, free):
    for name, text in ({"current": "4000", "stat": "anon 3000\ninactive_file 500\n"} | files).items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(auto_remat, "CGROUP", tmp_path)
    machine = tmp_path / "meminfo"
    machine.write_text("MemTotal: 16 kB\nMemAvailable:    7 kB\n")
    monkeypatch.setattr(auto_remat, "MEMINFO", machine)
    assert auto_remat.free_bytes(jax.devices()[:1]) == pytest.approx((7168 if free == 7000 else free) * 0.95, abs=1)


@pytest.fixture
def config(tmp_path):
    make_llama(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    rows = make_completions(tmp_path / "rows.jsonl")
    section = {"format": "completion", "max_length": 64}
    return write_config(tmp_path / "c.yaml", tmp_path / "base", rows, tmp_path / "run", data=section)


def test_a_run_and_its_plan_agree_on_the_peak(config):
    cfg = load_config(config, ["training.max_steps=1"])
    planned = plan(cfg, Target("cpu:1", "cpu", jax.devices()[:1], 2**40))
    assert train(cfg, quiet=True)["peak_memory_bytes"]["compiled_step"] == planned.peak_bytes


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_the_summary_has_the_peak_of_the_plan_on_every_platform(monkeypatch, platform):
    """An accelerator's compiler says its peak, which is less than all of the parts that never live together."""
    parts = {"argument_size_in_bytes": 100, "temp_size_in_bytes": 60, "output_size_in_bytes": 40}
    memory = SimpleNamespace(**parts, alias_size_in_bytes=30, peak_memory_in_bytes=150)
    compiled = SimpleNamespace(memory_analysis=lambda: memory)
    device = SimpleNamespace(platform=platform, memory_stats=lambda: {"peak_bytes_in_use": 7})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    found = peak_memory(compiled)["compiled_step"]
    assert found == auto_remat.peak_bytes(compiled, platform) == {"cpu": 170, "gpu": 150}[platform]


@pytest.mark.long
def test_a_run_goes_on_with_the_policy_it_took(config, tmp_path, monkeypatch):
    """Another policy rounds otherwise, and how much memory is free is another number each time."""

    def run(free, name, stop_after):
        monkeypatch.setattr(auto_remat, "free_bytes", lambda devices: free)
        monkeypatch.setattr(jlora.runtime.signals, "save_on_signals", lambda: lambda step: step == stop_after)
        return train(load_config(config, ["model.remat=auto", f"output_dir={tmp_path / name}"]), quiet=True)

    stopped = run(2**40, "run", stop_after=2)
    assert (stopped["status"], stopped["steps"], stopped["remat"]) == ("preempted", 2, "none")
    done = run(0, "run", stop_after=None)
    assert (done["status"], done["steps"], done["remat"]) == ("finished", 4, "none")
    assert run(0, "another", stop_after=1)["remat"] == "full"
