"""The checker itself: right backends pass, every wrong one is caught, and tolerances mean what they say."""

import numpy as np
import pytest

from common.architecture import autoencoder
from common.checks import check_close, sum_tolerance
from common.verify import safe_step_inputs, verify
from tests.broken import RIGHT, WRONG

# Large enough that what only goes wrong in a large batch, or past the first thousand parameters, goes wrong.
NETWORK = autoencoder((8, 4), (12, 10))
BATCHES = (16, 7)


@pytest.mark.parametrize("backend", RIGHT, ids=lambda backend: backend.__name__)
def test_right_backends_pass(backend):
    failures = [check for check in verify(backend(), NETWORK, batch_sizes=BATCHES, small=True) if not check.passed]
    assert failures == []


@pytest.mark.parametrize("backend", WRONG, ids=lambda backend: backend.__name__)
def test_wrong_backends_are_caught(backend):
    checks = verify(backend(), NETWORK, batch_sizes=BATCHES, small=True)
    assert any(not check.passed for check in checks)
    assert all(check.detail for check in checks if not check.passed)


def test_house_list_of_mistakes_is_covered():
    names = {backend.__name__ for backend in WRONG}
    listed = {
        "ReturnsZeros",
        "LeavesMemoryUnwritten",
        "SkipsTheBorder",
        "DropsTheBiasGradient",
        "SpoilsItsInput",
        "ForgetsToSynchronise",
        "ReturnsNaN",
    }
    assert listed <= names


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_close_never_passes_what_is_not_finite(bad):
    actual = np.zeros(4, np.float32)
    actual[2] = bad
    check = check_close("x", actual, np.zeros(4), np.inf)
    assert not check.passed
    assert "1 of 4" in check.detail


def test_check_close_rejects_another_shape():
    assert not check_close("x", np.zeros((2, 3), np.float32), np.zeros((3, 2)), 1.0).passed


def test_sum_tolerance_grows_with_the_root_of_the_length_and_with_tf32():
    one, four = float(sum_tolerance(100, 1.0)), float(sum_tolerance(400, 1.0))
    assert four == pytest.approx(2 * one)
    assert sum_tolerance(100, 1.0, "tf32") > 100 * one


@pytest.mark.parametrize("length", [9, 2304, 65536])
def test_sum_tolerance_covers_float32_sums_in_any_order(length):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, length)).astype(np.float32)
    products = (a * b).astype(np.float32)
    sequential = np.float32(0)
    for product in products:
        sequential += product
    exact = float(a.astype(np.float64) @ b)
    allowed = float(sum_tolerance(length, np.abs(a.astype(np.float64)) @ np.abs(b)))
    assert abs(sequential - exact) <= allowed
    assert abs(products.sum() - exact) <= allowed
    # Not so wide that a lost term of ordinary size would pass.
    assert allowed < np.abs(products).max()


def test_safe_inputs_say_when_there_are_none():
    with pytest.raises(ValueError, match="smaller network"):
        safe_step_inputs(autoencoder((4, 4), (2, 2)), 1, 2.0)
