"""Merging takes no accelerator and no whole model in memory; what it needs is asked before anything is written."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import write as write_gguf
from grown_adapters import make_run
from safetensors.numpy import load_file, save_file
from tiny import OFF_DEFAULT, make_completions, make_llama, make_tokenizer, write_config

from jlora.config import load_config
from jlora.errors import ConfigError, MemoryExceeded, ModelError
from jlora.hf import verify, weights
from jlora.hf.architecture import parse_config
from jlora.hf.names import name_table
from jlora.hf.source import open_source
from jlora.training import auto_remat
from jlora.training.export import export, needed_memory
from jlora.training.run import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    return make_run(folder / "run", folder / "base")


MERGE = """
from jlora import export
try:
    export.main()
finally:
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print(status["VmHWM"].split()[0])
"""


def merged_in_a_process(run: Path, out: Path) -> int:
    """Merge in a process of its own that has no device but the CPU; bytes of memory at its peak.

    In one process the second would hold the programs that were compiled for the first, too.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}  # of which there is none
    command = [sys.executable, "-c", MERGE, "--adapter", run, "--out", out, "--merge", "--dtype", "bfloat16", "-q"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's account of memory")
def test_a_merge_holds_a_tensor_and_not_the_model(run, tmp_path):
    """50 million parameters in bfloat16, 104 MB, take a few tensors of 6 MB above a model of nothing."""
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = OFF_DEFAULT | shape | {"head_dim": 64, "num_hidden_layers": 4, "model_type": "llama"}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    make_tokenizer(base)
    table = name_table(parse_config(config, "base"))
    noise = (np.random.default_rng(0).standard_normal(2816 * 1024, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    tensors = {name: noise[: math.prod(entry.hf_shape)].reshape(entry.hf_shape) for name, entry in table.items()}
    save_file(tensors, base / "model.safetensors")
    stored = (base / "model.safetensors").stat().st_size
    least = merged_in_a_process(run, tmp_path / "least")
    most = merged_in_a_process(make_run(tmp_path / "run", base), tmp_path / "merged")
    print(f"{stored / 1e6:.0f} MB stored; {least / 1e6:.0f} MB of memory for nothing, {most / 1e6:.0f} MB for it")
    assert stored > 100e6 and most - least < 50e6


def test_many_blocks_merge_as_one_does(run, tmp_path, monkeypatch):
    """A block is whole heads, which divide neither the vocabulary nor the inner size."""
    assert export(run, tmp_path / "whole", None, True, "float32", False)["logits_relative_difference"] < 1e-5
    monkeypatch.setattr(weights, "BLOCK_WEIGHTS", 1)
    assert export(run, tmp_path / "blocks", None, True, "float32", False)["logits_relative_difference"] < 1e-5
    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    assert whole.keys() == blocks.keys()
    for name, tensor in whole.items():
        np.testing.assert_allclose(blocks[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merge_into_a_quantised_base_is_proved(run, kind, tmp_path):
    base = run.parent / "base"
    quantised = make_run(tmp_path / "run", base, f"model.quantization={kind}")
    result = export(quantised, tmp_path / "merged", None, True, "float32", False)
    assert result["merged_into"] == f"dequantised {kind}" and result["logits_relative_difference"] < 1e-5
    plain = export(run, tmp_path / "plain", None, True, "float32", False)
    assert plain["logits_relative_difference"] < 1e-5 and "merged_into" not in plain
    ours, theirs = (verify_logits(tmp_path / name) for name in ("merged", "plain"))
    assert np.abs(ours - theirs).max() > 1e-3


def test_a_gguf_base_is_merged_by_whole_heads(tmp_path, monkeypatch):
    """Its q_proj and k_proj are turned head by head."""
    read = write_gguf(tmp_path / "base.gguf", GGMLQuantizationType.Q4_1)
    monkeypatch.setattr(weights, "BLOCK_WEIGHTS", 1)
    made = make_run(tmp_path / "run", tmp_path / "base.gguf", "lora.target_modules=[v_proj]")
    result = export(made, tmp_path / "merged", None, True, "float32", False)
    assert result["logits_relative_difference"] < 1e-5
    held = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in read.items():
        assert np.array_equal(held[name], tensor) == ("v_proj" not in name), name


def verify_logits(folder: Path) -> np.ndarray:
    source = open_source(folder)
    return verify.streamed_logits(parse_config(source.config, "merged"), weights.Stored(source), {})


def test_a_full_fine_tuning_is_written_as_it_was_trained(run, tmp_path):
    base = run.parent / "base"
    rows = make_completions(tmp_path / "rows.jsonl")
    sections = {"method": "full", "training": {"max_steps": 1}, "data": {"format": "completion", "max_length": 64}}
    cfg = load_config(write_config(tmp_path / "full.yaml", base, rows, tmp_path / "full", **sections))
    train(cfg, quiet=True)
    result = export(tmp_path / "full", tmp_path / "out", None, False, None, False)
    assert result["kind"] == "full" and result["logits_relative_difference"] < 1e-6
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    changed = [np.abs(after[name] - before[name]).max() for name in before]
    assert before.keys() == after.keys() and min(changed) > 0 and max(changed) < 0.02
    with pytest.raises(ConfigError, match="leave it out"):
        export(tmp_path / "full", tmp_path / "again", None, True, None, False, cost=True)


def test_a_wrong_merge_is_refused_and_removed(run, tmp_path, monkeypatch):
    honest = weights.Merged.rows

    def wrong(self, name, entry, start, stop):
        found = honest(self, name, entry, start, stop)
        return found * 1.01 if name == "model.layers.2.mlp.down_proj.weight" and self._adapter else found

    monkeypatch.setattr(weights.Merged, "rows", wrong)
    with pytest.raises(ModelError, match="logits that differ"):
        export(run, tmp_path / "out", None, True, "float32", False)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(run, tmp_path, monkeypatch):
    """Llama-2-70B with LoRA on all: two of its largest projections in float32, the adapter, 512 MiB."""
    model = parse_config(open_source(run.parent / "base").config, "base")
    cfg = load_config(run / "config.yaml", ["lora.target_modules=all-linear", "lora.rank=16"])
    large = dataclasses.replace(
        *(model,),
        **{"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128},
    )
    assert needed_memory(cfg, large) / 2**30 == pytest.approx(1.75 + 0.77 + 0.5, abs=0.01)
    monkeypatch.setattr(auto_remat, "free_host_bytes", lambda: 400 * 2**20)
    with pytest.raises(
        MemoryExceeded, match="takes 0.5 GiB of the host's memory, and 0.4 GiB are available"
    ) as refused:
        export(run, tmp_path / "out", None, True, None, False)
    assert refused.value.exit_code == 5
    monkeypatch.setattr(auto_remat, "free_host_bytes", lambda: 2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match="takes 0.0 GiB in bfloat16, and 0.0 GiB are free"):
        export(run, tmp_path / "out", None, True, "bfloat16", False)
    assert not list(tmp_path.iterdir())


def test_the_cost_of_merging_pairs_is_named_for_what_it_is(run, tmp_path):
    """A run's loss on pairs compares with the base, which is no longer there once merged."""
    base = run.parent / "base"
    rows = [{"prompt": f"Say {i}.", "chosen": f"It is {i}.", "rejected": "No."} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data.train={tmp_path}/pairs.jsonl", "data.format=preference", "data.max_length=128"
    pairs = make_run(tmp_path / "run", base, *data, "objective.name=dpo")
    result = export(pairs, tmp_path / "merged", None, True, "float32", False, cost=True)
    before, after = result["cross_entropy_before_merging"], result["cross_entropy_merged"]
    assert before == pytest.approx(after, abs=1e-5) and before > 3 and not any(key.startswith("loss") for key in result)
