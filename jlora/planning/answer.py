"""What `jlora plan` answers for one target: a plan or a search, with time and cost."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jlora.config import Config
from jlora.data import encoding
from jlora.data.checks import count_batches
from jlora.data.dataset import hold_out
from jlora.hf.planned import to_plan
from jlora.hf.pretrained import tokenizer_of
from jlora.hf.shapes import SHAPES
from jlora.planning.compiled import Plan, plan
from jlora.planning.search import find_remedy, search, sentence
from jlora.planning.topology import Target, compiler_logs_off


def count_data(cfg: Config) -> dict[str, int] | None:
    """`count_batches` of the user's own rows but for those held out; None without rows or tokenizer."""
    if cfg.model.path in SHAPES and cfg.model.tokenizer is None:
        return None
    if not all(Path(source.path).exists() for source in cfg.data.sources):
        return None
    tokenizer, _ = tokenizer_of(
        cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template, cfg.model.resize_embeddings
    )
    rows = encoding.read_train(cfg.data, tokenizer)
    if isinstance(cfg.data.eval, float):
        rows, _ = hold_out(rows, cfg.data.eval, cfg.training.seed)
    return count_batches(rows, cfg)


def time_and_cost(plan: Plan, cfg: Config, target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and dollars of an epoch: as estimated, and at named utilisations of the peak or at a given speed.

    Args:
      args: of the command line: `tokens` of an epoch, in place of the config's rows; `tokens_per_second` of one device
        or `utilization`; and `price`, dollars a device-hour.
    """
    counts = None if args.tokens else count_data(cfg)
    steps: dict[str, float] = {name: counts[name] for name in ("packed", "padded")} if counts else {}
    if args.tokens is not None:
        steps = {"given": args.tokens / plan.tokens_per_step}
    seconds: dict[str, dict[str, float]] = {}
    for name, number in steps.items():
        tokens, flops = number * plan.tokens_per_step, number * plan.flops_per_step
        if (rate := args.tokens_per_second) is not None:
            seconds[name] = {f"{rate:g} tokens/s/device": tokens / (rate * plan.devices)}
        elif (peak := target.peak_flops) is not None:
            seconds[name] = {f"{share:g}": flops / (plan.devices * peak * share) for share in args.utilization}
    estimated: dict[str, dict[str, float]] = {}
    if plan.estimate is not None:
        step = {at: plan.estimate[at] for at in ("low", "mid", "high")}
        estimated = {name: {at: number * value for at, value in step.items()} for name, number in steps.items()}
    return {
        "data": counts,
        "epoch_tokens": {name: number * plan.tokens_per_step for name, number in steps.items()},
        "seconds_per_epoch": estimated,
        "seconds_per_epoch_at": seconds,
        "cost_usd": _cost(estimated, plan, args.price),
        "cost_usd_at": _cost(seconds, plan, args.price),
    }


def _cost(seconds: dict[str, dict[str, float]], plan: Plan, price: float | None) -> dict[str, dict[str, float]] | None:
    """Dollars of what takes these seconds; None without a price of a device-hour."""
    if price is None:
        return None
    hourly = plan.devices * price
    return {name: {at: value / 3600 * hourly for at, value in table.items()} for name, table in seconds.items()}


def planned(cfg: Config, target: Target, args: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """The JSON of the config as it is, with time and cost; and why it does not fit, with a remedy."""
    cfg = to_plan(cfg)
    with compiler_logs_off():
        found = plan(cfg, target)
        remedy = None if found.fits else find_remedy(cfg, target, found)
    tree = found.as_json() | time_and_cost(found, cfg, target, args)
    return tree | {"remedy": remedy and asdict(remedy)}, None if found.fits else sentence(found, remedy)


def searched(cfg: Config, target: Target, args: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """The JSON of a search, its best with time and cost; and why nothing fits."""
    cfg = to_plan(cfg)
    with compiler_logs_off():
        found = search(cfg, target, args.compilations)
    tree, best = found.as_json(), found.best
    tree["best"] |= time_and_cost(best, cfg, target, args)
    if found.fits:
        return tree, None
    over = (best.peak_bytes - best.capacity_bytes) / 2**30
    return tree, (
        f"{best.topology}: nothing fits; the smallest of the layouts compiled ({' '.join(found.overrides)}) needs "
        f"{best.peak_bytes / 2**30:.2f} GiB a device, {over:.2f} too much; take more devices or a shorter "
        "data.max_length"
    )
