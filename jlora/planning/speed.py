"""How long a compiled step takes: each operation as long as the slowest thing it does, at rates that devices reach.

    seconds = max(FLOPs / rate, bytes of memory / rate, bytes sent / rate, cycles / clock) + launch

Operations follow each other as the compiler scheduled them; a collective or copy that begins early runs beside what
stands before its end. On TPUs the cycles are the compiler's own.

What a card reaches of large products is measured by others (`jlora.planning.hardware`). The share of it that a step's
products reach is fitted to steps measured on one H200 (`scripts/plan_speed` fits it anew). They cannot tell the other
rates from it, so these are held at plausible values.
"""

from collections import defaultdict
from dataclasses import dataclass

from jlora.planning.program import Operation
from jlora.planning.topology import Target

# Fitted on 2026-11-30 to the eight steps of docs/planner.md.
PRODUCTS = 0.775
# Held, of the rate of large products: attention at 400 TFLOP/s forward and 320 backward on an H100. cuDNN is published
# at 518 forward (causal) and 499 backward (all keys seen) for 4096 tokens and a head dim of 128 (FlashAttention-3,
# arXiv:2407.08608, figures 5 and 6), both without the bias that a packing mask is.
FORWARD, BACKWARD = 400 / 794.5, 320 / 794.5
# Assumed: 8-bit products beside those of bfloat16. Data sheets say 2; none of ours was measured.
CODED = 1.7
# Held: of published bandwidths, and seconds between two kernels of a stream.
MEMORY, LINKS, LAUNCH = 0.85, 0.8, 1.5e-6
# Held: of the peak, where nobody measured large products.
UNMEASURED = 0.8
# How far off the estimate may be: on the card that it is fitted to, on other GPUs and on TPUs (docs/planner.md).
FITTED, SPREAD, SPREAD_ELSEWHERE, SPREAD_TPU = "gpu:h200-141gb:1", 0.1, 0.3, 0.6


@dataclass(frozen=True)
class Rates:
    """What a device reaches in a step.

    Attributes:
      products, coded_product, attention, attention_backward: FLOPs a second.
      memory, links, host: bytes a second through its memory, to other devices, to the host's memory.
      clock: cycles a second, of TPUs. launch: seconds that an operation takes beside its work.
    """

    products: float
    coded_product: float
    attention: float
    attention_backward: float
    memory: float
    links: float
    host: float | None
    clock: float | None
    launch: float


def rates_of(target: Target) -> Rates | None:
    """What a device of a target reaches; None where no peak is published."""
    if target.peak_flops is None or target.bandwidth is None or target.link_bandwidth is None:
        return None
    large = target.product_flops or UNMEASURED * target.peak_flops
    return Rates(
        PRODUCTS * large,
        CODED * PRODUCTS * large,
        FORWARD * large,
        BACKWARD * large,
        MEMORY * target.bandwidth,
        LINKS * target.link_bandwidth,
        LINKS * target.host_bandwidth if target.host_bandwidth else None,
        target.clock,
        LAUNCH if target.platform == "gpu" else 0.0,
    )


def seconds(operations: list[Operation], rates: Rates) -> dict[str, float]:
    """Seconds of a run by what they are spent on: compute, memory, link; these three add up."""
    spent = dict.fromkeys(("compute", "memory", "link"), 0.0)
    now, free, ends = 0.0, defaultdict[str, float](float), dict[str, tuple[float, str]]()
    for operation in operations:
        if operation.waits is not None:
            late, what = ends.get(operation.waits, (now, "link"))
            spent[what] += max(0.0, late - now)
            now = max(now, late)
            ends[operation.name] = now, what
            continue
        takes = _takes(operation, rates)
        slowest = max(takes, key=lambda name: takes[name])
        long = operation.times * (takes[slowest] + rates.launch)
        if operation.starts:
            free[slowest] = max(now, free[slowest]) + long
            ends[operation.name] = free[slowest], slowest
        else:
            now, spent[slowest] = now + long, spent[slowest] + long
    return spent


def _takes(operation: Operation, rates: Rates) -> dict[str, float]:
    rate = getattr(rates, operation.kind, rates.products)
    compute, memory = operation.flops / rate, operation.moved / rates.memory
    if operation.cycles is not None and rates.clock is not None:
        compute, memory = operation.cycles / rates.clock, 0.0
    if operation.kind == "host":
        return {"compute": 0.0, "memory": 0.0, "link": operation.moved / rates.host if rates.host else 0.0}
    if operation.kind == "collective":
        memory = 0.0
    return {"compute": compute, "memory": memory, "link": operation.sent / rates.links}


def estimate(operations: list[Operation], target: Target, tokens: int) -> dict[str, float] | None:
    """Seconds of a step, between which it should lie and where they go; None where no peak is published.

    Args:
      operations: of a step's program. tokens: of a step over all devices.
    """
    rates = rates_of(target)
    if rates is None:
        return None
    spent = seconds(operations, rates)
    mid = sum(spent.values())
    spread = SPREAD_TPU if target.platform == "tpu" else SPREAD if target.spec == FITTED else SPREAD_ELSEWHERE
    return {
        "seconds_per_step": mid,
        "low": mid / (1 + spread),
        "mid": mid,
        "high": mid * (1 + spread),
        **{f"{name}_seconds": value for name, value in spent.items()},
        "tokens_per_second_per_device": tokens / mid / len(target.devices),
    }
