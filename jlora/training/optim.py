"""Optimizer: schedule, clipping, update rule, and which parameters are trained at all.

The labels cover the whole tree of adapter and base; what is labelled frozen has no optimizer state and
its gradient is never asked for.
"""

from typing import Any

import jax
import optax
from jax.tree_util import keystr, tree_map_with_path

from jlora.config import OptimizerSection

Tree = Any


def labels(params: dict[str, Tree], method: str) -> dict[str, Tree]:
    """`trained`, `held` or `frozen` for every leaf of {"adapter": ..., "base": ...}.

    What is held never changes, as what is frozen, but is kept with what is trained: it is the run's own.
    """
    trained = {"lora": "adapter", "full": "base"}[method]

    def label(path: Any, _: Any) -> str:
        return "frozen" if path[0].key != trained else "held" if is_held(path) else "trained"

    return tree_map_with_path(label, params)


def is_held(path: Any) -> bool:
    """Whether a leaf belongs to the factors that an adapter started from (`jlora.adapter.Lora.initial`)."""
    return ".initial" in keystr(path)


def partition(params: Tree, label_tree: Tree) -> tuple[Tree, Tree]:
    """Split into (trained and held, frozen); each has None for the leaves of the other."""
    trained = jax.tree.map(lambda x, label: None if label == "frozen" else x, params, label_tree)
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
    return update_rule(cfg, learning_rate(cfg, num_steps), label_tree)


def update_rule(cfg: OptimizerSection, schedule: optax.Schedule, label_tree: Tree) -> optax.GradientTransformation:
    """As `make_optimizer`, with any schedule; the weight decay may be a traced scalar.

    With LoRA+ (arXiv:2402.12354) the updates of B, and of vectors, are then multiplied by its ratio: every rule is
    proportional to the learning rate, and all leaves are clipped together, which groups of their own would not be.
    """
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
    faster = [] if cfg.loraplus_lr_ratio is None else [scale_by_loraplus(cfg.loraplus_lr_ratio)]
    rules = {"trained": optax.chain(*clip, rule, *faster), "held": optax.set_to_zero(), "frozen": optax.set_to_zero()}
    return optax.multi_transform(rules, label_tree)


def scale_by_loraplus(ratio: float) -> optax.GradientTransformation:
    """Multiplies what `peft.optimizers.create_loraplus_optimizer` has in groups B: lora_b, magnitudes and biases."""

    def scale(path: Any, update: Any) -> Any:
        name = keystr(path)
        return update * ratio if name.endswith((".lora_b", ".magnitude", "_bias'].weight")) else update

    return optax.stateless(lambda updates, _: tree_map_with_path(scale, updates))
