"""Peaks that the real compilers give for absent hardware, against the most that each may take.

LoRA of rank 16 on q, k, v, o, bfloat16, everything rematerialised. A line runs where its compiler is installed:
the extras cuda12 (or cuda13) and tpu, each in an environment of its own (`scripts/test` makes both).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compilers import needs_gpu_compiler, needs_tpu_compiler

CONFIG = """
model: {path: llama2-70b, dtype: bfloat16, remat: full}
lora: {rank: 16, alpha: 32, target_modules: [q_proj, k_proj, v_proj, o_proj]}
data: {train: rows.jsonl}
output_dir: run
"""
GIB = 2**30
MOST_SECONDS = 180
needs = {"gpu": needs_gpu_compiler, "tpu": needs_tpu_compiler}


def line(model, topology, batch, length, mesh, most, *, slow=False):
    """One case: the model's size, rows and length of a batch, (data, fsdp, tensor), and the most GiB, or None."""
    marks = [needs[topology[:3]], *([pytest.mark.slow] if slow else [])]
    return pytest.param(f"llama2-{model}", topology, batch, length, mesh, most, marks=marks, id=f"{model}-{topology}")


def peak(
    tmp_path: Path, model: str, topology: str, batch: int, length: int, mesh: tuple[int, int, int], *more: str
) -> dict:
    """What a real `plan --json` says, within the time that a line may take."""
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG)
    axes = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    sizes = [f"model.path={model}", f"training.batch_size={batch}", f"data.max_length={length}"]
    command = [sys.executable, "-m", "jlora.plan", "--config", str(config), "--topology", topology, "--json"]
    began = time.monotonic()
    env = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run([*command, *axes, *sizes, *more], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < MOST_SECONDS
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("model", "topology", "batch", "length", "mesh", "most"),
    [
        line("70b", "gpu:h100-80gb:2", 1, 4096, (1, 1, 2), 70),
        line("13b", "gpu:a100-40gb:1", 1, 4096, (1, 1, 1), None),
        line("7b", "gpu:h100-80gb:1", 1, 4096, (1, 1, 1), 15),
        line("7b", "tpu:v5e:1x1", 1, 2048, (1, 1, 1), None),
        line("70b", "tpu:v5p:2x2x1", 4, 4096, (1, 1, 4), 42, slow=True),
        line("70b", "tpu:v5e:4x4", 16, 2048, (1, 4, 4), 13.5, slow=True),
        line("70b", "tpu:v5p:4x4x4", 64, 4096, (1, 16, 4), 12, slow=True),
    ],
)
def test_peak_of_a_device(tmp_path, model, topology, batch, length, mesh, most):
    result = peak(tmp_path, model, topology, batch, length, mesh)
    assert result["fits"] and result["peak_bytes"] <= result["capacity_bytes"]
    assert most is None or result["peak_bytes"] <= most * GIB
    # Below the base's own share of a device there is no plan, only a broken count.
    assert result["peak_bytes"] > result["base_bytes"] > 0
    assert result["attention"] == {"gpu": "cudnn", "tpu": "splash"}[topology[:3]]
    assert result["estimate"]["seconds_per_step"] > 0
    assert (result["sent_bytes_per_step"] > 0) == (result["devices"] > 1)


@pytest.mark.parametrize(
    ("model", "topology", "batch", "length", "mesh", "most"),
    [
        line("70b", "gpu:l40s-48gb:1", 1, 4096, (1, 1, 1), 42),
        line("70b", "gpu:h100-80gb:1", 1, 8192, (1, 1, 1), 48),
        line("7b", "gpu:t4-16gb:1", 1, 2048, (1, 1, 1), 6),
        line("13b", "gpu:rtx4090-24gb:1", 1, 4096, (1, 1, 1), 11),
        line("70b", "gpu:rtx4090-24gb:2", 2, 2048, (1, 1, 2), 22),
        line("70b", "tpu:v5e:2x4", 8, 2048, (1, 8, 1), 9, slow=True),
    ],
)
def test_peak_over_an_nf4_base(tmp_path, model, topology, batch, length, mesh, most):
    result = peak(tmp_path, model, topology, batch, length, mesh, "model.quantization=nf4")
    assert result["fits"] and result["peak_bytes"] <= min(most * GIB, result["capacity_bytes"])
    # Codes and scales of the projections are 4.13 bits a weight, a little more where 256 absmax straddle channels;
    # embedding and head are 2 bytes.
    width = {"7b": 4096, "13b": 5120, "70b": 8192}[model.removeprefix("llama2-")]
    outer = 2 * 32000 * width
    bits = (8 * result["base_bytes"] * mesh[1] * mesh[2] - 16 * outer) / (result["frozen_params"] - outer)
    assert bits == pytest.approx(4.13, abs=0.06)


@needs["gpu"]
@pytest.mark.parametrize("packing", ["true", "false"])
def test_peak_of_a_long_row(tmp_path, packing):
    """32k tokens over a bfloat16 base: 8 GiB of layers' inputs, and no room for a mask of a GiB or two."""
    result = peak(tmp_path, "llama2-7b", "gpu:h100-80gb:1", 1, 32768, (1, 1, 1), f"data.packing={packing}")
    assert result["fits"] and result["attention"] == "cudnn" and result["peak_bytes"] <= 27 * GIB


@pytest.mark.parametrize(
    ("topology", "length"),
    [
        pytest.param("gpu:h100-80gb:1", 4096, marks=needs["gpu"]),
        pytest.param("tpu:v5e:1x1", 2048, marks=[needs["tpu"], pytest.mark.slow]),
    ],
)
def test_offload_moves_the_layers_inputs_to_the_host(tmp_path, topology, length):
    """32 layers' inputs of width 4096 in bfloat16, and most of them gone from the device."""
    run = ("llama2-7b", topology, 1, length, (1, 1, 1))
    kept, moved = (peak(tmp_path, *run, f"model.remat={remat}") for remat in ("full", "offload"))
    inputs = 32 * length * 4096 * 2
    assert kept["offloaded_bytes"] == 0 and moved["offloaded_bytes"] == inputs
    assert moved["peak_bytes"] < kept["peak_bytes"] - 0.7 * inputs
    assert moved["flops_per_step"] == kept["flops_per_step"]


@needs["tpu"]
@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "most"), [((1, 64, 4), 1.0), ((4, 16, 4), 1.02)], ids=["more fsdp", "more data"])
def test_a_device_of_256_holds_no_more_than_one_of_64(tmp_path, mesh, most):
    """Four times the chips and four times the batch: the same rows a device.

    On `data` instead of `fsdp`, where no less of the base is on a device, the compiler's buffers for the sum of the
    gradients over it are in the peak: 9.30 GiB beside 9.16.
    """
    few = peak(tmp_path, "llama2-70b", "tpu:v5p:4x4x4", 64, 4096, (1, 16, 4))
    many = peak(tmp_path, "llama2-70b", "tpu:v5p:4x8x8", 256, 4096, mesh)
    assert many["devices"] == 256 == 4 * few["devices"]
    assert many["peak_bytes"] <= most * few["peak_bytes"]
