"""What a time means: its rates, held to the ceilings of the machine, and everything that it depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.machine.ceilings import Ceilings, measure_ceilings
from common.backend import Backend, Device, Precision
from common.operations import OperationWork
from tests.benchmarks.options import Settings
from versions.registry import BackendInfo


@dataclass(frozen=True)
class Subject:
    """A version on a device that has passed its verification."""

    info: BackendInfo
    backend: Backend
    checks: int


class MeasuredCeilings:
    """The ceilings of this session, measured when a figure is first held to them."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._known: dict[tuple[Device, Precision], Ceilings] = {}

    def of(self, backend: Backend) -> Ceilings:
        key = backend.device, backend.precision
        if key not in self._known:
            self._known[key] = measure_ceilings(*key, self._threads)
        return self._known[key]

    def measure_again(self, backend: Backend) -> Ceilings:
        """Measure a second time, and keep the best of both: on a busy machine the first may have been slowed down."""
        now = measure_ceilings(backend.device, backend.precision, self._threads)
        best = self._known[backend.device, backend.precision] = self.of(backend).higher(now)
        return best


def about(subject: Subject, settings: Settings, work: OperationWork, cache: str) -> dict[str, Any]:
    """What is known before a benchmark is timed."""
    return {
        "version": subject.info.name,
        "idea": subject.info.idea,
        "layout": subject.backend.layout,
        "device": subject.backend.device,
        "math": subject.backend.precision,
        "threads": subject.backend.threads,
        "cache": cache,
        "network": "tiny" if settings.tiny else "full",
        "batch_size": settings.batch_size,
        "epoch_pictures": settings.epoch_pictures(subject.backend.device) if work.operation == "epoch" else None,
        "flops": work.flops,
        "least_bytes": work.least_bytes,
        "registers": None,
        "verified": False,
    }


def judged(work: OperationWork, seconds: float, ceilings: MeasuredCeilings, backend: Backend) -> dict[str, Any]:
    """The median as rates, held to the ceilings; ``suspicious`` says why it cannot be believed, None where it can.

    A figure above the ceilings is only called suspicious when these have been measured a second time.
    """
    limits = ceilings.of(backend)
    if limits.suspicion(work, seconds):
        limits = ceilings.measure_again(backend)
    return {
        "gflop_per_s": work.flops / seconds / 1e9,
        "gb_per_s": work.least_bytes / seconds / 1e9,
        "fraction_of_ceiling": limits.fraction(work, seconds),
        "bound_by": limits.bound_by(work),
        "ceiling_gflop_per_s": limits.gemm_flop_per_s / 1e9,
        "ceiling_gb_per_s": limits.memory_bytes_per_s / 1e9,
        "suspicious": limits.suspicion(work, seconds) or None,
    }
