"""A LoRA run on real text: it learns, it leaves its base alone, and PEFT computes the same with what it exports."""

import json
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from shared_data import SHARED, needs_data
from steps import STORIES, digest, open_run, restore_raw, review_config, take_steps
from transformers import LlamaForCausalLM

import jlora.train
import jlora.training.base
from jlora.data import packing
from jlora.errors import ModelError
from jlora.hf.peft import load_adapter
from jlora.hf.pretrained import load_pretrained
from jlora.training import optim
from jlora.training.export import export
from jlora.training.metrics import read_metrics
from jlora.training.run import train
from jlora.training.step import make_eval_step

pytestmark = pytest.mark.usefixtures("optimized", "mesh_of_one")


@pytest.fixture(scope="module")
def reviews_run(tmp_path_factory):
    """A LoRA run of 60 steps on real text, with the base that it was given: hash before, hash after."""
    folder = tmp_path_factory.mktemp("reviews")
    sections = {
        "lora": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "data": {"eval": 0.2},
        "training": {"max_steps": 60, "log_every": 5},
    }
    cfg = review_config(folder, **sections)
    bases = []

    def load(*args):
        pretrained = load_pretrained(*args)
        bases.append((pretrained.base, digest(pretrained.base)))
        return pretrained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jlora.training.base, "load_pretrained", load)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            summary = train(cfg, quiet=True)
    ((base, before),) = bases
    return SimpleNamespace(
        run_dir=folder / "run",
        cfg=cfg,
        summary=summary,
        base_before=before,
        base_after=digest(base),
        warnings=[str(warning.message) for warning in warned],
    )


@needs_data
def test_training_lowers_the_held_out_loss(reviews_run, record_property):
    summary = reviews_run.summary
    record_property("eval_loss", [summary["eval_loss_before"], summary["eval_loss"]])
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.5
    assert summary["status"] == "finished" and summary["steps"] == 60 and summary["skipped_steps"] == 0
    lines = [line for line in read_metrics(reviews_run.run_dir / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(5, 61, 5))


@needs_data
def test_training_leaves_the_base_as_it_was(reviews_run):
    assert reviews_run.base_after == reviews_run.base_before
    assert not [text for text in reviews_run.warnings if "donated" in text]  # nothing but the state is given away


@needs_data
def test_checkpoint_holds_nothing_of_the_base(reviews_run):
    step_folder = reviews_run.run_dir / "checkpoints" / "60"
    arrays = restore_raw(step_folder)
    parts = {"trained/adapter", "opt_state", "step", "skipped", "moved", "losses", "key"}
    assert all(any(name == part or name.startswith(f"{part}/") for part in parts) for name in arrays)
    assert not [name for name in arrays if "base" in name or "embed" in name or "layernorm" in name]
    adapter = [array for name, array in arrays.items() if name.startswith("trained/")]
    assert len(adapter) == 6
    small = sum(array.nbytes for array in arrays.values() if array.ndim < 2)
    assert sum(array.nbytes for array in arrays.values()) == 3 * sum(a.nbytes for a in adapter) + small
    assert small < 200
    base_bytes = (STORIES / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in step_folder.rglob("*") if file.is_file()) < base_bytes
    assert sum(file.stat().st_size for file in (reviews_run.run_dir / "adapter").iterdir()) < base_bytes


@needs_data
def test_learned_adapter_computes_the_same_in_peft(reviews_run, tmp_path, record_property):
    from peft import PeftModel

    result = export(reviews_run.run_dir, tmp_path / "out", None, merge=False, dtype=None, peft=True)
    record_property("peft_relative_difference", result["peft_relative_difference"])
    assert result["peft_relative_difference"] <= 1e-4

    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(STORIES), reviews_run.run_dir / "adapter")
    run = open_run(reviews_run.cfg)
    ids = np.asarray(run.train_data.examples[0].ids, np.int32)[None]
    adapter = load_adapter(
        reviews_run.run_dir / "adapter", run.pretrained.base.cfg, run.pretrained.base_hash, dropout=0.0
    )
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    hidden = run.pretrained.base.hidden(
        jnp.asarray(ids),
        jnp.asarray(positions),
        jnp.ones_like(ids),
        adapter=adapter,
        dropout_key=None,
        neftune_noise_alpha=0.0,
        attention=run.forward.attention,
        remat="none",
        dtype=jnp.dtype("float32"),
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
        bare = LlamaForCausalLM.from_pretrained(STORIES)(torch.from_numpy(ids).long()).logits.numpy()
    difference = np.abs(np.asarray(run.pretrained.base.logits(hidden, adapter)) - expected).max()
    record_property("largest_logit_difference", float(difference))
    assert difference <= 1e-4
    assert np.abs(bare - expected).max() > 0.5


@pytest.mark.long
@needs_data
def test_init_from_goes_on_from_a_peft_adapter(reviews_run, tmp_path):
    """Of PEFT's own making: the adapter that came with the test data."""
    folder = SHARED / "stories260K_lora_reviews"
    theirs = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    lora = {
        "rank": theirs["r"],
        "alpha": theirs["lora_alpha"],
        "target_modules": theirs["target_modules"],
        "init_from": str(folder),
    }
    run = open_run(review_config(tmp_path, lora=lora))
    batch = next(packing.batches(run.epochs, 4))
    adapter = load_adapter(folder, run.pretrained.base.cfg, run.pretrained.base_hash, dropout=0.0)
    assert digest(optim.split({"adapter": adapter}, "lora")[0]["adapter"]) == digest(run.state.trained["adapter"])
    total, count, _ = make_eval_step(run.forward)(run.pretrained.base, adapter, None, batch)
    bare, _, _ = make_eval_step(run.forward)(run.pretrained.base, {}, None, batch)
    (line,) = take_steps(run, 1)
    assert line["loss"] == pytest.approx(total.item() / count.item(), rel=0, abs=1e-6)
    assert line["loss"] < bare.item() / count.item() - 0.3

    for key, value in (("rank", 3), ("alpha", 5), ("target_modules", ["q_proj"]), ("use_rslora", True)):
        with pytest.raises(ModelError, match=f"set lora.{key}="):
            train(review_config(tmp_path, lora=lora | {key: value}), quiet=True)
    with pytest.raises(ModelError, match="neither a PEFT adapter folder"):
        train(review_config(tmp_path, lora=lora | {"init_from": str(tmp_path)}), quiet=True)


@pytest.mark.long
@needs_data
def test_bfloat16_trains_float32_adapters(tmp_path, record_property):
    optimizer = {"learning_rate": 5e-3, "schedule": "constant"}
    cfg = review_config(tmp_path, model={"dtype": "bfloat16", "remat": "full"}, optimizer=optimizer)
    run = open_run(cfg)
    assert {leaf.dtype for leaf in jax.tree.leaves(run.pretrained.base)} == {jnp.dtype("bfloat16")}
    losses = [line["loss"] for line in take_steps(run, 16)]
    record_property("losses", losses)
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    leaves = [leaf for leaf in jax.tree.leaves((run.state.trained, run.state.opt_state)) if leaf.ndim]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
