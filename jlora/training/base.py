"""The base of a run on the devices, how its products are made, and whether it bears those in 8 bits."""

import sys
from collections.abc import Callable
from dataclasses import replace

import jax

from jlora.config import Config
from jlora.data.dataset import Dataset
from jlora.errors import ConfigError
from jlora.hf.pretrained import Opened, Pretrained, load_pretrained
from jlora.runtime import distributed
from jlora.training.evaluator import Evaluator
from jlora.training.step import Forward, param_dtype, stack_sizes


def load(opened: Opened, cfg: Config, mesh: jax.sharding.Mesh) -> Pretrained:
    """The base as a config has it: its dtype or codes, its stacks of layers, and how its products are made.

    Raises:
      ConfigError, ModelError: see `load_pretrained`.
    """
    sizes, coded = stack_sizes(cfg, opened.model), cfg.model.compute is not None
    return load_pretrained(opened, param_dtype(cfg), mesh, cfg.model.quantization, sizes, coded)


def has_stacks(pretrained: Pretrained, cfg: Config) -> bool:
    """Whether the layers lie as a config has them; else its run would round otherwise than it does alone."""
    return tuple(stack.size for stack in pretrained.base.stacks) == stack_sizes(cfg, pretrained.base.cfg)


def warn_of_cpu(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Say what a CPU pays for and gains nothing by: it computes in float32, and has memory."""
    slow = [] if cfg.model.dtype == "float32" else [("model.dtype", "float32")]
    slow += [] if cfg.model.remat == "none" else [("model.remat", "none")]
    if slow and mesh.devices.flat[0].platform == "cpu":
        better = " and ".join(f"{key}={value}" for key, value in slow)
        print(f"note: this trains on a CPU, where {better} is faster, if the memory allows it", file=sys.stderr)


def in_dtype(cfg: Config) -> Config:
    """The config with products in `model.dtype`, and the base held in it."""
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"compute": None, "quantization": None})})


def held_out_loss(
    cfg: Config, rows: Dataset, forward: Forward, mesh: jax.sharding.Mesh, pretrained: Pretrained
) -> float:
    """The loss of a base alone, of what the run minimises."""
    size = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
    return Evaluator(rows, cfg.data, size, replace(forward, remat="none"), mesh).mean_loss(pretrained.base, {})[0]


def load_checked(
    opened: Opened, cfg: Config, mesh: jax.sharding.Mesh, loss_of: Callable[[Pretrained], float] | None, quiet: bool
) -> tuple[Config, Pretrained]:
    """The base of a run that is yet to begin, and the config that it is trained by: products in 8 bits, or not.

    The base is loaded twice, first as it would be trained over otherwise: that has to fit the devices, too.

    Args:
      loss_of: the held-out loss of a base; None without held-out rows.

    Raises:
      ConfigError: the loss is further off than `model.compute_max_loss_gap`, and `model.compute_fallback` is off.
    """
    model = cfg.model
    if model.compute is None or model.compute_max_loss_gap is None:
        return cfg, load(opened, cfg, mesh)
    if loss_of is None:
        if not quiet:
            print(
                f"note: without held-out rows model.compute={model.compute} is not checked against {model.dtype}; set "
                "data.eval, such as 0.1",
                file=sys.stderr,
            )
        return cfg, load(opened, cfg, mesh)
    exact = loss_of(load(opened, in_dtype(cfg), mesh))
    pretrained = load(opened, cfg, mesh)
    coded = loss_of(pretrained)
    # All processes have the same losses; one decides all the same, for all are to take the same way.
    gap = distributed.from_first("loss of 8-bit products", lambda: coded - exact)
    found = f"held-out loss of the base {coded:.4f} by {model.compute} products, {exact:.4f} in {model.dtype}"
    if gap <= model.compute_max_loss_gap:
        if not quiet:
            print(found, file=sys.stderr)
        return cfg, pretrained
    found += f", {gap:.4f} over where model.compute_max_loss_gap allows {model.compute_max_loss_gap:g}"
    if not model.compute_fallback:
        raise ConfigError(
            f"{found}; set model.compute=null, or model.compute_fallback=true to train in {model.dtype} then"
        )
    if not quiet:
        print(f"warning: {found}: this run trains in {model.dtype}", file=sys.stderr)
    del pretrained
    cfg = in_dtype(cfg)
    return cfg, load(opened, cfg, mesh)
