"""Ceilings: measured on this CPU, and the verdicts on times that follow from them."""

from dataclasses import replace

import pytest

from bench.machine import ceilings
from bench.machine.ceilings import MARGIN, Ceilings, measure_ceilings
from common.architecture import autoencoder
from common.operations import step_work

MADE_UP = Ceilings("cpu", "fp32", 2, 100e9, 10e9, 20e9, 1_000_000)
OPERATIONS = {work.id: work for work in step_work(autoencoder(), 64)}


def test_a_step_has_every_operation_once_with_its_flops():
    names = ("forward", "backward_data", "backward_filter")
    convolutions = [work for work in OPERATIONS.values() if work.operation in names]
    assert len(convolutions) == 14  # nothing needs conv1's backward data
    assert sum(work.flops for work in convolutions) == 64 * autoencoder().training_flops
    assert "conv1-backward_data" not in OPERATIONS
    assert next(iter(OPERATIONS)) == "step-gather"
    assert list(OPERATIONS)[-1] == "step-sgd"
    forward = OPERATIONS["conv2-forward"]
    assert forward.least_bytes == 4 * (64 * 256 * (256 + 128) + 128 * 256 * 9 + 128)


def test_bounds_and_fractions():
    forward, pool = OPERATIONS["conv2-forward"], OPERATIONS["conv1-maxpool"]
    assert MADE_UP.bound_by(forward) == "arithmetic"
    assert MADE_UP.bound_s(forward) == pytest.approx(forward.flops / 100e9)
    assert MADE_UP.bound_by(pool) == "memory"
    assert MADE_UP.fraction(pool, 2 * pool.least_bytes / 20e9) == pytest.approx(0.5)


def test_faster_than_the_machine_is_suspicious():
    forward, pool, sgd = (OPERATIONS[name] for name in ("conv2-forward", "conv1-maxpool", "step-sgd"))
    assert MADE_UP.suspicion(forward, forward.flops / 100e9) == ""
    assert "suspicious" in MADE_UP.suspicion(forward, forward.flops / (1.01 * MARGIN * 100e9))
    assert "GB/s" in MADE_UP.suspicion(pool, pool.least_bytes / (1.01 * MARGIN * 20e9))
    in_cache = Ceilings("cpu", "fp32", 2, 1e15, 10e9, 20e9, 10**9)
    assert in_cache.suspicion(sgd, 1e-6) == ""


def test_the_higher_ceiling_of_two_measurements_counts():
    slower = Ceilings("cpu", "fp32", 2, 90e9, 12e9, 20e9, 1_000_000)
    best = Ceilings("cpu", "fp32", 2, 100e9, 12e9, 20e9, 1_000_000)
    assert MADE_UP.higher(slower) == slower.higher(MADE_UP) == best


def test_ceilings_are_positive_and_finite():
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="gemm_flop_per_s"):
            replace(MADE_UP, gemm_flop_per_s=wrong)


def test_measured_on_this_cpu(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_SHARED_GEMM", 512)
    monkeypatch.setattr(ceilings, "CPU_VECTOR", 1 << 22)
    found = measure_ceilings("cpu", "fp32", 1)
    assert 1e9 < found.gemm_flop_per_s < 1e13
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert 1e8 < found.read_bytes_per_s < 1e13
