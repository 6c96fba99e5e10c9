"""How far a score over few answers can be trusted: 95 % confidence intervals. Knows nothing of pages."""

import math
from statistics import NormalDist

import numpy as np

Interval = list[float]  # its ends, as JSON has them

# Resamples of a bootstrap, and the fewest answers that one says anything of.
RESAMPLES, FEWEST = 1000, 5
_Z = NormalDist().inv_cdf(0.975)


def share(hits: int, count: int) -> Interval:
    """Wilson's score interval of a share of `count` answers; it holds for any number of them.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    middle, spread = hits + _Z**2 / 2, _Z * math.sqrt(hits * (count - hits) / count + _Z**2 / 4)
    return [max(0.0, (middle - spread) / (count + _Z**2)), min(1.0, (middle + spread) / (count + _Z**2))]


def mean(values: list[float]) -> Interval | None:
    """Percentile bootstrap of a mean, always with the same resamples; None of fewer than `FEWEST` values."""
    if len(values) < FEWEST:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.quantile(np.asarray(values)[drawn].mean(axis=1), (0.025, 0.975)).tolist()
