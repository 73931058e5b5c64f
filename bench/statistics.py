"""What samples say: spread, and how sure a ratio of medians is."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

CONFIDENCE = 0.95
FEWEST_SAMPLES = 5
"""Below this no resampling can give a 95 % interval: of four pairs, all lie on one side one time in eight."""

RESAMPLES = 9_999
NOISY_SPREAD = 0.10


def spread(samples: Sequence[float]) -> float:
    """Range of the samples as a share of their median."""
    return (max(samples) - min(samples)) / median(samples)


def ratio_interval(
    above: Sequence[float], below: Sequence[float], *, paired: bool, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Bootstrap interval of median(above) / median(below); None for fewer than ``FEWEST_SAMPLES`` of either.

    ``paired`` samples were taken next to one another, so that what slowed one slowed both: they are drawn together.
    Percentile bootstrap (scipy), its level raised for small samples as in Hesterberg, "What Teachers Should Know About
    the Bootstrap", 2015: quantiles at Phi(-sqrt(n / (n - 1)) t), t being Student's with n - 1 degrees of freedom.
    Seeded: the same samples give the same interval.
    """
    n = min(len(above), len(below))
    if n < FEWEST_SAMPLES:
        return None
    from scipy import stats  # slow to import, and most commands want no interval

    t = stats.t.ppf((1 + confidence) / 2, n - 1)
    level = 1 - 2 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * t)

    def ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(above, axis=axis) / np.median(below, axis=axis)

    samples = (np.asarray(above[:n] if paired else above), np.asarray(below[:n] if paired else below))
    interval = stats.bootstrap(
        samples,
        ratio,
        paired=paired,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
