"""Optimizers, schedules and clipping against PyTorch and transformers; labels and what they keep away."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from jlora.config import OptimizerSection
from jlora.model.adapter import Lora, Saved
from jlora.training.checkpoint import flatten
from jlora.training.optim import hyperparameters, join, learning_rate, make_optimizer, roles, split

STEPS = 10


def params(seed: int = 0) -> dict[str, Any]:
    """An adapter of two projections and a base, no two leaves of one shape."""
    draw = np.random.default_rng(seed)
    new = partial(draw.normal, 0.0, 0.5)
    adapter = {
        "q_proj": Lora(new(size=(2, 5, 3)), new(size=(2, 3, 7)), None, 0.0),
        "up_proj": Lora(new(size=(2, 5, 4)), new(size=(2, 4, 6)), None, 0.0),
    }
    base = {"embed": new(size=(11, 5)), "layers": {"q_proj": new(size=(2, 5, 7))}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"adapter": adapter, "base": base})


def section(**options: Any) -> OptimizerSection:
    """Constant rate, no clipping; no other value is a default."""
    fixed = {"learning_rate": 0.02, "weight_decay": 0.1, "b1": 0.85, "b2": 0.97, "eps": 1e-5}
    return OptimizerSection(**(fixed | {"schedule": "constant", "max_grad_norm": None} | options))


def run(cfg: OptimizerSection, gradients: list[Any], method: str = "lora") -> dict[str, Any]:
    """The parameters after one step a gradient."""
    trained, frozen = split(params(), method)
    optimizer = make_optimizer(cfg, trained, hyperparameters(cfg, len(gradients)))
    state = optimizer.init(trained)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(split(gradient, method)[0], state, trained)
        trained = optax.apply_updates(trained, updates)
    return join(trained, frozen)


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
    chex.assert_trees_all_close(jax.tree.leaves(tree[parts[0]]), expected, rtol=0, atol=tolerance)
    before = params()
    chex.assert_trees_all_equal(tree[parts[1]], before[parts[1]])
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
    tree, _ = split(params(), "lora")
    target, _ = split(target, "lora")
    cfg = section(name=name, weight_decay=0.0, learning_rate=0.05, schedule="linear")
    optimizer = make_optimizer(cfg, tree, hyperparameters(cfg, 300))

    def loss(tree):
        return sum(jnp.sum(jnp.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (tree, target)), strict=True))

    @jax.jit
    def many(tree):
        def step(carry, _):
            tree, state = carry
            updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
            return (optax.apply_updates(tree, updates), state), None

        return jax.lax.scan(step, (tree, optimizer.init(tree)), None, 300)[0][0]

    assert loss(many(tree)) < 0.01 * loss(tree)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_weight_decay_shrinks_by_rate_times_decay(name):
    """With no gradient a step multiplies by 1 - learning_rate * weight_decay, whatever the rule."""
    zero = jax.tree.map(jnp.zeros_like, params())
    tree = run(section(name=name, schedule="linear", warmup_steps=0), [zero])
    shrunk = jax.tree.map(lambda x: x * (1 - 0.02 * 0.1), params()["adapter"])
    chex.assert_trees_all_close(tree["adapter"], shrunk, rtol=1e-6)


# Schedules

THEIRS = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 17), (5, 17), (1, 2), (17, 17), (0, 1), (30, 17)])
def test_schedules_equal_transformers(name, warmup, steps):
    cfg = section(schedule=name, warmup_steps=warmup)
    schedule = partial(learning_rate, hyperparameters(cfg, steps))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    theirs = THEIRS[name](optimizer, warmup, steps)
    for step in range(steps):
        assert float(schedule(jnp.int32(step))) == pytest.approx(theirs.get_last_lr()[0], abs=1e-8, rel=1e-5), step
        optimizer.step()
        theirs.step()


ENDS = {
    "cosine": lambda optimizer, warmup, steps, least: get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, warmup, steps, min_lr_rate=least
    ),
    "linear": lambda optimizer, warmup, steps, least: get_polynomial_decay_schedule_with_warmup(
        optimizer, warmup, steps, lr_end=0.02 * least, power=1.0
    ),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize(("warmup", "ratio"), [(0, None), (5, None), (0, 0.25), (0, 0.01)])
def test_schedules_that_end_above_zero_equal_transformers(name, warmup, ratio):
    steps, least = 17, 0.15
    cfg = section(schedule=name, warmup_steps=warmup, warmup_ratio=ratio, min_learning_rate_ratio=least)
    schedule = partial(learning_rate, hyperparameters(cfg, steps))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    theirs = ENDS[name](optimizer, math.ceil(steps * ratio) if ratio else warmup, steps, least)
    for step in range(steps):
        assert float(schedule(jnp.int32(step))) == pytest.approx(theirs.get_last_lr()[0], abs=1e-8, rel=1e-5), step
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
    chex.assert_trees_all_close(jax.tree.leaves(after["adapter"]), expected, rtol=1e-5, atol=3e-6)
    step = jax.tree.map(jnp.subtract, after["adapter"], params()["adapter"])
    norm = float(optax.tree.norm(gradient["adapter"]))
    assert float(optax.tree.norm(step)) == pytest.approx(min(norm, 0.7), rel=1e-4)
    free = run(cfg.model_copy(update={"max_grad_norm": None}), [gradient])
    step = jax.tree.map(jnp.subtract, free["adapter"], params()["adapter"])
    assert float(optax.tree.norm(step)) == pytest.approx(norm, rel=1e-4)


# What is trained


@pytest.mark.parametrize(("method", "part"), [("lora", "adapter"), ("full", "base")])
def test_split_and_join(method, part):
    tree = params()
    tree["adapter"]["q_proj"] = replace(tree["adapter"]["q_proj"], scale=jnp.ones(2))
    trained, frozen = split(tree, method)
    assert list(trained) == [part] and len(jax.tree.leaves([trained, frozen])) == len(jax.tree.leaves(tree))
    if method == "lora":  # its scale is no weight
        assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(tree["adapter"])) - 1
    chex.assert_trees_all_equal(join(trained, frozen), tree)


def test_roles():
    lora = Lora(jnp.ones(1), jnp.ones(1), None, 0.0, magnitude=jnp.ones(1), initial=(jnp.ones(1), jnp.ones(1)))
    found = roles({"adapter": {"q_proj": lora, "q_proj_bias": Saved(jnp.ones(1)), "lm_head": Saved(jnp.ones(1))}})
    q_proj = found["adapter"]["q_proj"]
    assert (q_proj.lora_a, q_proj.lora_b, q_proj.magnitude, q_proj.initial) == ("A", "B", "B", ("fixed", "fixed"))
    assert found["adapter"]["q_proj_bias"].weight == "B" and found["adapter"]["lm_head"].weight == "A"


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
@pytest.mark.parametrize("ratio", [None, 16.0])
def test_what_is_fixed_stays(name, ratio):
    """Factors that an adapter started from are kept with what is trained, and no rule moves them."""
    start = jnp.full((2, 3, 4), 0.5)
    tree = {"adapter": {"q_proj": Lora(start, start, None, 0.0, initial=(start, start))}}
    cfg = section(name=name, loraplus_lr_ratio=ratio)
    optimizer = make_optimizer(cfg, tree, hyperparameters(cfg, 1))
    state = optimizer.init(tree)
    # A checkpoint knows no role by its name: those of earlier versions, which had another for this one, resume.
    assert {name.split("/")[1] for name in flatten(state)} == {"trained"}
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), state, tree)
    moved = updates["adapter"]["q_proj"]
    assert moved.lora_a.all() and moved.lora_b.all() and not any(x.any() for x in moved.initial)
    if ratio is not None:
        np.testing.assert_allclose(moved.lora_b, moved.lora_a * ratio, rtol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("lion", 1), ("sgd", 1)])
def test_state_holds_trained_leaves_alone(name, moments, method):
    cfg = section(name=name)
    trained, _ = split(params(), method)
    optimizer = make_optimizer(cfg, trained, hyperparameters(cfg, STEPS))
    state = [leaf.shape for leaf in jax.tree.leaves(optimizer.init(trained)) if leaf.ndim]
    assert sorted(state) == sorted([leaf.shape for leaf in jax.tree.leaves(trained)] * moments)
    # Shapes alone are enough: this is how a step is planned for absent hardware.
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(optimizer.init, trained), optimizer.init(trained))


def test_another_rate_needs_no_other_program():
    """Rates and decay are arguments: what is lowered is the same for runs that differ in them."""
    trained, _ = split(params(), "lora")

    def lowered(cfg):
        def update(gradients, state, hyper):
            return make_optimizer(cfg, trained, hyper).update(gradients, state, trained)

        hyper = hyperparameters(cfg, 9)
        return jax.jit(update).lower(trained, make_optimizer(cfg, trained, hyper).init(trained), hyper).as_text()

    other = {"learning_rate": 0.5, "schedule": "cosine", "warmup_steps": 3, "weight_decay": 0.0}
    assert lowered(section(name="adamw")) == lowered(section(name="adamw", **other))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_optimizer_rule_and_schedule_are_those_of_torch(name, schedule):
    from transformers import get_scheduler

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
    optimizer = make_optimizer(section, params, hyperparameters(section, 9))
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
