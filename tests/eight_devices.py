"""Runs in a process that has eight CPU devices, since the number is fixed when JAX starts."""

import os
import subprocess
import sys
from pathlib import Path

from jlora.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
# One process for all meshes: most of the time of a small run is starting.
RUNS = """
import json, sys
import jax
import numpy as np
from jlora.config import load_config
from jlora.training.run import train
config, meshes = sys.argv[1], json.loads(sys.argv[2])
devices = jax.devices()
for folder, sizes in meshes.items():
    order = np.random.default_rng(0).permutation(8) if "permuted" in folder else range(8)
    jax.devices = lambda: [devices[i] for i in order]
    overrides = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes)]
    train(load_config(config, [*overrides, "model.remat=full", f"output_dir={folder}"]), quiet=True)
"""


def run_on_eight(code, *args):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def losses(run_dir):
    """Loss, gradient norm and held-out loss of every step."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    curves = {key: [line[key] for line in lines if key in line] for key in ("loss", "grad_norm", "eval_loss")}
    assert all(curves.values())
    return curves
