"""Optimizers, schedules and clipping against PyTorch and transformers; labels and what they keep away."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from jlora.adapter import Lora
from jlora.config import OptimizerSection
from jlora.optim import combine, labels, learning_rate, make_optimizer, partition

STEPS = 10


def params(seed: int = 0) -> dict[str, Any]:
    """An adapter of two projections and a base, no two leaves of one shape."""
    draw = np.random.default_rng(seed)
    new = partial(draw.normal, 0.0, 0.5)
    adapter = {
        "q_proj": Lora(new(size=(2, 5, 3)), new(size=(2, 3, 7)), 2.0, 0.0),
        "up_proj": Lora(new(size=(2, 5, 4)), new(size=(2, 4, 6)), 2.0, 0.0),
    }
    base = {"embed": new(size=(11, 5)), "layers": {"q_proj": new(size=(2, 5, 7))}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"adapter": adapter, "base": base})


def section(**options: Any) -> OptimizerSection:
    """Constant rate, no clipping; no other value is a default."""
    fixed = {"learning_rate": 0.02, "weight_decay": 0.1, "b1": 0.85, "b2": 0.97, "eps": 1e-5}
    return OptimizerSection(**(fixed | {"schedule": "constant", "max_grad_norm": None} | options))


def run(cfg: OptimizerSection, gradients: list[Any], method: str = "lora") -> dict[str, Any]:
    """The parameters after one step a gradient."""
    tree = params()
    optimizer = make_optimizer(cfg, len(gradients), labels(tree, method))
    state = optimizer.init(tree)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def random_gradients(scale: float = 1.0) -> list[Any]:
    return [jax.tree.map(lambda x: scale * x, params(seed)) for seed in range(1, STEPS + 1)]


def by_torch(gradients: list[Any], method: str, make, max_norm: float | None = None, schedule=None) -> list[np.ndarray]:
    """The trained leaves after the same steps of a torch optimizer."""
    part = {"lora": "adapter", "full": "base"}[method]
    leaves = [torch.nn.Parameter(torch.from_numpy(np.array(x))) for x in jax.tree.leaves(params()[part])]
    optimizer = make(leaves)
    scheduler = schedule(optimizer) if schedule else None
    for gradient in gradients:
        for leaf, value in zip(leaves, jax.tree.leaves(gradient[part]), strict=True):
            leaf.grad = torch.from_numpy(np.array(value))
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return [leaf.detach().numpy() for leaf in leaves]


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675, line by line."""

    def __init__(self, leaves, lr, betas, weight_decay):
        super().__init__(leaves, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for leaf in group["params"]:
                m = self.state[leaf].setdefault("m", torch.zeros_like(leaf))
                c = b1 * m + (1 - b1) * leaf.grad
                leaf -= lr * (c.sign() + decay * leaf)
                m.copy_(b2 * m + (1 - b2) * leaf.grad)


RULES = {
    "adamw": partial(torch.optim.AdamW, lr=0.02, betas=(0.85, 0.97), eps=1e-5, weight_decay=0.1),
    "lion": partial(Lion, lr=0.02, betas=(0.85, 0.97), weight_decay=0.1),
    "sgd": partial(torch.optim.SGD, lr=0.02, momentum=0.85, weight_decay=0.1),
}


def assert_trained(tree, expected, method: str, tolerance: float = 1e-6) -> None:
    """The trained leaves are as expected, and no other moved."""
    parts = {"lora": ("adapter", "base"), "full": ("base", "adapter")}[method]
    for ours, theirs in zip(jax.tree.leaves(tree[parts[0]]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    before = params()
    jax.tree.map(np.testing.assert_array_equal, tree[parts[1]], before[parts[1]])
    moved = zip(jax.tree.leaves(tree[parts[0]]), jax.tree.leaves(before[parts[0]]), strict=True)
    assert all(np.abs(a - b).max() > 1e-2 for a, b in moved)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", RULES)
def test_equals_torch(name, method):
    gradients = random_gradients()
    assert_trained(run(section(name=name), gradients, method), by_torch(gradients, method, RULES[name]), method)


def test_whole_recipe_equals_torch():
    """AdamW with warm-up, cosine decay and clipping, as Trainer of transformers runs it."""
    gradients = random_gradients(scale=0.3)
    cfg = section(name="adamw", schedule="cosine", warmup_steps=3, max_grad_norm=1.0)
    schedule = partial(get_cosine_schedule_with_warmup, num_warmup_steps=3, num_training_steps=STEPS)
    assert_trained(run(cfg, gradients), by_torch(gradients, "lora", RULES["adamw"], 1.0, schedule), "lora")


def test_sgd_without_momentum():
    gradients = random_gradients()
    expected = by_torch(gradients, "lora", partial(torch.optim.SGD, lr=0.02, weight_decay=0.1))
    assert_trained(run(section(name="sgd", b1=0.0), gradients), expected, "lora")


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_minimises_a_quadratic(name):
    """Towards a target of half the parameters' size, down to a small share of the loss at the start."""
    target = jax.tree.map(lambda x: x / 2 + 0.1, params())
    tree = params()
    cfg = section(name=name, weight_decay=0.0, learning_rate=0.05, schedule="linear")
    optimizer = make_optimizer(cfg, 300, labels(tree, "lora"))

    def loss(tree):
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (tree, target)), strict=True))

    @jax.jit
    def many(tree):
        def step(carry, _):
            tree, state = carry
            updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
            return (optax.apply_updates(tree, updates), state), None

        return jax.lax.scan(step, (tree, optimizer.init(tree)), None, 300)[0][0]

    end = many(tree)
    frozen = float(loss({"adapter": target["adapter"], "base": tree["base"]}))
    assert loss(end) - frozen < 0.01 * (loss(tree) - frozen)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_weight_decay_shrinks_by_rate_times_decay(name):
    """With no gradient a step multiplies by 1 - learning_rate * weight_decay, whatever the rule."""
    zero = jax.tree.map(jnp.zeros_like, params())
    tree = run(section(name=name, schedule="linear", warmup_steps=0), [zero])
    for ours, before in zip(jax.tree.leaves(tree["adapter"]), jax.tree.leaves(params()["adapter"]), strict=True):
        np.testing.assert_allclose(ours, before * (1 - 0.02 * 0.1), rtol=1e-6)


# Schedules

THEIRS = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 17), (5, 17), (1, 2), (17, 17), (0, 1), (30, 17)])
def test_schedules_equal_transformers(name, warmup, steps):
    schedule = learning_rate(section(schedule=name, warmup_steps=warmup), steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    theirs = THEIRS[name](optimizer, warmup, steps)
    for step in range(steps):
        assert float(schedule(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-8, rel=1e-5), step
        optimizer.step()
        theirs.step()


# Clipping


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_clipping_equals_torch(scale):
    """By the global norm of what is trained; gradients below it stay as they are, frozen ones do not count."""
    gradient = jax.tree.map(lambda x: scale * x, params(1))
    gradient["base"] = jax.tree.map(lambda x: 1e6 * x, gradient["base"])
    cfg = section(name="sgd", learning_rate=1.0, weight_decay=0.0, b1=0.0, max_grad_norm=0.7)
    after = run(cfg, [gradient])
    make = partial(torch.optim.SGD, lr=1.0)
    expected = by_torch([gradient], "lora", make, 0.7)
    for ours, theirs in zip(jax.tree.leaves(after["adapter"]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-6)
    step = jax.tree.map(jnp.subtract, after["adapter"], params()["adapter"])
    norm = float(optax.tree.norm(gradient["adapter"]))
    assert float(optax.tree.norm(step)) == pytest.approx(min(norm, 0.7), rel=1e-4)
    free = run(cfg.model_copy(update={"max_grad_norm": None}), [gradient])
    step = jax.tree.map(jnp.subtract, free["adapter"], params()["adapter"])
    assert float(optax.tree.norm(step)) == pytest.approx(norm, rel=1e-4)


# Labels


@pytest.mark.parametrize(("method", "trained"), [("lora", "adapter"), ("full", "base")])
def test_partition_and_combine(method, trained):
    tree = params()
    label_tree = labels(tree, method)
    assert jax.tree.structure(label_tree) == jax.tree.structure(tree)
    for part in tree:
        assert set(jax.tree.leaves(label_tree[part])) == {"trained" if part == trained else "frozen"}
    ours, frozen = partition(tree, label_tree)
    (other,) = set(tree) - {trained}
    assert not jax.tree.leaves(ours[other]) and not jax.tree.leaves(frozen[trained])
    assert len(jax.tree.leaves(ours)) + len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(tree))
    back = combine(ours, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1), ("sgd", 1)])
def test_state_holds_trained_leaves_alone(name, moments, method):
    tree = params()
    optimizer = make_optimizer(section(name=name), STEPS, labels(tree, method))
    state = [leaf.shape for leaf in jax.tree.leaves(optimizer.init(tree)) if leaf.ndim]
    part = {"lora": "adapter", "full": "base"}[method]
    assert sorted(state) == sorted([leaf.shape for leaf in jax.tree.leaves(tree[part])] * moments)
    # Shapes alone are enough: this is how a step is planned for absent hardware.
    assert jax.tree.structure(jax.eval_shape(optimizer.init, tree)) == jax.tree.structure(optimizer.init(tree))
