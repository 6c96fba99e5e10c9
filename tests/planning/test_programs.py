"""What the GPU compiler makes of a step: its memory, its products of 8-bit codes, and what devices send each other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import needs_gpu_compiler

GIB = 2**30
SHARED = ["training.batch_size=1", "training.gradient_accumulation_steps=1", "data.max_length=4096", "lora.dropout=0"]
CONFIG = """
model: {path: llama2-7b}
lora: {rank: 16, alpha: 32, target_modules: [q_proj, k_proj, v_proj, o_proj]}
data: {train: rows.jsonl}
output_dir: run
"""
# The step as `jlora plan` compiles it, and its text, of which a plan tells no more than figures.
COMPILE = """
import sys
from pathlib import Path
from jlora.planning import topology
topology.prepare()
import jax
from jlora.config import load_config
from jlora.hf.planned import model_shape
from jlora.planning.compiled import abstract_step, checked_mesh, compile_for
from jlora.training.auto_remat import peak_bytes
from jlora.training.step import make_forward
config, spec, text, *overrides = sys.argv[1:]
cfg = load_config(config, overrides)
model, target = model_shape(cfg.model.path), topology.resolve(spec)
mesh = checked_mesh(cfg, target.devices, model)
with jax.set_mesh(mesh):
    step, arguments, _ = abstract_step(cfg, model, mesh, make_forward(cfg, model, mesh)[1])
    compiled = compile_for(target, step, arguments)
Path(text).write_text(compiled.as_text())
print(peak_bytes(compiled, "gpu"))
"""
pytestmark = needs_gpu_compiler


def compile_step(folder: Path, spec: str, *overrides: str, flags: str = "") -> tuple[float, str]:
    """GiB of a device at the peak, and the program's text."""
    config, text = folder / "c.yaml", folder / "text"
    config.write_text(CONFIG)
    command = [sys.executable, "-c", COMPILE, str(config), spec, str(text), *SHARED, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / GIB, text.read_text()


def test_lean_holds_what_no_product_is_computed_twice_for(tmp_path):
    """Fourteen products of a layer with the base, seven in each pass: no more than with everything kept."""
    products = {}
    for remat, most in (("none", 41), ("lean", 25.5), ("full", 15)):
        held, text = compile_step(tmp_path, "gpu:h100-80gb:1", f"model.remat={remat}")
        assert held < most
        dots = re.findall(r' dot\(.*op_name="([^"]*)"', text)
        products[remat] = sum("btd,dnh" in name or "btnh,nhd" in name or "bt" in name and "df" in name for name in dots)
    assert products["lean"] == products["none"] < products["full"]


@pytest.mark.parametrize(
    ("spec", "kind", "type_"), [("gpu:h100-80gb:1", "fp8", "f8e4m3fn"), ("gpu:a100-80gb:1", "int8", "s8")]
)
def test_products_of_codes_in_both_passes(tmp_path, spec, kind, type_):
    """And no second copy of them, turned or widened."""
    held, text = compile_step(tmp_path, spec, "model.remat=lean", f"model.compute={kind}")
    assert held < 19.5
    types: dict[str, str] = {}
    products = []
    for line in text.splitlines():
        if made := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\w+)\[", line):
            types[made[1]] = made[2]
        if multiplied := re.search(r" dot\(%?([\w.\-]+), %?([\w.\-]+)\)", line):
            products.append((types[multiplied[1]], types[multiplied[2]]))
    assert products.count((type_, type_)) == 14
    assert not re.search(rf"{type_}\[(4096,32,11008|11008,32,4096)\]", text)  # those of all layers, turned


@pytest.mark.slow
def test_a_70b_in_fp8_computes_no_product_twice_on_two_cards(tmp_path):
    mesh = ["model.path=llama2-70b", "mesh.fsdp=1", "mesh.tensor=2"]
    held, _ = compile_step(tmp_path, "gpu:h100-80gb:2", *mesh, "model.remat=lean", "model.compute=fp8")
    assert held < 63


def test_what_two_cards_send_each_other(tmp_path):
    """Of a layer's hidden states: 4 in the forward pass, 7 in the backward pass, which computes them anew."""
    mesh = ["model.path=llama2-70b", "mesh.fsdp=1", "mesh.tensor=2", "model.remat=full"]
    held, text = compile_step(tmp_path, "gpu:h100-80gb:2", *mesh)
    assert held < 69
    bodies: dict[str, int] = {}
    current = ""
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")):
            current = line.removeprefix("ENTRY ").split()[0]
        kinds = r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
        if re.search(rf"= .*\[(1,)?(2048|4096),8192\].* {kinds}", line):
            bodies[current] = bodies.get(current, 0) + 1
    assert sorted(bodies.values())[-2:] == [4, 7]
