"""Rows whose tokens lie over several devices: the same loss, gradients and runs as on one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from eight_devices import SPLIT, losses, run_on_eight, split_rows, train_over
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora.config import load_config
from jlora.training.metrics import read_metrics
from jlora.training.run import train

# Sizes of data, fsdp, tensor and context.
RUNS = {"alone": (1, 1, 1, 2), "with others": (1, 2, 2, 2), "resumed": (1, 1, 1, 2)}


@pytest.mark.long
def test_loss_and_gradients_are_those_of_one_device():
    """On 2, 4 and 8 devices, also with data, fsdp and tensor: within 1e-5 of every gradient's norm."""
    lines = run_on_eight(split_rows).splitlines()
    print(*lines, sep="\n")
    assert len(lines) == len(SPLIT) + 2


@pytest.mark.long
def test_runs_are_those_of_one_device(tmp_path):
    """Dropout, accumulation, evaluation; and a run that goes on from a checkpoint of one device."""
    make_llama(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    config = write_config(
        tmp_path / "run.yaml",
        tmp_path / "base",
        make_completions(tmp_path / "rows.jsonl", 48),
        tmp_path / "one",
        lora={"target_modules": "all-linear", "dropout": 0.1},
        data={"format": "completion", "max_length": 64, "eval": 0.2},
        training={"batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 6, "save_every": 3},
        optimizer={"name": "sgd", "learning_rate": 0.1},
    )
    train(load_config(config, ["model.remat=full"]), quiet=True)
    expected = losses(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
    run_on_eight(train_over, str(config), json.dumps({str(tmp_path / name): sizes for name, sizes in RUNS.items()}))
    for name in RUNS:
        for key, curve in losses(tmp_path / name).items():
            np.testing.assert_allclose(curve, expected[key], rtol=1e-5, err_msg=f"{name}: {key}")
    before, after = (times(tmp_path / name) for name in ("one", "resumed"))
    assert after[:3] == before[:3] and after[3:] != before[3:]  # the first three steps were not taken again


@pytest.mark.long
def test_a_device_holds_its_part_of_a_long_row(tmp_path, smallest_base):
    """Of 8 devices each holds less than a third of what one would beside the weights, whose share it is not."""
    rows = make_completions(tmp_path / "rows.jsonl")
    data, training = {"format": "completion", "max_length": 16_384}, {"batch_size": 1}
    config = write_config(tmp_path / "c.yaml", smallest_base, rows, tmp_path / "run", data=data, training=training)

    def held(devices):
        words = ["--topology", f"cpu:{devices}", f"mesh.context={devices}", "mesh.fsdp=1", "model.remat=full", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "jlora.plan", "--config", config, *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    whole, part = held(1), held(8)
    print(f"{whole['temp_bytes']:,} bytes of one device, {part['temp_bytes']:,} of each of 8")
    assert 0 < part["temp_bytes"] < whole["temp_bytes"] / 3
    assert part["mesh"]["context"] == 8 and part["sent_bytes_per_step"] > whole["sent_bytes_per_step"] == 0
    assert part["flops_per_step"] == whole["flops_per_step"]


def times(run_dir: Path) -> list[float]:
    return [line["wall_seconds"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
