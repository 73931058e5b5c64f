"""The highest speeds of this machine, measured in the run that uses them: a large matrix product, a copy and a read.

The bytes of a copy are those read plus those written. The read is a dot product of a vector with itself, because
operations that mostly read can be faster than a copy. The best of several rounds counts.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf
from time import perf_counter
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from bench.machine.devices import cpu_cache_bytes
from bench.machine.timers import EventTimer, seconds_of
from bench.model import CHECKED, Count, Positive
from common.backend import Device, Precision
from common.operations import OperationWork

MARGIN = 1.10
"""A speed above this multiple of a ceiling is suspicious; the ceiling is a measurement too."""
BEYOND_CACHE = 4
"""An operation that moves more than this multiple of the last cache hardly profits from cached data."""

CPU_OWN_GEMM, CPU_SHARED_GEMM = 768, 2048  # sides of the square matrices
OWN_PRODUCTS = 2  # in one timed call, beside which handing it to the threads is short
CPU_VECTOR = 32 * 1024 * 1024  # floats: 128 MiB
GPU_GEMM = 8192
GPU_VECTOR = 128 * 1024 * 1024  # floats: 512 MiB, several times the largest L2
ROUNDS = 20  # short rounds: on a busy machine, some run undisturbed


@dataclass(config=CHECKED, frozen=True)
class Ceilings:
    """The highest measured speeds of the device, per second."""

    device: str
    precision: Annotated[str, Field(alias="math")]
    threads: Count
    gemm_flop_per_s: Positive
    copy_bytes_per_s: Positive
    read_bytes_per_s: Positive
    cache_bytes: Count | None
    """Size of the last cache; None if unknown."""

    @property
    def memory_bytes_per_s(self) -> float:
        """The higher of the two memory speeds."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def bound_s(self, work: OperationWork) -> float:
        """Seconds that the operation needs at the ceilings: the longer of its arithmetic and its memory traffic."""
        return max(work.flops / self.gemm_flop_per_s, work.least_bytes / self.memory_bytes_per_s)

    def bound_by(self, work: OperationWork) -> str:
        """``arithmetic`` or ``memory``: the ceiling that limits the operation."""
        arithmetic = work.flops / self.gemm_flop_per_s > work.least_bytes / self.memory_bytes_per_s
        return "arithmetic" if arithmetic else "memory"

    def fraction(self, work: OperationWork, seconds: float) -> float:
        """Share of the ceiling that was reached: 1 is as fast as the measured ceilings allow."""
        return self.bound_s(work) / seconds

    def suspicion(self, work: OperationWork, seconds: float) -> str:
        """Why the time is implausible; empty if it is plausible.

        Memory speeds are checked only if the operands are far larger than the last cache.
        """
        if reason := self.too_fast(work.flops / seconds):
            return reason
        rate = work.least_bytes / seconds
        beyond_cache = self.cache_bytes is not None and work.least_bytes > BEYOND_CACHE * self.cache_bytes
        if beyond_cache and rate > MARGIN * self.memory_bytes_per_s:
            return f"suspicious: {rate / 1e9:,.1f} GB/s, above the measured {self.memory_bytes_per_s / 1e9:,.1f}"
        return ""

    def too_fast(self, flop_per_s: float) -> str:
        """Why a rate of arithmetic is implausible; empty if it is plausible."""
        if flop_per_s <= MARGIN * self.gemm_flop_per_s:
            return ""
        return f"suspicious: {flop_per_s / 1e9:,.1f} GFLOP/s, above the measured {self.gemm_flop_per_s / 1e9:,.1f}"

    def higher(self, other: Ceilings) -> Ceilings:
        """The higher speeds of two measurements of one machine."""
        speeds = ("gemm_flop_per_s", "copy_bytes_per_s", "read_bytes_per_s")
        return replace(self, **{speed: max(getattr(self, speed), getattr(other, speed)) for speed in speeds})


def measure_ceilings(device: Device, precision: Precision, threads: int) -> Ceilings:
    """Measure all three speeds in this process; the operands take about 0.3 GB (GPU: 1.9 GB)."""
    return _measure_gpu(precision, threads) if device == "gpu" else _measure_cpu(threads)


def _measure_cpu(threads: int) -> Ceilings:
    """The product is the faster of two: one a thread, with matrices that fit its caches, or one that all share."""
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    own = rng.random((threads, 3, CPU_OWN_GEMM, CPU_OWN_GEMM), np.float32)
    a, b, c = rng.random((3, CPU_SHARED_GEMM, CPU_SHARED_GEMM), np.float32)
    source = np.ones((threads, CPU_VECTOR // threads), np.float32)
    target = np.zeros_like(source)

    def best(call: Callable[[], Any]) -> float:
        return seconds_of(perf_counter, call, ROUNDS, inf)

    with ThreadPoolExecutor(threads) as pool:

        def best_on_all(work: Callable[[int], Any]) -> float:
            return best(lambda: list(pool.map(work, range(threads))))

        def own_products(thread: int) -> None:
            for _ in range(OWN_PRODUCTS):
                np.matmul(own[thread, 0], own[thread, 1], out=own[thread, 2])

        with threadpool_limits(limits=1, user_api="blas"):
            own_s = best_on_all(own_products) / OWN_PRODUCTS
            copy_s = best_on_all(lambda thread: np.copyto(target[thread], source[thread]))
            read_s = best_on_all(lambda thread: np.dot(source[thread], source[thread]))
        with threadpool_limits(limits=threads, user_api="blas"):
            shared_s = best(lambda: np.matmul(a, b, out=c))
    flop_per_s = max(threads * 2 * CPU_OWN_GEMM**3 / own_s, 2 * CPU_SHARED_GEMM**3 / shared_s)
    size = source.nbytes
    return Ceilings("cpu", "fp32", threads, flop_per_s, 2 * size / copy_s, size / read_s, cpu_cache_bytes())


def _measure_gpu(precision: Precision, threads: int) -> Ceilings:
    """The product is one by cuBLAS, in the given precision."""
    import cupy

    from common.gpu import CudaRuntime, Operand

    runtime = CudaRuntime(precision)
    timer = EventTimer(runtime.stream)

    def best(call: Callable[[], Any]) -> float:
        return seconds_of(timer, call, ROUNDS, inf)

    side = GPU_GEMM
    matrices = [runtime.empty((side, side), np.float32) for _ in range(3)]
    for matrix in matrices:
        runtime.write(matrix, np.random.default_rng(0).random((side, side), np.float32))
    a, b, c = (Operand(matrix) for matrix in matrices)
    gemm_s = best(lambda: runtime.gemm(side, side, side, a, b, c))
    with runtime.stream:
        source, target = cupy.ones(GPU_VECTOR, np.float32), cupy.empty(GPU_VECTOR, np.float32)
        copy_s = best(lambda: target.data.copy_from_device_async(source.data, source.nbytes, runtime.stream))
        read_s = best(lambda: cupy.dot(source, source))
    cache = cupy.cuda.Device().attributes["L2CacheSize"]
    size = source.nbytes
    return Ceilings("gpu", precision, threads, 2 * side**3 / gemm_s, 2 * size / copy_s, size / read_s, cache)
