"""Statistics of samples: their spread, and the confidence interval of a ratio of medians."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

CONFIDENCE = 0.95
FEWEST_SAMPLES = 5
"""The bootstrap of fewer samples has too few different medians for an interval of 95 %."""

FEWEST_PAIRS = 6
"""Five pairs of equal rows all lie on one side with probability 1/16; six pairs with 1/32."""

RESAMPLES = 9_999
NOISY_SPREAD = 0.10


def spread(samples: Sequence[float]) -> float:
    """Range of the samples as a share of their median."""
    return (max(samples) - min(samples)) / median(samples)


def ratio_interval(above: Sequence[float], below: Sequence[float], *, paired: bool) -> tuple[float, float] | None:
    """95 % interval of median(above) / median(below); None below ``FEWEST_SAMPLES``, or ``FEWEST_PAIRS``, of either.

    Percentile bootstrap (scipy), its level raised for small samples as in Hesterberg, "What Teachers Should Know About
    the Bootstrap", 2015: quantiles at Phi(-sqrt(n / (n - 1)) t), t being Student's with n - 1 degrees of freedom.
    Seeded: the same samples give the same interval.

    ``paired`` samples were taken one after the other, in an order that was shuffled for each pair. They are resampled
    together, so that a slowdown of both does not widen the interval. The interval then also includes that of the sign
    test for the median of the pairs' ratios (Conover, "Practical Nonparametric Statistics", section 3.2; scipy): the
    bootstrap of a few samples from a busy machine can be too narrow. For two equal rows, shuffling makes either one
    equally likely to be the slower of a pair, however the load changes. Neither method sees a difference that lasts as
    long as a process, such as its memory addresses.
    """
    n = min(len(above), len(below))
    if n < (FEWEST_PAIRS if paired else FEWEST_SAMPLES):
        return None
    from scipy import stats  # slow to import, and most commands need no interval

    samples = tuple(np.asarray(side[:n] if paired else side, float) for side in (above, below))
    t = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    drawn = stats.bootstrap(
        samples,
        _ratio_of_medians,
        paired=paired,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=1 - 2 * stats.norm.cdf(-np.sqrt(n / (n - 1)) * t),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = [drawn]
    if paired:
        found.append(stats.quantile_test(samples[0] / samples[1], p=0.5).confidence_interval(CONFIDENCE))
    return float(min(interval.low for interval in found)), float(max(interval.high for interval in found))


def _ratio_of_medians(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.median(above, axis=axis) / np.median(below, axis=axis)
