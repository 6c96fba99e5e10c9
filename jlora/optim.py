"""Optimizer: schedule, clipping, update rule, and which parameters are trained at all.

The labels cover the whole tree of adapter and base; what is labelled frozen has no optimizer state and
its gradient is never asked for.
"""

from typing import Any

import jax
import optax

from jlora.config import OptimizerSection

Tree = Any


def labels(params: dict[str, Tree], method: str) -> dict[str, Tree]:
    """`trained` or `frozen` for every leaf of {"adapter": ..., "base": ...}."""
    trained = {"lora": "adapter", "full": "base"}[method]
    return {
        part: jax.tree.map(lambda _, part=part: "trained" if part == trained else "frozen", tree)
        for part, tree in params.items()
    }


def partition(params: Tree, label_tree: Tree) -> tuple[Tree, Tree]:
    """Split into (trained, frozen); each has None for the leaves of the other."""
    trained = jax.tree.map(lambda x, label: x if label == "trained" else None, params, label_tree)
    frozen = jax.tree.map(lambda x, label: x if label == "frozen" else None, params, label_tree)
    return trained, frozen


def combine(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def learning_rate(cfg: OptimizerSection, num_steps: int) -> optax.Schedule:
    """Linear warm-up from zero, then the decay to zero at `num_steps`.

    Step 0 takes the first value; as `get_cosine_schedule_with_warmup` and its kin of transformers.
    """
    decay_steps = max(1, num_steps - cfg.warmup_steps)
    decays = {
        "cosine": optax.cosine_decay_schedule(cfg.learning_rate, decay_steps),
        "linear": optax.linear_schedule(cfg.learning_rate, 0.0, decay_steps),
        "constant": optax.constant_schedule(cfg.learning_rate),
    }
    if not cfg.warmup_steps:
        return decays[cfg.schedule]
    warmup = optax.linear_schedule(0.0, cfg.learning_rate, cfg.warmup_steps)
    return optax.join_schedules([warmup, decays[cfg.schedule]], [cfg.warmup_steps])


def make_optimizer(cfg: OptimizerSection, num_steps: int, label_tree: Tree) -> optax.GradientTransformation:
    """Clipping, then the update rule, for the leaves labelled trained; nothing for the others."""
    schedule = learning_rate(cfg, num_steps)
    match cfg.name:
        case "adamw":
            rule = optax.adamw(schedule, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay)
        case "adafactor":
            # optax.adafactor does not scale its own weight decay by the learning rate; the others do.
            rule = optax.chain(
                optax.adafactor(learning_rate=None),
                optax.add_decayed_weights(-cfg.weight_decay),
                optax.scale_by_schedule(schedule),
            )
        case "lion":
            rule = optax.lion(schedule, cfg.b1, cfg.b2, weight_decay=cfg.weight_decay)
        case "sgd":
            rule = optax.chain(
                optax.add_decayed_weights(cfg.weight_decay), optax.sgd(schedule, momentum=cfg.b1 or None)
            )
    clip = [] if cfg.max_grad_norm is None else [optax.clip_by_global_norm(cfg.max_grad_norm)]
    return optax.multi_transform({"trained": optax.chain(*clip, rule), "frozen": optax.set_to_zero()}, label_tree)
