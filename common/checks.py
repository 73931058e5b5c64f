"""How a result is compared with the reference: checks, and how far rounding may take a value from the exact one.

Tolerances follow from the length of the sum. A float32 sum of L products is off by about sqrt(L) rounding errors of the
sum of the products' absolute values, whatever the order of summation (Higham and Mary, "A New Approach to Probabilistic
Rounding Error Analysis", 2019); ``SAFETY`` times that is allowed, value by value. TF32 first rounds each operand to ten
bits of fraction, which bounds each product's error and does not average out in the bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.architecture import TAPS, Architecture
from common.backend import Precision

SAFETY = 8.0
UNIT_ROUNDOFF = 2.0**-24  # float32
TF32_ROUNDOFF = 2.0**-11
EXACT = float(np.finfo(np.float32).tiny)
"""Tolerance for a result that involves no rounding."""

FULL_STEP_TOLERANCE: dict[Precision, float] = {"fp32": 2e-3, "tf32": 0.1}
"""For a step of a whole batch, where rounding reverses some ReLU and pooling decisions, each of which moves a gradient
by a whole term. A picture's share of a batch of 64 is 1.6e-2."""


@dataclass(frozen=True)
class Check:
    """The outcome of one comparison; ``worst`` is the largest error as a multiple of the tolerance."""

    name: str
    passed: bool
    worst: float
    detail: str = ""


def sum_tolerance(length: int, magnitude: np.ndarray | float, precision: Precision = "fp32") -> np.ndarray:
    """Error allowed in a sum of ``length`` products whose absolute values add up to ``magnitude``."""
    relative = SAFETY * np.sqrt(length) * UNIT_ROUNDOFF
    if precision == "tf32":
        relative += 2.5 * TF32_ROUNDOFF
    return relative * np.asarray(magnitude, np.float64) + EXACT


def step_tolerance(architecture: Architecture, n: int, precision: Precision = "fp32") -> float:
    """Error allowed in a whole step's gradients, as a share of each gradient's norm.

    Each of the 2 * stages convolutions on the way adds its own; the longest sum of the network stands for all. TF32
    also reverses some ReLU and pooling decisions, each of which moves a gradient by a whole term.
    """
    longest = max(max(n * s.height * s.width, TAPS * max(s.in_channels, s.out_channels)) for s in architecture.stages)
    depth = 2 * len(architecture.stages)
    return float(sum_tolerance(longest, depth)) if precision == "fp32" else FULL_STEP_TOLERANCE[precision]


def check_close(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> Check:
    """Compare value by value; a NaN or an infinity never passes."""
    if actual.shape != expected.shape:
        return Check(name, False, np.inf, f"shape {actual.shape} instead of {expected.shape}")
    unwritten = np.count_nonzero(~np.isfinite(actual))
    if unwritten:
        return Check(name, False, np.inf, f"{unwritten} of {actual.size} values are NaN or infinite (or never written)")
    worst = float(np.max(np.abs(actual.astype(np.float64) - expected) / tolerance, initial=0.0))
    return Check(name, worst <= 1, worst, "" if worst <= 1 else f"{worst:.3g} times the tolerance")


def check_norm(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> Check:
    """Compare as a whole: the norm of the difference against that of the expected array."""
    if not np.isfinite(actual).all():
        return check_close(name, actual, expected, tolerance)
    worst = float(np.linalg.norm(actual - expected) / (tolerance * np.linalg.norm(expected)))
    return Check(name, worst <= 1, worst, "" if worst <= 1 else f"{worst:.3g} times the tolerance")


def check_that(name: str, met: bool, otherwise: str) -> Check:
    """A check that is met or not; ``otherwise`` says what is then wrong."""
    return Check(name, met, 0.0 if met else np.inf, "" if met else otherwise)
