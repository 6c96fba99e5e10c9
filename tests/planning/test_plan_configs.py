"""The headers of configs/: one form, the planner's own figures, and configs that load."""

import re
from pathlib import Path

import pytest
from compilers import needs_gpu_compiler
from load_script import load_script

from jlora.config import load_config
from jlora.hf.shapes import SHAPES

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name.startswith(("llama2", "gpt2")))
plan_configs = load_script("plan_configs")
LINES = [(path, found) for path in CONFIGS for found in plan_configs.LINE.finditer(path.read_text(encoding="utf-8"))]


def test_the_promised_configs_are_there():
    names = {path.stem for path in CONFIGS}
    assert names >= {
        *("gpt2_full", "llama2_7b_alpaca", "llama2_13b_alpaca", "llama2_70b_2xh100"),
        *("llama2_70b_v5p-8", "llama2_7b_v5e-8", "llama2_70b_mlperf", "llama2_70b_nf4_l40s"),
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_header_says_command_base_hardware_and_memory(path):
    text = path.read_text(encoding="utf-8")
    header = text[: text.index("\nmodel:")]
    for name in ("command", "base", "hardware", "memory"):
        assert re.search(rf"^#   {name} +\S", header, re.MULTILINE), name
    assert f"configs/{path.name}" in header
    # No line of memory in another form, which the check would not see.
    assert len(re.findall(r"^#   memory ", header, re.MULTILINE)) == len(list(plan_configs.LINE.finditer(header)))
    assert load_config(path).output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize(("path", "found"), LINES, ids=lambda value: getattr(value, "stem", None))
def test_figures_are_possible(path, found):
    peak, capacity = float(found["peak"]), float(found["capacity"])
    assert found["model"] in SHAPES and 0 < peak and (found["word"] == "fits") == (peak <= capacity)


@needs_gpu_compiler
@pytest.mark.parametrize(
    ("path", "found"),
    [pytest.param(*line, id=line[0].stem) for line in LINES if line[1]["topology"].startswith("gpu:")],
)
def test_figures_are_the_compilers(path, found):
    assert plan_configs.planned(path, found["topology"], found["model"]) == found[0]


def test_mlperfs_hyper_parameters():
    cfg = load_config(ROOT / "configs" / "llama2_70b_mlperf.yaml")
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.dropout) == (16, 32, 0.1)
    assert cfg.lora.targets == ("q_proj", "k_proj", "v_proj", "o_proj")
    optimizer = cfg.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule) == ("adamw", 4e-4, "cosine")
    assert (optimizer.warmup_steps, optimizer.weight_decay, optimizer.max_grad_norm) == (0, 1e-4, 0.3)
    assert (cfg.data.max_length, cfg.data.packing, cfg.training.batch_size) == (8192, True, 8)
