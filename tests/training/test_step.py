"""The training step: what it differentiates, what moves, and what does not change what is trained."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from shared_data import needs_data
from steps import REVIEWS, digest, largest, open_run, restore_raw, review_config, take_steps, tiny_config

from jlora.data import packing
from jlora.errors import DataError, NonFiniteError
from jlora.hf.peft import save_adapter
from jlora.training import optim
from jlora.training.checkpoint import flatten
from jlora.training.folder import require_taken
from jlora.training.metrics import read_metrics
from jlora.training.run import put_batch, train

pytestmark = pytest.mark.usefixtures("mesh_of_one")


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


def test_another_batch_than_the_steps_is_refused():
    batch = {"tokens": jnp.zeros((1, 4, 8), jnp.int32), "weights": jnp.ones((1, 4, 8))}
    compiled = jax.jit(lambda state, frozen, batch, hyper: batch).lower(0, 0, batch, 0).compile()
    require_taken(batch, compiled, 3)
    with pytest.raises(DataError, match=r"step 3 .* \(leaves 'tokens': shapes: \(1, 4, 9\) != \(1, 4, 8\)\)"):
        require_taken(batch | {"tokens": jnp.zeros((1, 4, 9), jnp.int32)}, compiled, 3)
    with pytest.raises(DataError, match=r"step 4 .* \(leaves 'weights': types: int32 != float32\)"):
        require_taken(batch | {"weights": jnp.ones((1, 4, 8), jnp.int32)}, compiled, 4)


def with_random_b(adapter, seed=7):
    """The adapter with B drawn at random, so that it has a say."""
    key = jax.random.key(seed)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), adapter)


@pytest.mark.long
@pytest.mark.parametrize(
    "real", [False, pytest.param(True, marks=[needs_data, pytest.mark.slow])], ids=["tiny", "reviews"]
)
def test_packing_changes_neither_loss_nor_gradients(tiny, tmp_path, record_property, real):
    section, lora = {"max_length": 512 if real else 64}, {"target_modules": "all-linear"}
    make = review_config if real else (lambda folder, **sections: tiny_config(tiny, folder, **sections))
    if real:
        short = sorted(REVIEWS.read_text(encoding="utf-8").splitlines(), key=len)[:6]
        (tmp_path / "short.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
        section["train"] = str(tmp_path / "short.jsonl")
    runs = [open_run(make(tmp_path, data=section | {"packing": on}, lora=lora)) for on in (True, False)]
    shape = max(len(run.epochs.rows(0)) for run in runs)  # for both, so that one program does: the rest is padding

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def of_adapter(adapter, base, batch):
        return runs[0].forward.loss(base, adapter, batch, None)[:2]

    found = []
    for run in runs:
        rows = [row for row in run.epochs.rows(0) if row]
        batch = [[run.train_data.examples[i] for i in row] for row in rows] + [[]] * (shape - len(rows))
        batch = [packing.pack_row(examples, section["max_length"]) for examples in batch]
        batch = {name: np.stack([row[name] for row in batch]) for name in batch[0]}
        adapter = with_random_b(optim.join(run.state.trained, run.frozen)["adapter"])
        (total, count), gradients = of_adapter(adapter, run.pretrained.base, batch)
        scaled = {name: np.asarray(leaf) / count for name, leaf in flatten(gradients).items()}
        found.append((len(rows), float(total), int(count), scaled))
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

    batch = put_batch(next(packing.batches(run.epochs, 4)), 1, run.mesh)
    weights = {tuple(sorted(leaf.shape[1:])) for leaf in jax.tree.leaves(run.pretrained.base.layers) if leaf.ndim > 2}
    shapes = dot_shapes(jax.make_jaxpr(run.step)(run.state, run.frozen, batch, run.hyper).jaxpr)
    assert bool(shapes & weights) == (method == "full")  # the gradient of a weight is a matmul of its shape
    if method == "full":
        assert weights <= shapes
    new_state, _ = jax.eval_shape(run.step, run.state, run.frozen, batch, run.hyper)
    assert list(flatten(new_state)) == list(flatten(run.state))


def test_what_is_frozen_is_no_part_of_the_state(tiny, tmp_path):
    run = open_run(tiny_config(tiny, tmp_path))
    assert list(run.state.trained) == ["adapter"] and run.frozen["base"] is run.pretrained.base
    batch = put_batch(next(packing.batches(run.epochs, 4)), 1, run.mesh)
    new, _ = jax.eval_shape(run.step, run.state, run.frozen, batch, run.hyper)
    assert jax.tree.structure(new) == jax.tree.structure(run.state)


@pytest.mark.long
def test_a_seed_gives_one_adapter(tiny, tmp_path):
    runs = []
    for seed in (0, 0, 1):
        cfg = tiny_config(tiny, tmp_path, training={"seed": seed, "batch_size": 24}, lora={"dropout": 0.3})
        run = open_run(cfg, like=runs[0][0] if runs else None)
        before = digest(run.state.trained)
        take_steps(run, 3)
        runs.append((run, before, digest(run.state.trained)))
    (_, *first), (_, *again), (_, *other) = runs
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.long
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
        batch = put_batch(next(packing.batches(run.epochs, 24)), parts, run.mesh)
        return [line["loss"] for line in take_steps(run, 3, batch)]

    still, dropped = losses(0.0), losses(0.3)
    np.testing.assert_allclose(still, still[0], rtol=0, atol=1e-5)
    assert min(np.abs(np.diff(dropped))) > 1e-4 and len(set(dropped)) == 3
    assert abs(losses(0.3, parts=2)[0] - dropped[0]) > 1e-4  # parts do not share their draws


@pytest.mark.long
@pytest.mark.parametrize(
    "name, learning_rate", [("adamw", 1e-2), ("adafactor", 1e-2), ("lion", 2e-3), ("sgd", 1e-1)], ids=lambda x: str(x)
)
def test_every_optimizer_lowers_the_loss(tiny, tmp_path, name, learning_rate):
    section = {"name": name, "learning_rate": learning_rate, "schedule": "constant", "weight_decay": 0.01}
    run = open_run(tiny_config(tiny, tmp_path, optimizer=section, training={"batch_size": 24}))
    losses = [line["loss"] for line in take_steps(run, 4)]  # every batch holds all rows
    assert np.isfinite(losses).all() and losses[3] < losses[0] - 1e-3
    chex.assert_tree_all_finite(run.state.trained)


def test_train_on_all_counts_every_next_token(tiny, tmp_path):
    counts, run = {}, None
    for train_on in ("response", "all"):
        run = open_run(tiny_config(tiny, tmp_path, data={"train_on": train_on}, training={"batch_size": 24}), like=run)
        (line,) = take_steps(run, 1)
        counts[train_on] = line["trained_tokens"]
        lengths = sum(len(example.ids) - 1 for example in run.train_data.examples)
        trained = sum(int(example.trained[1:].sum()) for example in run.train_data.examples)
        assert line["trained_tokens"] == (lengths if train_on == "all" else trained)
    assert counts["all"] > counts["response"]


def test_a_step_that_is_not_finite_changes_nothing(tiny, tmp_path):
    run = open_run(tiny_config(tiny, tmp_path, optimizer={"warmup_steps": 5}))
    take_steps(run, 2)
    before = jax.device_get(run.state)
    batches = packing.batches(run.epochs, 4)
    good = put_batch(next(batches), 1, run.mesh)
    bad = good | {"weights": good["weights"].at[0, 0, 0].set(jnp.nan)}
    state, metrics = run.step(run.state, run.frozen, bad, run.hyper)
    assert digest(state.trained) == digest(before.trained)
    assert digest(state.opt_state) == digest(before.opt_state)
    assert (int(state.step), int(state.skipped), int(metrics["skipped_steps"])) == (3, 1, 1)
    rate = metrics["learning_rate"]
    state, metrics = run.step(state, run.frozen, good, run.hyper)
    assert digest(state.trained) != digest(before.trained)
    assert (int(state.step), int(state.skipped), int(metrics["skipped_steps"])) == (4, 1, 1)
    assert metrics["learning_rate"] == rate  # the schedule waited for it


@pytest.mark.long
def test_too_many_steps_that_are_not_finite_end_the_run(tiny, tmp_path):
    sections = {
        "optimizer": {"learning_rate": 1e38, "schedule": "constant"},
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
        chex.assert_tree_all_finite({name: array for name, array in arrays.items() if name != "losses"})
        assert arrays["skipped"] <= 3

    # The same command meets the same end; it starts from the checkpoint.
    with pytest.raises(NonFiniteError):
        train(cfg, quiet=True)
    again = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in again] == [line["step"] for line in lines]
