"""A run over eight devices is the run over one: the same losses, whatever the mesh.

The eight are CPU devices of a process of their own, since the number is fixed when JAX starts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from eight_devices import attend_by_splash, losses, run_on_eight, train_over
from grown_bases import ADDED, add_tokens
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file
from shared_data import SHARED, needs_data
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora.config import load_config
from jlora.errors import ConfigError
from jlora.hf.planned import shape_of
from jlora.model.divisibility import check_divides
from jlora.model.sharding import MESH_AXES
from jlora.training.run import train

ROOT = Path(__file__).parents[2]
MESHES = {
    **{"data=8": (8, 1, 1), "fsdp=8": (1, 8, 1), "fsdp=4 tensor=2": (1, 4, 2), "2x2x2": (2, 2, 2)},
    **{"2x2x2 permuted": (2, 2, 2), "fsdp=8 permuted": (1, 8, 1)},
}


def drift(run_dir, reference):
    """Norm of the difference of two adapters over that of the adapter, the worst tensor's.

    Adam enlarges it: where a gradient is next to nothing, it makes a whole step of the gradient's rounding.
    """
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run_dir, reference))
    assert found.keys() == expected.keys()
    norm = np.linalg.norm
    return max(float(norm(found[name] - right) / norm(right)) for name, right in expected.items())


def require_the_same_runs(folder, config, meshes, largest_drift):
    """Train on one device here and on every mesh there; the same losses to 1e-5, the same adapter but for rounding."""
    train(load_config(config, ["model.remat=full", f"output_dir={folder / 'one'}"]), quiet=True)
    expected = losses(folder / "one")
    folders = {name: str(folder / name.replace(" ", "_")) for name in meshes}
    run_on_eight(train_over, str(config), json.dumps({folders[name]: sizes for name, sizes in meshes.items()}))
    for name, run_dir in folders.items():
        for key, curve in losses(Path(run_dir)).items():
            np.testing.assert_allclose(curve, expected[key], rtol=1e-5, err_msg=f"{name}: {key}")
        adapters = drift(Path(run_dir), folder / "one")
        print(f"{name}: the adapter drifts by {adapters:.1e} of its norm")
        assert adapters < largest_drift


@pytest.mark.long
@pytest.mark.parametrize("names", [["2x2x2"], pytest.param(list(MESHES), marks=pytest.mark.slow)], ids=["one", "all"])
def test_tiny_model(tmp_path, names):
    make_llama(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    rows = make_completions(tmp_path / "rows.jsonl", 48)
    config = write_config(
        tmp_path / "run.yaml",
        tmp_path / "base",
        rows,
        tmp_path / "run",
        lora={"target_modules": "all-linear", "dropout": 0.1},
        data={
            "format": "completion",
            "max_length": 64,
            "eval": str(make_completions(tmp_path / "held.jsonl", 48, first=100)),
        },
        training={"batch_size": 16, "gradient_accumulation_steps": 2, "max_steps": 6},
        optimizer={"name": "sgd", "learning_rate": 0.1},
    )
    require_the_same_runs(tmp_path, config, {name: MESHES[name] for name in names}, 5e-6)


@pytest.mark.long
def test_rows_of_new_tokens(tmp_path):
    """304 rows of the embedding over two devices, and of those that are trained the width."""
    make_llama(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    rows = make_completions(tmp_path / "rows.jsonl", 48)
    rows.write_text(rows.read_text().replace("tree", ADDED[0]).replace("mountain", ADDED[2]))
    config = write_config(
        tmp_path / "run.yaml",
        tmp_path / "base",
        rows,
        tmp_path / "run",
        lora={"trainable_tokens": "new"},
        data={"format": "completion", "max_length": 64, "eval": 0.2},
        training={"batch_size": 16, "gradient_accumulation_steps": 2, "max_steps": 4},
        optimizer={"name": "sgd", "learning_rate": 0.1},
    )
    tree = yaml.safe_load(config.read_text())
    tree["model"] |= {"tokenizer": str(add_tokens(tmp_path / "tokenizer")), "resize_embeddings": True}
    config.write_text(yaml.safe_dump(tree))
    require_the_same_runs(tmp_path, config, {"2x2x2": MESHES["2x2x2"]}, 5e-6)
    for name in ("embed_tokens", "lm_head"):
        assert load_config(config).lora.trainable_tokens == "new" and trained_rows(tmp_path / "one", name) == len(ADDED)
    few = ["model.tokenizer=" + str(add_tokens(tmp_path / "odd", ADDED[:1])), "mesh.tensor=2", "mesh.fsdp=1"]
    cfg = load_config(config, few)
    with pytest.raises(ConfigError, match="mesh.tensor=2 does not divide .*vocab_size=301"):
        check_divides(shape_of(cfg), AbstractMesh((1, 1, 1, 2), MESH_AXES), cfg)


def trained_rows(run_dir, module):
    held = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    return next(len(array) for name, array in held.items() if f"{module}.token_adapter" in name)


@needs_data
@pytest.mark.slow
def test_a_real_model_of_260_thousand_parameters(tmp_path):
    reviews = SHARED / "reviews" / "sephora_reviews.jsonl"
    config = write_config(
        tmp_path / "run.yaml",
        SHARED / "stories260K",
        reviews,
        tmp_path / "run",
        data={"max_length": 256, "on_bad_row": "skip", "eval": 0.1},
        training={"batch_size": 8, "max_steps": 6},
    )
    require_the_same_runs(tmp_path, config, MESHES, 1e-4)


@pytest.mark.long
def test_splash_over_a_mesh():
    """Rows over data and fsdp, heads over tensor; refused where the key/value heads do not divide."""
    assert "mesh.tensor=4 does not divide the 2 key/value heads" in run_on_eight(attend_by_splash)
