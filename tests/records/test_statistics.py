"""Confidence intervals with the stated coverage, and none where there are too few samples."""

from collections import Counter

import numpy as np
import pytest

from bench.measure.run import shuffled
from bench.records.statistics import FEWEST_PAIRS, FEWEST_SAMPLES, ratio_interval, spread


def test_spread_is_the_range_over_the_median():
    assert spread([1.0, 2.0, 1.5]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_has_the_stated_coverage(paired):
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        above, below = rng.lognormal(np.log(2), 0.2, 7), rng.lognormal(0, 0.2, 7)
        low, high = ratio_interval(above, below, paired=paired)
        held += low <= 2 <= high
    assert held >= 54


def test_a_slowdown_of_both_does_not_widen_a_paired_interval():
    common = np.linspace(1, 3, 10)
    low, high = ratio_interval(2 * common, common, paired=True)
    assert (low, high) == pytest.approx((2, 2))
    low, high = ratio_interval(2 * common, common, paired=False)
    assert low < 1.7
    assert high > 2.3


def busy_epochs(rng, orders, work_s=0.4, slower=2.3):
    """Seconds of two equal rows, (2, rounds), under a load that starts and stops every two seconds or less."""
    busy, left_s = False, rng.uniform(0, 2)
    epoch_s = np.zeros((2, len(orders)))
    for i, order in enumerate(orders):
        for row in order:
            left = work_s * rng.uniform(1, 1.02)
            while left > 0:
                pace = slower if busy else 1.0
                passed_s = min(left * pace, left_s)
                epoch_s[row, i] += passed_s
                left -= passed_s / pace
                left_s -= passed_s
                if left_s <= 0:
                    busy, left_s = not busy, rng.uniform(0, 2)
    return epoch_s


@pytest.mark.parametrize("rounds", [6, 10])
def test_bursts_of_load_do_not_separate_equal_rows(rounds):
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        first, second = busy_epochs(rng, [rng.permutation(2) for _ in range(rounds)])
        low, high = ratio_interval(first, second, paired=True)
        held += low <= 1 <= high
    assert held >= 285


def test_a_paired_interval_includes_that_of_the_sign_test():
    # Measured: ten epochs of two rows of the same version. Seven pairs lie on one side, which is common by chance.
    first = [0.4, 0.41, 0.41, 0.4, 0.4, 0.73, 0.4, 0.41, 0.4, 0.4]
    second = [0.67, 0.81, 0.4, 0.53, 0.39, 0.63, 0.81, 0.73, 0.66, 0.85]
    _, high = ratio_interval(first, second, paired=True)
    assert high == pytest.approx(0.4 / 0.39)


def test_every_order_is_equally_likely():
    rows = ["v1", "v2", "v3"]
    orders = Counter(tuple(shuffled(rows)) for _ in range(1200))
    assert len(orders) == 6
    assert all(120 < count < 280 for count in orders.values())
    assert rows == ["v1", "v2", "v3"]


def test_too_few_samples_give_no_interval():
    for paired, fewest in ((False, FEWEST_SAMPLES), (True, FEWEST_PAIRS)):
        few, enough = [1.0] * (fewest - 1), [1.0] * fewest
        assert ratio_interval(few, [1.0] * 9, paired=paired) is None
        assert ratio_interval([1.0] * 9, few, paired=paired) is None
        assert ratio_interval(enough, [1.0] * 9, paired=paired) == (1.0, 1.0)


def test_the_same_samples_give_the_same_interval():
    samples = ([1.0, 1.2, 0.9, 1.1, 1.3, 1.15], [2.0, 2.1, 2.4, 1.9, 2.2, 2.0])
    first = ratio_interval(*samples, paired=True)
    assert first is not None
    assert ratio_interval(*samples, paired=True) == first
