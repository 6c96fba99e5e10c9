"""Figures as words. What a run's files hold may be absent, of another type, or beyond all measure."""

import math
from collections.abc import Callable
from typing import Any

Style = Callable[[float], str]


def drawable(value: object) -> float | None:
    """`value` as a float that can be drawn, or None (absent, not a number, not finite, absurdly large)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None  # past 1e100 axis arithmetic could overflow; such a value is as good as infinite
    return float(value) if abs(value) > 1e-100 else 0.0


def mapping(value: object) -> dict[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def shown(value: object, style: Style = "{:,.10g}".format) -> str:
    """A figure: styled when it is a number, as it stands otherwise, a dash when absent."""
    number = drawable(value)
    return style(number) if number is not None else "–" if value is None else str(value)


def compact(value: float) -> str:
    """1234567 -> 1.23M; whole below ten thousand."""
    for least, size, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.3g}{suffix}"
    return f"{value:,.4g}" if value % 1 else f"{value:,.0f}"


def loss(value: float) -> str:
    """Nats per token."""
    return f"{value:.4f}"


def perplexity(loss: float) -> str:
    """exp(loss), short."""
    return f"{math.exp(loss):,.4g}" if loss < 13 else f"{math.exp(min(loss, 700)):.2e}"


def memory(value: float) -> str:
    """Bytes in GiB, or in MiB below half of one."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    short = f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else short
