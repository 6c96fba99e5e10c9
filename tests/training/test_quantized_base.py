"""A quantised base: what it holds, on one device or eight, and that runs on it are those on the dequantised one."""

import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import load_quantized, losses, run_on_eight, train_over
from shared_data import SHARED, needs_data
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora.config import DataSection, load_config
from jlora.data.encoding import tokenize
from jlora.data.tokens import load_tokenizer
from jlora.hf.load import load_base
from jlora.hf.names import name_table, to_hf
from jlora.hf.source import open_source
from jlora.hf.weights import Dequantized, save_checkpoint
from jlora.model import quant
from jlora.model.attention import reference
from jlora.model.sharding import one_device_mesh
from jlora.training.evaluator import Evaluator
from jlora.training.export import export
from jlora.training.run import train
from jlora.training.step import Forward, count_parameters

ROOT = Path(__file__).parents[2]
KINDS = ("int8", "fp8", "nf4", "int4")
FLOAT32 = jnp.dtype("float32")
# Divides over the meshes below in whole blocks.
WIDE = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 64, "num_hidden_layers": 2, "initializer_range": 0.05},
}


@partial(jax.jit, static_argnums=(1, 2))
def quantized(array, kind: str, num_inputs: int) -> quant.Quantized:
    return quant.quantize(array, kind, num_inputs)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quant") / "base"
    make_llama(folder, **WIDE)
    make_tokenizer(folder)
    return folder


def load(folder: Path, kind: str | None, dtype: str = "float32"):
    return load_base(open_source(folder), str(folder), jnp.dtype(dtype), one_device_mesh(), kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_base_holds_quantised_projections_and_nothing_else(base, kind):
    """Each stacked leaf is the quantised tensors of the file; the hash is of what is stored; parameters are counted."""
    source = open_source(base)
    decoder, digest = load(base, kind, "bfloat16")
    plain, plain_digest = load(base, None, "bfloat16")
    by_rows = Dequantized(source, decoder.cfg, kind)
    assert digest == plain_digest and count_parameters(decoder) == count_parameters(plain)
    for name, entry in name_table(decoder.cfg).items():
        owner = decoder if entry.layer is None else decoder.layers
        leaf = getattr(owner, entry.leaf).get_value()
        assert quant.is_quantized(leaf) == entry.leaf.endswith("_proj")
        if not quant.is_quantized(leaf):
            assert leaf.dtype == jnp.bfloat16
            continue
        stored = jnp.asarray(source.read(name).T.reshape(entry.shape))
        right = quantized(stored, kind, len(leaf.inputs))
        jax.tree.map(lambda a, b, i=entry.layer: np.testing.assert_array_equal(a[i], b), leaf, right)
        # What a merge writes.
        dense = to_hf(entry, np.asarray(quant.dequantize(right, FLOAT32)))
        np.testing.assert_array_equal(by_rows.rows(name, entry, 0, entry.hf_shape[0]), dense)


def run_config(folder: Path, model: Path, output: str, *overrides: str) -> Path:
    rows = make_completions(folder / "rows.jsonl", 32)
    path = write_config(
        folder / f"{output}.yaml",
        model,
        rows,
        folder / output,
        lora={"target_modules": "all-linear", "dropout": 0.1},
        data={
            "format": "completion",
            "max_length": 64,
            "eval": str(make_completions(folder / "held.jsonl", 32, first=100)),
        },
        training={"batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 4},
        optimizer={"name": "sgd", "learning_rate": 0.1},  # Adam would enlarge the rounding of its gradients
    )
    path.write_text(load_config(path, overrides).dump_yaml(), encoding="utf-8")
    return path


@pytest.mark.slow
def test_training_is_that_on_the_dequantised_base(base, tmp_path):
    kind = "nf4"
    decoder, _ = load(base, kind)
    source = open_source(base)
    add = lambda folder: make_tokenizer(folder) and None  # noqa: E731
    save_checkpoint(
        tmp_path / "dense", decoder.cfg, Dequantized(source, decoder.cfg, kind), source.config, "float32", add
    )
    before = jax.tree.map(np.asarray, decoder)
    train(load_config(run_config(tmp_path, base, "quantised", f"model.quantization={kind}")), quiet=True)
    train(load_config(run_config(tmp_path, tmp_path / "dense", "dequantised")), quiet=True)
    found, right = (losses(tmp_path / name) for name in ("quantised", "dequantised"))
    for key in right:
        np.testing.assert_allclose(found[key], right[key], rtol=1e-5, err_msg=key)
    stored, _ = load(base, None)
    plain, dense = (Evaluation(tmp_path / "rows.jsonl", "completion", 64)(x) for x in (stored, decoder))
    assert abs(plain - dense) > 1e-4  # quantising does change something
    chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, load(base, kind)[0]))


@pytest.mark.long
def test_eight_devices_hold_their_shards_of_the_same_codes(base):
    shards = run_on_eight(load_quantized, str(base))
    for kind in ("nf4", "int8", "fp8"):
        whole = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load(base, kind, "bfloat16")[0]))
        assert f"{kind} {hashlib.sha256(whole).hexdigest()}" in shards  # bit for bit


@pytest.mark.slow
def test_eight_devices_train_as_one_does(base, tmp_path):
    config = run_config(tmp_path, base, "one", "model.quantization=nf4", "model.remat=full")
    train(load_config(config), quiet=True)
    run_on_eight(train_over, str(config), json.dumps({str(tmp_path / "eight"): (1, 4, 2)}))
    for key, curve in losses(tmp_path / "eight").items():
        np.testing.assert_allclose(curve, losses(tmp_path / "one")[key], rtol=1e-5, err_msg=key)


class Evaluation:
    """Mean loss of a base on the rows of a file, in float32."""

    def __init__(self, rows: Path, format: str, max_length: int):
        section = DataSection(train=str(rows), format=format, max_length=max_length)
        folder = SHARED / "stories260K" if format == "text" else rows.parent / "tokenizer"
        if format != "text":
            make_tokenizer(folder)
        dataset = tokenize(str(rows), load_tokenizer(str(folder), None), section)
        self.evaluator = Evaluator(dataset, section, 4, Forward(reference, "none", FLOAT32), one_device_mesh())

    def __call__(self, base) -> float:
        with jax.set_mesh(one_device_mesh()):
            return self.evaluator.mean_loss(base, {})[0]


@pytest.mark.slow
@needs_data
def test_what_quantising_costs_a_real_model_and_what_lora_recovers(tmp_path):
    """stories260K, nats a token on 40 held-out stories, and after LoRA over nf4 on 360 others."""
    stories = (SHARED / "tinystories" / "stories_valid.jsonl").read_text(encoding="utf-8").splitlines()
    held_out, rows = tmp_path / "held_out.jsonl", tmp_path / "rows.jsonl"
    held_out.write_text("\n".join(stories[:40]) + "\n", encoding="utf-8")
    rows.write_text("\n".join(stories[40:]) + "\n", encoding="utf-8")
    loss_of = Evaluation(held_out, "text", 512)
    found = {kind: loss_of(load(SHARED / "stories260K", kind)[0]) for kind in (None, *KINDS)}
    print(found)
    cost = {kind: loss - found[None] for kind, loss in found.items()}
    assert abs(cost["int8"]) < 0.005 * found[None] and abs(cost["fp8"]) < 0.02
    assert 0.05 < cost["nf4"] < 0.15 and cost["nf4"] < cost["int4"] < 0.25
    config = write_config(
        tmp_path / "run.yaml",
        SHARED / "stories260K",
        rows,
        tmp_path / "run",
        lora={"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        data={"format": "text", "max_length": 512, "eval": str(held_out)},
        training={"batch_size": 8, "max_steps": 40},
        optimizer={"learning_rate": 3e-3},
    )
    summary = train(load_config(config, ["model.quantization=nf4"]), quiet=True)
    print(summary["eval_loss_before"], summary["eval_loss"])
    assert summary["eval_loss_before"] == pytest.approx(found["nf4"], abs=1e-4)
    assert summary["eval_loss"] - found[None] <= cost["nf4"] / 2


@pytest.mark.slow
def test_an_adapter_is_used_and_merged_on_the_base_it_was_trained_on(base, tmp_path):
    """evaluate takes the run's quantization; a merge holds the dequantised weights, and says what it cost."""
    config = run_config(tmp_path, base, "run", "model.quantization=nf4", "lora.dropout=0")
    summary = train(load_config(config), quiet=True)
    result = export(tmp_path / "run", tmp_path / "merged", None, True, "float32", False, cost=True)
    assert result["merged_into"] == "dequantised nf4" and result["logits_relative_difference"] < 1e-5
    assert result["cross_entropy_before_merging"] == pytest.approx(result["cross_entropy_merged"], abs=1e-5)
    assert result["cross_entropy_before_merging"] == pytest.approx(summary["eval_loss"], abs=1e-5)
    evaluate = [sys.executable, "-m", "jlora.evaluate", "--data", str(tmp_path / "rows.jsonl"), "--json"]
    evaluate += ["--dtype", "float32"]
    found = {}
    for name, arguments in {
        "run": ["--base", str(base), "--adapter", str(tmp_path / "run")],
        "stored": ["--base", str(base), "--adapter", str(tmp_path / "run"), "--quantization", "none"],
    }.items():
        done = subprocess.run([*evaluate, *arguments], capture_output=True, text=True, cwd=ROOT, env=os.environ)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)["loss"]
    assert found["run"] == pytest.approx(result["cross_entropy_merged"], abs=1e-5)
    assert abs(found["run"] - found["stored"]) > 1e-4
    # The rows may be gone by then.
    (tmp_path / "rows.jsonl").unlink()
    result = export(tmp_path / "run", tmp_path / "again", None, True, "bfloat16", False, cost=True)
    assert result["cross_entropy_merged"] is None and result["logits_relative_difference"] > 0
