"""Time and money: tokens of the user's own rows, and the hours and dollars of an epoch."""

from pathlib import Path
from typing import Any

from jlora.config import Config
from jlora.data import encoding
from jlora.data.checks import count_batches
from jlora.hf.pretrained import SHAPES, open_pretrained
from jlora.planning.topology import Target


def count_data(cfg: Config) -> dict[str, int] | None:
    """`count_batches` of the user's own rows; None without rows or tokenizer."""
    if cfg.model.path in SHAPES and cfg.model.tokenizer is None:
        return None
    if not all(Path(source.path).exists() for source in cfg.data.sources):
        return None
    opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
    return count_batches(encoding.read_train(cfg.data, opened.tokenizer), cfg)


def add_time(
    result: dict[str, Any],
    target: Target,
    counts: dict[str, int] | None,
    *,
    tokens: float | None,
    tokens_per_second: float | None,
    utilization: list[float],
    price: float | None,
) -> None:
    """Seconds and dollars of an epoch, at named utilisations of the published peak or at a given speed.

    Args:
      tokens: of an epoch, in place of `counts`. tokens_per_second: of one device. price: dollars a device-hour.
    """
    devices, per_step = result["devices"], result["tokens_per_step"]
    steps: dict[str, float] = {name: counts[name] for name in ("packed", "padded")} if counts else {}
    if tokens is not None:
        steps = {"given": tokens / per_step}
    result["data"] = counts
    result["epoch_tokens"] = {name: number * per_step for name, number in steps.items()}
    seconds: dict[str, dict[str, float]] = {}
    for name, number in steps.items():
        if tokens_per_second is not None:
            rate = tokens_per_second
            seconds[name] = {f"{rate:g} tokens/s/device": number * per_step / (rate * devices)}
        elif target.peak_flops is not None:
            flops = result["flops_per_step"] * number
            seconds[name] = {f"{u:g}": flops / (devices * target.peak_flops * u) for u in utilization}
    result["seconds_per_epoch_at"] = seconds
    result["cost_usd_at"] = None
    if price is not None:
        result["cost_usd_at"] = {
            name: {at: value / 3600 * devices * price for at, value in table.items()} for name, table in seconds.items()
        }
