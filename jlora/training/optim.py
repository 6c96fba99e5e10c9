"""Optimizer: what is trained and what is frozen, the schedule, clipping, and the update rule.

`split` parts adapter and base once, by structure: what is frozen is an argument of the step that is never
differentiated, so it has no gradient and no optimizer state. Knows nothing of losses.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jlora.config import Config, OptimizerSection
from jlora.errors import ConfigError
from jlora.model.adapter import Lora, Rows, Saved, layer_ranks, targets, with_scales, without_scales
from jlora.model.config import ModelConfig

Tree = Any

# What a leaf is to the optimizer: trained as A is, trained as B is (LoRA+), or kept as it started.
LIKE_A, LIKE_B, FIXED = "A", "B", "fixed"
SCHEDULES = ("cosine", "linear", "constant")


def split(params: dict[str, Tree], method: str) -> tuple[dict[str, Tree], dict[str, Tree]]:
    """Part {"adapter", "base"} (and "reference", of an objective on pairs) into (trained, frozen); see `join`."""
    if method == "full":
        return {"base": params["base"]}, {name: part for name, part in params.items() if name != "base"}
    adapter, scales = without_scales(params["adapter"])
    frozen = {name: part for name, part in params.items() if name != "adapter"}
    return {"adapter": adapter}, frozen | {"scales": scales}


def join(trained: dict[str, Tree], frozen: dict[str, Tree]) -> dict[str, Tree]:
    """The inverse of `split`."""
    params = frozen | trained
    scales = params.pop("scales", None)
    return params if scales is None else params | {"adapter": with_scales(params["adapter"], scales)}


def roles(trained: dict[str, Tree]) -> dict[str, Tree]:
    """What every leaf of what is trained is to the optimizer: `LIKE_A`, `LIKE_B` or `FIXED`.

    LoRA+ has B, magnitudes and biases in the faster group, as `peft.optimizers.create_loraplus_optimizer`.
    """
    return {
        part: {name: _adapter_roles(name, leaf) for name, leaf in tree.items()}
        if part == "adapter"
        else jax.tree.map(lambda _: LIKE_A, tree)
        for part, tree in trained.items()
    }


def _adapter_roles(name: str, part: Any) -> Any:
    if isinstance(part, Saved | Rows):
        return replace(part, weight=LIKE_B if name.endswith("_bias") else LIKE_A)  # type: ignore[arg-type]
    magnitude = None if part.magnitude is None else LIKE_B
    initial = None if part.initial is None else (FIXED, FIXED)
    return replace(part, lora_a=LIKE_A, lora_b=LIKE_B, magnitude=magnitude, initial=initial)


def hyperparameters(cfg: OptimizerSection, num_steps: int) -> dict[str, Float[Array, ""]]:
    """What the step takes as arguments, so that another value needs no other program; float32 scalars.

    Of the schedule, "schedule" is its place in `SCHEDULES`, "learning_rate" its peak, "least" the share of it at the
    end, "warmup_steps" and "decay_steps" its lengths.
    """
    warmup = cfg.warmup_steps if cfg.warmup_ratio is None else math.ceil(cfg.warmup_ratio * num_steps)
    values = {
        "schedule": SCHEDULES.index(cfg.schedule),
        "learning_rate": cfg.learning_rate,
        "least": cfg.min_learning_rate_ratio,
        "warmup_steps": warmup,
        "decay_steps": max(1, num_steps - warmup),
        "weight_decay": cfg.weight_decay,
    }
    return {name: jnp.float32(float(value)) for name, value in values.items()}


def learning_rate(hyper: dict[str, Float[Array, ""]], step: Array) -> Float[Array, ""]:
    """Linear warm-up from zero, then the decay to its least at the last step; step 0 takes the first value.

    As `get_cosine_with_min_lr_schedule_with_warmup` and its kin of transformers. Not optax's schedules, whose lengths
    are constants of the program.

    Args:
      hyper: as `hyperparameters` gives it. step: updates made before; int32.
    """
    warmup, count = hyper["warmup_steps"], step.astype(jnp.float32)
    left = 1.0 - jnp.clip((count - warmup) / hyper["decay_steps"], 0.0, 1.0)
    decays = jnp.stack([0.5 * (1.0 - jnp.cos(jnp.pi * left)), left, jnp.ones_like(left)])
    decay = hyper["least"] + (1.0 - hyper["least"]) * decays[hyper["schedule"].astype(jnp.int32)]
    return hyper["learning_rate"] * jnp.where(count < warmup, count / jnp.maximum(warmup, 1.0), decay)


def check_rule(cfg: Config, model: ModelConfig) -> None:
    """Refuse a rule that takes the size of a weight, for adapters whose weights are padded with zeros.

    Raises:
      ConfigError: naming the keys.
    """
    unlike = any(len({*layer_ranks(cfg.lora, name, model)} - {0}) > 1 for name in targets(cfg.lora, model))
    if cfg.method == "lora" and cfg.optimizer.name == "adafactor" and unlike:
        raise ConfigError(
            "optimizer.name=adafactor moves a weight by its size, which is not known of layers with ranks that differ "
            "(lora.rank_pattern): they are padded with zeros; give a projection one rank, or take adamw"
        )


def make_optimizer(
    cfg: OptimizerSection, trained: dict[str, Tree], hyper: dict[str, Any]
) -> optax.GradientTransformation:
    """Clipping, then the update rule, then LoRA+'s ratio, for the leaves of `trained` that are not fixed.

    With LoRA+ (arXiv:2402.12354) the updates of B, and of vectors, are multiplied by its ratio in the end: every rule
    is proportional to the learning rate, and all leaves are clipped together, which groups of their own would not be.

    Args:
      trained: as `split` gives it, arrays or shapes.
      hyper: as `hyperparameters` gives them; for `init` alone any numbers.
    """
    role_of, decay = roles(trained), hyper["weight_decay"]
    schedule = partial(learning_rate, hyper)
    match cfg.name:
        case "adamw":
            rule = optax.adamw(schedule, cfg.b1, cfg.b2, cfg.eps, weight_decay=decay)
        case "adafactor":
            # optax.adafactor does not scale its own weight decay by the learning rate; the others do.
            rule = optax.chain(
                _by_layer(optax.adafactor(learning_rate=None), trained, role_of),
                optax.add_decayed_weights(-decay),
                optax.scale_by_schedule(schedule),
            )
        case "lion":
            rule = optax.lion(schedule, cfg.b1, cfg.b2, weight_decay=decay)
        case "sgd":
            rule = optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=cfg.b1 or None))
    clip = [] if cfg.max_grad_norm is None else [optax.clip_by_global_norm(cfg.max_grad_norm)]
    faster = [] if cfg.loraplus_lr_ratio is None else [_scale_by_loraplus(cfg.loraplus_lr_ratio, role_of)]
    labels = jax.tree.map(lambda role: "fixed" if role == FIXED else "trained", role_of)
    both = {"trained": optax.chain(*clip, rule, *faster), "fixed": optax.set_to_zero()}
    whole = optax.multi_transform(both, labels)
    # optax raises floats to the count of its steps, an integer.
    return whole._replace(update=jax.numpy_dtype_promotion("standard")(whole.update))


def _by_layer(rule: optax.GradientTransformation, trained: Tree, role_of: dict[str, Tree]) -> Any:
    """A rule that takes the size of a leaf as a whole, for each layer of a stacked leaf by itself."""

    def over_layers(function: Any) -> Any:
        # optax asks a state for its moments by an init of no leaves.
        return lambda *trees: jax.vmap(function)(*trees) if jax.tree.leaves(trees) else function(*trees)

    stacked = optax.GradientTransformation(over_layers(rule.init), over_layers(rule.update))
    labels = jax.tree.map(
        lambda role, layers: optax.MaskedNode() if role == FIXED else "layers" if layers else "whole",
        role_of,
        {part: _stacked(part, tree) for part, tree in trained.items()},
    )
    return optax.multi_transform({"layers": stacked, "whole": rule}, labels)


def _stacked(part: str, tree: Tree) -> Tree:
    """Which leaves have a leading dim of layers: of an adapter all but the embedding and the head, else the blocks'."""
    if part == "adapter":
        layers = {name: isinstance(leaf, Lora) or name.endswith("_bias") for name, leaf in tree.items()}
        return {name: jax.tree.map(lambda _, own=layers[name]: own, leaf) for name, leaf in tree.items()}
    whole = jax.tree.map(lambda _: False, tree)
    whole.layers = jax.tree.map(lambda _: True, tree.layers)
    return whole


def _scale_by_loraplus(ratio: float, role_of: dict[str, Tree]) -> optax.GradientTransformation:
    mine = jax.tree.map(lambda role: optax.MaskedNode() if role == FIXED else role, role_of)

    def scale(updates: Tree, _: Any) -> Tree:
        return jax.tree.map(lambda update, role: update * ratio if role == LIKE_B else update, updates, mine)

    return optax.stateless(scale)


def moments_like(optimizer: optax.GradientTransformation, state: Tree, trained: Tree, placed: Tree, rest: Any) -> Tree:
    """A tree like the optimizer's state: of a moment what `placed` has for its parameter, else `rest`.

    A moment that has another shape than its parameter, as Adafactor's factored ones, has `rest` too.
    """

    def place(moment: Any, parameter: Any, where: Any) -> Any:
        if isinstance(moment, optax.MaskedNode):
            return moment
        return where if moment.shape == parameter.shape else rest

    # By shapes: a plan's mesh has no devices to make anything on.
    return optax.tree_utils.tree_map_params(
        lambda params: jax.eval_shape(optimizer.init, params),
        place,
        state,
        trained,
        placed,
        transform_non_params=lambda _: rest,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
