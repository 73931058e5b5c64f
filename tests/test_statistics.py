"""Intervals that hold what they say, and no interval where there is too little to say it."""

import numpy as np
import pytest

from bench.statistics import FEWEST_SAMPLES, ratio_interval, spread


def test_spread_is_the_range_over_the_median():
    assert spread([1.0, 2.0, 1.5]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_holds_the_ratio_as_often_as_it_says(paired):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        above, below = rng.lognormal(np.log(2), 0.2, 7), rng.lognormal(0, 0.2, 7)
        low, high = ratio_interval(above, below, paired=paired)
        held += low <= 2 <= high
    assert held >= 54


def test_what_slows_both_widens_no_paired_interval():
    common = np.linspace(1, 3, 10)
    low, high = ratio_interval(2 * common, common, paired=True)
    assert (low, high) == pytest.approx((2, 2))
    low, high = ratio_interval(2 * common, common, paired=False)
    assert low < 1.7
    assert high > 2.3


def test_too_few_samples_have_no_interval():
    few = [1.0] * (FEWEST_SAMPLES - 1)
    assert ratio_interval(few, [1.0] * 9, paired=False) is None
    assert ratio_interval([1.0] * 9, few, paired=True) is None


def test_the_same_samples_give_the_same_interval():
    samples = ([1.0, 1.2, 0.9, 1.1, 1.3], [2.0, 2.1, 2.4, 1.9, 2.2])
    assert ratio_interval(*samples, paired=True) == ratio_interval(*samples, paired=True)
