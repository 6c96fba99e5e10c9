"""Runs against plain loops in PyTorch, transformers and PEFT: loss, gradient norm and weights, step for step."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import make_family
from safetensors.numpy import load_file
from shared_data import needs_data
from steps import STORIES, digest, largest, open_base, restore_raw, review_config, tiny_config
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, get_cosine_schedule_with_warmup

from jlora.data.encoding import read_data
from jlora.data.packing import Epochs
from jlora.hf.adapters import first_adapter
from jlora.hf.peft import save_adapter
from jlora.model.sharding import one_device_mesh
from jlora.training.export import export
from jlora.training.metrics import read_metrics
from jlora.training.run import train

pytestmark = pytest.mark.usefixtures("optimized", "mesh_of_one")


def examples_of(cfg, pretrained):
    """The examples of the training rows."""
    return list(read_data(cfg, pretrained.tokenizer)[0].examples)


def examples_of_steps(cfg, pretrained, num_steps):
    """The examples of each step, unpacked."""
    train_data, _ = read_data(cfg, pretrained.tokenizer)
    size = cfg.training.batch_size
    epochs = Epochs(train_data, cfg.data, size, cfg.training.seed)
    rows, epoch = [], 0
    while len(rows) < num_steps * size:
        rows += epochs.rows(epoch)
        epoch += 1
    return [
        [train_data.examples[i] for row in rows[step * size : (step + 1) * size] for i in row]
        for step in range(num_steps)
    ]


def torch_loss(model, examples):
    """Mean loss of padded rows by the weights of their tokens."""
    length = max(len(example.ids) for example in examples)
    ids, mask = torch.zeros(2, len(examples), length, dtype=torch.long)
    weights = torch.zeros(len(examples), length)
    for i, example in enumerate(examples):
        row = torch.tensor(np.asarray(example.ids), dtype=torch.long)
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        weights[i, : len(row)] = torch.tensor(np.asarray(example.weights, np.float32))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (each * weights[:, 1:].flatten()).sum() / weights.sum()


def torch_curve(model, cfg, steps):
    """Loss and gradient norm of each step of a plain loop: padded rows, AdamW, cosine schedule, clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    section = cfg.optimizer
    optimizer = torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        betas=(section.b1, section.b2),
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, section.warmup_steps, len(steps))
    lines = []
    for examples in steps:
        loss = torch_loss(model, examples)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        lines.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
    return lines


def assert_same_curve(ours, theirs, record):
    ours = [line for line in ours if "loss" in line]
    assert len(ours) == len(theirs)
    for name in ("loss", "grad_norm", "learning_rate"):
        difference = max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True))
        record(f"largest_{name}_difference", difference)
        assert difference <= 1e-4, name


@needs_data
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["qv", "all"])
def test_lora_curve_is_that_of_peft(tmp_path, record_property, targets):
    from peft import PeftModel

    init = tmp_path / "init"
    sections = {
        "lora": {"target_modules": targets, "init_from": str(init)},
        "training": {"max_steps": 20, "seed": 3},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 4, "weight_decay": 0.01},
    }
    cfg = review_config(tmp_path, **sections)
    pretrained = open_base(str(STORIES), jnp.dtype("float32"))
    fresh = cfg.model_copy(update={"lora": cfg.lora.model_copy(update={"init_from": None})})
    save_adapter(
        init, first_adapter(fresh, pretrained, one_device_mesh()), cfg.lora, str(STORIES), pretrained.base_hash
    )
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(STORIES), str(init), is_trainable=True)

    train(cfg, quiet=True)
    curve = torch_curve(theirs, cfg, examples_of_steps(cfg, pretrained, 20))

    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert np.mean([line["loss"] for line in lines[-5:]]) < np.mean([line["loss"] for line in lines[:5]]) - 0.05
    assert_same_curve(lines, curve, record_property)
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    expected = {
        name.replace(".default", ""): p.detach().numpy() for name, p in theirs.named_parameters() if p.requires_grad
    }
    difference = largest(trained, expected)
    record_property("largest_adapter_difference", difference)
    assert difference <= 1e-4
    assert largest(trained, load_file(init / "adapter_model.safetensors")) > 1e-3


@pytest.mark.long
def test_weights_of_rows_are_those_of_torch(tiny, tmp_path, record_property):
    """Of batches whose weights sum up to more and to less than one, in micro-batches, packed; and of held-out rows."""
    rows = [json.loads(line) for line in tiny[1].read_text().splitlines()]
    for i, row in enumerate(rows):
        row["weight"] = (0.0, 0.5, 1.0, 3.0)[i % 4] if i < 12 else 0.002 * (i % 5)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{**row, "prompt": f"Now {row['prompt']}"} for row in rows]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    data = {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "held.jsonl"), "on_bad_row": "skip"}
    sections = {"training": {"max_steps": 6, "gradient_accumulation_steps": 2}, "optimizer": {"learning_rate": 5e-4}}
    cfg = tiny_config(tiny, tmp_path, method="full", data=data, **sections)
    pretrained = open_base(str(tiny[0]), jnp.dtype("float32"))
    steps = examples_of_steps(cfg, pretrained, 6)
    sums = [sum(float(example.weights.sum()) for example in examples) for examples in steps]
    assert min(sums) < 0.8 and max(sums) > 5
    train(cfg, quiet=True)
    theirs = LlamaForCausalLM.from_pretrained(tiny[0]).train()
    held = torch_loss(theirs, read_data(cfg, pretrained.tokenizer)[1].examples).item()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert_same_curve(lines, torch_curve(theirs, cfg, steps), record_property)
    counts = [sum(int(example.trained.sum()) for example in examples) for examples in steps]
    assert [line["trained_tokens"] for line in lines if "trained_tokens" in line] == counts
    assert abs(next(line["eval_loss"] for line in lines if "eval_loss" in line) - held) <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_fine_tuning_is_that_of_torch(family, tiny, tmp_path, record_property):
    """With GPT-2 that is token and position embeddings, norms with their biases, all projections, and the tied head."""
    if family == "gpt2":
        make_family(tmp_path / "gpt2", "gpt2", tie_word_embeddings=True, initializer_range=0.05)
        make_tokenizer(tmp_path / "gpt2")
        tiny = tmp_path / "gpt2", tiny[1]
    sections = {"training": {"max_steps": 20, "save_every": 12}, "optimizer": {"learning_rate": 5e-4}}
    cfg = tiny_config(tiny, tmp_path, method="full", **sections)
    pretrained = open_base(str(tiny[0]), jnp.dtype("float32"))
    steps = examples_of_steps(cfg, pretrained, 20)
    assert max(len(examples) for examples in steps) > cfg.training.batch_size  # they are packed

    summary = train(cfg, quiet=True)
    run_dir = tmp_path / "run"
    assert summary["frozen_params"] == 0 and summary["trainable_params"] > 0
    assert summary["adapter"] is None and not (run_dir / "adapter").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tiny[0]).train()
    assert summary["trainable_params"] == sum(parameter.numel() for parameter in theirs.parameters())
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert_same_curve(lines, torch_curve(theirs, cfg, steps), record_property)

    # From the checkpoint of step 12 to the same end.
    first = state_digest(run_dir / "checkpoints" / "20")
    shutil.rmtree(run_dir / "checkpoints" / "20")
    train(cfg, quiet=True)
    assert state_digest(run_dir / "checkpoints" / "20") == first
    again = read_metrics(run_dir / "metrics.jsonl")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]

    out = tmp_path / "out"
    export(run_dir, out, None, merge=False, dtype="float32", peft=False)
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    theirs.eval()
    probe = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (exported(probe).logits - theirs(probe).logits).abs().max().item()
    record_property("largest_logit_difference", difference)
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    found = {name: p.detach().numpy() for name, p in exported.named_parameters()}
    record_property("largest_weight_difference", largest(found, weights))
    restored = restore_raw(run_dir / "checkpoints" / "20")
    np.testing.assert_array_equal(
        restored["trained/base/embed_tokens/value"], exported.get_input_embeddings().weight.detach()
    )
    assert difference <= 1e-4


def state_digest(step_folder):
    return digest(restore_raw(step_folder))
