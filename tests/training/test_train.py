"""The training step and the whole of a run, against plain loops in PyTorch, transformers and PEFT."""

import hashlib
import json
import shutil
import warnings
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from jax.extend.core import jaxprs_in_params
from safetensors.numpy import load_file
from shared_data import SHARED, needs_data
from tiny import make_completions, make_llama, make_tokenizer, write_config
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup

import jlora.train
import jlora.training.shared
from jlora import data
from jlora.config import load_config
from jlora.data import Epochs, read_data
from jlora.errors import ModelError, NonFiniteError
from jlora.export import export
from jlora.hf.peft import load_adapter, save_adapter
from jlora.hf.pretrained import load_pretrained, make_adapter, open_pretrained
from jlora.training import optim
from jlora.training.checkpoint import flatten
from jlora.training.metrics import read_metrics
from jlora.training.run import put_batch, train
from jlora.training.step import init_state, make_eval_step, make_forward, make_train_step, param_dtype

STORIES = SHARED / "stories260K"
REVIEWS = SHARED / "reviews" / "sephora_reviews.jsonl"
COMPLETIONS = {"format": "completion", "max_length": 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random Llama with a tokenizer, and short rows: (folder, rows)."""
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    return folder / "base", make_completions(folder / "rows.jsonl")


def configure(folder, base, rows, sections):
    overrides = [f"model.{key}={value}" for key, value in sections.pop("model", {}).items()]
    return load_config(write_config(folder / "run.yaml", base, rows, folder / "run", **sections), overrides)


def tiny_config(tiny, folder, **sections):
    sections["data"] = COMPLETIONS | sections.get("data", {})
    return configure(folder, *tiny, sections)


def review_config(folder, **sections):
    sections["data"] = {"max_length": 256, "packing": False, "on_bad_row": "skip"} | sections.get("data", {})
    return configure(folder, STORIES, REVIEWS, sections)


@cache
def open_base(path, dtype):
    return load_pretrained(open_pretrained(path, None, None), dtype, make_mesh_of_one())


def open_run(cfg, num_steps=20):
    """What `train` puts together, to be stepped by hand."""
    mesh = make_mesh_of_one()
    pretrained = open_base(cfg.model.path, param_dtype(cfg))
    _, forward = make_forward(cfg, pretrained.base.cfg, mesh)
    train_data, _ = read_data(cfg, pretrained.tokenizer)
    params = {"adapter": make_adapter(cfg, pretrained, mesh), "base": pretrained.base}
    trained, frozen = optim.split(params, cfg.method)
    hyper = optim.hyperparameters(cfg.optimizer, num_steps)
    return SimpleNamespace(
        cfg=cfg,
        mesh=mesh,
        forward=forward,
        pretrained=pretrained,
        train_data=train_data,
        epochs=Epochs(train_data, cfg.data, cfg.training.batch_size, cfg.training.seed),
        state=init_state(trained, cfg, mesh),
        frozen=frozen,
        step=partial(make_train_step(cfg, forward), hyper=hyper),
    )


@pytest.fixture(autouse=True)
def _no_mesh_left():
    with jax.set_mesh(make_mesh_of_one()):
        yield


def make_mesh_of_one():
    return jax.sharding.Mesh(np.asarray(jax.devices()).reshape(1, 1, 1), ("data", "fsdp", "tensor"))


def take_steps(run, count, same=None):
    """Take steps in place, on the run's batches or always on the `same`; returns their metrics."""
    batches = data.batches(run.epochs, run.cfg.training.batch_size)
    step = jax.jit(run.step, donate_argnums=0)
    lines = []
    for _ in range(count):
        batch = same or put_batch(next(batches), run.cfg.training.gradient_accumulation_steps, run.mesh)
        run.state, metrics = step(run.state, run.frozen, batch)
        lines.append({name: value.item() for name, value in metrics.items()})
    return lines


def digest(tree):
    """SHA-256 over every leaf's path and bytes."""
    found = hashlib.sha256()
    for name, leaf in flatten(tree).items():
        found.update(name.encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


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
        length = max(len(example.ids) for example in examples)
        ids, mask = torch.zeros(2, len(examples), length, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, example in enumerate(examples):
            row = torch.tensor(np.asarray(example.ids), dtype=torch.long)
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
            labels[i, : len(row)] = torch.where(torch.tensor(np.asarray(example.trained)), row, -100)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        targets = labels[:, 1:]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = total / (targets != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        lines.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
    return lines


def largest(a, b):
    """The largest difference between two dicts of arrays of the same names."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


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
        init, make_adapter(fresh, pretrained, make_mesh_of_one()), cfg.lora, str(STORIES), pretrained.base_hash
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


def test_full_fine_tuning_is_that_of_torch(tiny, tmp_path, record_property):
    sections = {"training": {"max_steps": 20, "save_every": 12}, "optimizer": {"learning_rate": 5e-4}}
    cfg = tiny_config(tiny, tmp_path, method="full", **sections)
    pretrained = open_base(str(tiny[0]), jnp.dtype("float32"))
    steps = examples_of_steps(cfg, pretrained, 20)
    assert max(len(examples) for examples in steps) > cfg.training.batch_size  # they are packed

    summary = train(cfg, quiet=True)
    run_dir = tmp_path / "run"
    assert summary["frozen_params"] == 0 and summary["trainable_params"] > 0
    assert summary["adapter"] is None and not (run_dir / "adapter").exists()
    theirs = LlamaForCausalLM.from_pretrained(tiny[0]).train()
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
    exported = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    probe = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (exported(probe).logits - theirs(probe).logits).abs().max().item()
    record_property("largest_logit_difference", difference)
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    found = {name: p.detach().numpy() for name, p in exported.named_parameters()}
    record_property("largest_weight_difference", largest(found, weights))
    restored = restore_raw(run_dir / "checkpoints" / "20")
    np.testing.assert_array_equal(restored["trained/base/embed_tokens/value"], found["model.embed_tokens.weight"])
    assert difference <= 1e-4


def restore_raw(step_folder):
    """Arrays of a checkpoint by name, as Orbax itself finds them."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(step_folder.absolute() / "state")
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


def state_digest(step_folder):
    return digest(restore_raw(step_folder))


def test_accumulation_does_not_change_the_adapter(tiny, tmp_path, record_property):
    runs = []
    for parts in (1, 2, 4):
        training = {"batch_size": 4, "gradient_accumulation_steps": parts}
        run = open_run(tiny_config(tiny, tmp_path, training=training, data={"packing": False}))
        lines = take_steps(run, 6)
        runs.append(({name: np.asarray(x) for name, x in flatten(run.state.trained).items()}, lines))
    counts = [len(example.ids) for example in open_run(tiny_config(tiny, tmp_path)).train_data.examples]
    assert max(counts) > 2 * min(counts)
    for trained, lines in runs[1:]:
        difference = largest(trained, runs[0][0])
        record_property("largest_difference", difference)
        assert difference <= 1e-5
        np.testing.assert_allclose([x["loss"] for x in lines], [x["loss"] for x in runs[0][1]], rtol=0, atol=1e-5)
        assert [x["trained_tokens"] for x in lines] == [x["trained_tokens"] for x in runs[0][1]]


def with_random_b(adapter, seed=7):
    """The adapter with B drawn at random, so that it has a say."""
    key = jax.random.key(seed)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), adapter)


@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=[needs_data, pytest.mark.slow])], ids=["tiny", "reviews"]
)
def test_packing_changes_neither_loss_nor_gradients(tiny, tmp_path, record_property, real):
    found = []
    for packing in (True, False):
        section = {"packing": packing, "max_length": 512 if real else 64}
        lora = {"target_modules": "all-linear"}
        make = review_config if real else (lambda folder, **sections: tiny_config(tiny, folder, **sections))
        if real:
            short = sorted(REVIEWS.read_text(encoding="utf-8").splitlines(), key=len)[:6]
            (tmp_path / "short.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
            section["train"] = str(tmp_path / "short.jsonl")
        run = open_run(make(tmp_path, data=section, lora=lora))
        rows = run.epochs.rows(0)
        batch = [data.pack_row([run.train_data.examples[i] for i in row], section["max_length"]) for row in rows]
        batch = {name: np.stack([row[name] for row in batch]) for name in batch[0]}
        adapter = with_random_b(optim.join(run.state.trained, run.frozen)["adapter"])

        def loss(adapter, base, batch, run=run):
            return run.forward.loss(base, adapter, batch, None)[:2]

        of_adapter = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (total, count), gradients = of_adapter(adapter, run.pretrained.base, batch)
        scaled = {name: np.asarray(leaf) / count for name, leaf in flatten(gradients).items()}
        found.append((len([row for row in rows if row]), float(total), int(count), scaled))
    (packed_rows, packed, count, gradients), (num_rows, loose, loose_count, loose_gradients) = found
    assert packed_rows < num_rows and count == loose_count
    record_property("loss_difference", abs(packed - loose) / count)
    record_property("gradient_difference", largest(gradients, loose_gradients))
    assert abs(packed - loose) / count <= 1e-5
    size = max(float(np.abs(g).max()) for g in gradients.values())
    assert largest(gradients, loose_gradients) <= 1e-5 * size
    assert size > 1e-3


def dot_shapes(jaxpr):
    """Sorted dims of every matmul's result, inner programs included."""
    shapes = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes |= {tuple(sorted(out.aval.shape)) for out in equation.outvars}
        for inner in jaxprs_in_params(equation.params):
            shapes |= dot_shapes(inner)
    return shapes


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_and_optimizer_state_are_those_of_what_is_trained(tiny, tmp_path, method):
    # Rank 3 and rows of 37 tokens: no activation or factor has the dims of a weight.
    lora = {"rank": 3, "target_modules": "all-linear"}
    run = open_run(tiny_config(tiny, tmp_path, method=method, lora=lora, data={"max_length": 37}))
    trained_part, frozen_part = ("adapter", "base") if method == "lora" else ("base", "adapter")
    names = list(flatten(run.state.trained))
    assert names and all(name.startswith(f"{trained_part}/") for name in names)
    sizes = {leaf.shape for leaf in jax.tree.leaves(run.state.trained)}

    moments = [leaf for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim]
    assert {leaf.shape for leaf in moments} == sizes
    assert len(moments) == 2 * len(names)  # Adam's two
    assert all(f"/{frozen_part}/" not in name for name in flatten(run.state.opt_state))
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}

    batch = put_batch(next(data.batches(run.epochs, 4)), 1, run.mesh)
    weights = {tuple(sorted(leaf.shape[1:])) for leaf in jax.tree.leaves(run.pretrained.base.layers) if leaf.ndim > 2}
    shapes = dot_shapes(jax.make_jaxpr(run.step)(run.state, run.frozen, batch).jaxpr)
    assert bool(shapes & weights) == (method == "full")  # the gradient of a weight is a matmul of its shape
    if method == "full":
        assert weights <= shapes
    new_state, _ = jax.eval_shape(run.step, run.state, run.frozen, batch)
    assert list(flatten(new_state)) == list(flatten(run.state))


def test_what_is_frozen_is_no_part_of_the_state(tiny, tmp_path):
    run = open_run(tiny_config(tiny, tmp_path))
    assert list(run.state.trained) == ["adapter"] and run.frozen["base"] is run.pretrained.base
    new, _ = jax.jit(run.step)(run.state, run.frozen, put_batch(next(data.batches(run.epochs, 4)), 1, run.mesh))
    assert jax.tree.structure(new) == jax.tree.structure(run.state)


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
        patch.setattr(jlora.training.shared, "load_pretrained", load)
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


def test_a_seed_gives_one_adapter(tiny, tmp_path):
    def final(seed):
        cfg = tiny_config(tiny, tmp_path, training={"seed": seed}, lora={"dropout": 0.2})
        run = open_run(cfg)
        before = digest(run.state.trained)
        take_steps(run, 3)
        return before, digest(run.state.trained)

    assert final(0) == final(0)
    assert all(a != b for a, b in zip(final(0), final(1), strict=True))


def test_dropout_is_drawn_anew_each_step_and_part(tiny, tmp_path):
    def losses(dropout, parts=1):
        lora = {"dropout": dropout, "init_from": str(tmp_path / "init")}
        training = {"batch_size": 24, "gradient_accumulation_steps": parts}
        # The same batch each time and no movement: losses differ only by what is dropped.
        section = {"learning_rate": 1e-30, "schedule": "constant"}
        cfg = tiny_config(tiny, tmp_path, lora=lora, training=training, optimizer=section, data={"packing": False})
        if not (tmp_path / "init").exists():
            run = open_run(tiny_config(tiny, tmp_path))
            adapter = with_random_b(optim.join(run.state.trained, run.frozen)["adapter"])
            save_adapter(tmp_path / "init", adapter, run.cfg.lora, str(tiny[0]), run.pretrained.base_hash)
        run = open_run(cfg)
        batch = put_batch(next(data.batches(run.epochs, 24)), parts, run.mesh)
        return [line["loss"] for line in take_steps(run, 3, batch)]

    still, dropped = losses(0.0), losses(0.3)
    np.testing.assert_allclose(still, still[0], rtol=0, atol=1e-5)
    assert min(np.abs(np.diff(dropped))) > 1e-4 and len(set(dropped)) == 3
    assert abs(losses(0.3, parts=2)[0] - dropped[0]) > 1e-4  # parts do not share their draws


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


@pytest.mark.parametrize(
    "name, learning_rate", [("adamw", 1e-2), ("adafactor", 1e-2), ("lion", 2e-3), ("sgd", 1e-1)], ids=lambda x: str(x)
)
def test_every_optimizer_lowers_the_loss(tiny, tmp_path, name, learning_rate):
    section = {"name": name, "learning_rate": learning_rate, "schedule": "constant", "weight_decay": 0.01}
    run = open_run(tiny_config(tiny, tmp_path, optimizer=section, training={"batch_size": 24}))
    losses = [line["loss"] for line in take_steps(run, 4)]  # every batch holds all rows
    assert np.isfinite(losses).all() and losses[3] < losses[0] - 1e-3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.state.trained))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_optimizer_rule_and_schedule_are_those_of_torch(name, schedule):
    from transformers import get_scheduler

    from jlora.config import OptimizerSection

    section = OptimizerSection(
        name=name, learning_rate=0.05, weight_decay=0.1, schedule=schedule, warmup_steps=3, max_grad_norm=0.7
    )
    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 5)).astype(np.float32)
    gradients = [(rng.normal(size=(4, 5)) * scale).astype(np.float32) for scale in (3.0, 0.05, 1.0) * 3]

    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    rule = {
        "adamw": lambda: torch.optim.AdamW([theirs], lr=0.05, weight_decay=0.1),
        "sgd": lambda: torch.optim.SGD([theirs], lr=0.05, momentum=0.9, weight_decay=0.1),
    }[name]()
    scheduler = get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule, rule, num_warmup_steps=3, num_training_steps=9
    )
    params = {"base": jnp.asarray(start)}
    optimizer = optim.make_optimizer(section, params, optim.hyperparameters(section, 9))
    state = optimizer.init(params)
    for gradient in gradients:
        theirs.grad = torch.from_numpy(gradient.copy())
        torch.nn.utils.clip_grad_norm_([theirs], 0.7)
        rule.step()
        scheduler.step()
        updates, state = optimizer.update({"base": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["base"], theirs.detach().numpy(), rtol=0, atol=2e-6)
    assert np.abs(params["base"] - start).max() > 0.05


def test_train_on_all_counts_every_next_token(tiny, tmp_path):
    counts = {}
    for train_on in ("response", "all"):
        run = open_run(tiny_config(tiny, tmp_path, data={"train_on": train_on}, training={"batch_size": 24}))
        (line,) = take_steps(run, 1)
        counts[train_on] = line["trained_tokens"]
        lengths = sum(len(example.ids) - 1 for example in run.train_data.examples)
        trained = sum(int(example.trained[1:].sum()) for example in run.train_data.examples)
        assert line["trained_tokens"] == (lengths if train_on == "all" else trained)
    assert counts["all"] > counts["response"]


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
    batch = next(data.batches(run.epochs, 4))
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


def test_a_step_that_is_not_finite_changes_nothing(tiny, tmp_path):
    run = open_run(tiny_config(tiny, tmp_path, optimizer={"warmup_steps": 5}))
    take_steps(run, 2)
    before = jax.device_get(run.state)
    batches = data.batches(run.epochs, 4)
    good = put_batch(next(batches), 1, run.mesh)
    bad = good | {"weights": good["weights"].at[0, 0, 0].set(jnp.nan)}
    state, metrics = jax.jit(run.step)(run.state, run.frozen, bad)
    assert digest(state.trained) == digest(before.trained)
    assert digest(state.opt_state) == digest(before.opt_state)
    assert (int(state.step), int(state.skipped), int(metrics["skipped_steps"])) == (3, 1, 1)
    rate = metrics["learning_rate"]
    state, metrics = jax.jit(run.step)(state, run.frozen, good)
    assert digest(state.trained) != digest(before.trained)
    assert (int(state.step), int(state.skipped), int(metrics["skipped_steps"])) == (4, 1, 1)
    assert metrics["learning_rate"] == rate  # the schedule waited for it


def test_too_many_steps_that_are_not_finite_end_the_run(tiny, tmp_path):
    sections = {
        "optimizer": {"learning_rate": 1e38, "max_grad_norm": None, "schedule": "constant"},
        "training": {"max_steps": 20, "save_every": 2, "max_nonfinite_steps": 3, "keep_checkpoints": 5},
    }
    cfg = tiny_config(tiny, tmp_path, **sections)
    with pytest.raises(NonFiniteError, match=r"max_nonfinite_steps=3.*checkpoint \d+ stays") as error:
        train(cfg, quiet=True)
    assert error.value.exit_code == 6
    run_dir = tmp_path / "run"
    assert not (run_dir / "adapter").exists() and not (run_dir / "summary.json").exists()
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert lines[-1]["skipped_steps"] == 4
    steps = sorted(int(folder.name) for folder in (run_dir / "checkpoints").iterdir())
    assert steps and steps[-1] < lines[-1]["step"]
    for step in steps:
        arrays = restore_raw(run_dir / "checkpoints" / str(step))
        assert all(np.isfinite(array).all() for name, array in arrays.items() if name != "losses")
        assert arrays["skipped"] <= 3

    # The same command meets the same end; it starts from the checkpoint.
    with pytest.raises(NonFiniteError):
        train(cfg, quiet=True)
    again = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in again] == [line["step"] for line in lines]
