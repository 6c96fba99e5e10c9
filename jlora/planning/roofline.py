"""A step's time, estimated from published peaks. The whole model of speed stands here.

    seconds = FLOPs / (devices x peak)  +  bytes of memory / bandwidth  +  bytes sent / link bandwidth

No term hides behind another, and each runs at its published peak: real steps overlap some of it and reach less of
each peak, so the figure ranks layouts of one run and is no promise of speed. Bytes of memory are the weights that
a device multiplies with, once for each pass of each micro-batch, and its temporaries, written and read once.
Quantised weights are read as they are held, written out dequantised and read again: they save memory, not time.
"""

from jlora.planning.topology import Target


def passes(remat: str) -> int:
    """How often a micro-batch goes through the weights: forward, backward, and again where layers are recomputed."""
    return 2 if remat in ("none", "dots") else 3


def estimate(
    target: Target,
    *,
    flops: float,
    tokens: int,
    weight_bytes: float,
    dequantized_bytes: float,
    temp_bytes: float,
    sent_bytes: float,
    micro_batches: int,
    remat: str,
) -> dict[str, float] | None:
    """Seconds of a step by where they go, and tokens a second a device; None where no peak is published.

    Args:
      flops, tokens: of a step over all devices.
      weight_bytes: the base weights that one device multiplies with, gathered, as they are held.
      dequantized_bytes: those of them that are quantised, in the dtype of the matmuls.
      temp_bytes, sent_bytes: of one device, held at once; sent in a step.
    """
    if target.peak_flops is None or target.bandwidth is None or target.link_bandwidth is None:
        return None
    compute = flops / (len(target.devices) * target.peak_flops)
    weights = passes(remat) * (weight_bytes + 2 * dequantized_bytes)
    memory = micro_batches * (weights + 2 * temp_bytes) / target.bandwidth
    links = sent_bytes / target.link_bandwidth
    total = compute + memory + links
    return {
        "seconds_per_step": total,
        "compute_seconds": compute,
        "memory_seconds": memory,
        "link_seconds": links,
        "tokens_per_second_per_device": tokens / total / len(target.devices),
    }
