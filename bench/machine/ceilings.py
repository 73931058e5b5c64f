"""The highest speeds of this machine, measured in the run that uses them: a large matrix product, a copy and a read.

On a CPU the product is the faster of two variants: each thread computes a product of its own, with matrices that fit
its caches, or all threads share one product. On a GPU it is one product by cuBLAS, in the requested precision.
The bytes of a copy are those read plus those written. The read is a dot product of a vector with itself, because
operations that mostly read can be faster than a copy. The best of several rounds counts: a ceiling is the highest speed
that was ever reached.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from bench.model import CHECKED, Count, Positive
from common.backend import Device, Precision
from common.operations import OperationWork

MARGIN = 1.10
"""A speed above this multiple of a ceiling is suspicious; the ceiling is a measurement too."""

BEYOND_CACHE = 4
"""An operation that moves more than this multiple of the last cache hardly profits from cached data."""

CPU_OWN_GEMM, CPU_SHARED_GEMM = 768, 2048  # sides of the square matrices
CPU_VECTOR = 32 * 1024 * 1024  # floats: 128 MiB
GPU_GEMM = 8192
GPU_VECTOR = 128 * 1024 * 1024  # floats: 512 MiB, several times the largest L2
ROUNDS = 20  # short rounds: on a busy machine, some run undisturbed


SPEEDS = ("gemm_flop_per_s", "copy_bytes_per_s", "read_bytes_per_s")


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
        rate = work.flops / seconds
        if rate > MARGIN * self.gemm_flop_per_s:
            return f"suspicious: {rate / 1e9:,.1f} GFLOP/s, above the measured {self.gemm_flop_per_s / 1e9:,.1f}"
        rate = work.least_bytes / seconds
        beyond_cache = self.cache_bytes is not None and work.least_bytes > BEYOND_CACHE * self.cache_bytes
        if beyond_cache and rate > MARGIN * self.memory_bytes_per_s:
            return f"suspicious: {rate / 1e9:,.1f} GB/s, above the measured {self.memory_bytes_per_s / 1e9:,.1f}"
        return ""

    def higher(self, other: Ceilings) -> Ceilings:
        """The higher speeds of two measurements of one machine."""
        return replace(self, **{speed: max(getattr(self, speed), getattr(other, speed)) for speed in SPEEDS})


def measure_ceilings(device: Device, precision: Precision, threads: int) -> Ceilings:
    """Measure all three speeds in this process; the operands take about 0.3 GB (GPU: 1.9 GB)."""
    return _measure_gpu(precision, threads) if device == "gpu" else _measure_cpu(threads)


def cpu_cache_bytes() -> int | None:
    """Size of the processor's last cache; None where Linux does not report it."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1024, "M": 1024**2, "G": 1024**3}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * unit)
    return max(sizes, default=None)


def _best(call: Callable[[], None]) -> float:
    """Shortest of ``ROUNDS`` calls, in seconds, after a warm-up call."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def _measure_cpu(threads: int) -> Ceilings:
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(threads) as pool:

        def on_all(work: Callable[[int], Any]) -> None:
            list(pool.map(work, range(threads)))

        own = [rng.random((3, CPU_OWN_GEMM, CPU_OWN_GEMM), np.float32) for _ in range(threads)]
        repeats = 2

        def own_products(thread: int) -> None:
            a, b, c = own[thread]
            for _ in range(repeats):
                np.matmul(a, b, out=c)

        with threadpool_limits(limits=1, user_api="blas"):
            seconds = _best(lambda: on_all(own_products))
        flop_per_s = threads * repeats * 2 * CPU_OWN_GEMM**3 / seconds
        a, b, c = rng.random((3, CPU_SHARED_GEMM, CPU_SHARED_GEMM), np.float32)
        with threadpool_limits(limits=threads, user_api="blas"):
            seconds = _best(lambda: np.matmul(a, b, out=c))
        flop_per_s = max(flop_per_s, 2 * CPU_SHARED_GEMM**3 / seconds)

        source = np.ones((threads, CPU_VECTOR // threads), np.float32)
        target = np.zeros_like(source)
        copy_s = _best(lambda: on_all(lambda thread: np.copyto(target[thread], source[thread])))
        with threadpool_limits(limits=1, user_api="blas"):
            read_s = _best(lambda: on_all(lambda thread: np.dot(source[thread], source[thread])))
    return Ceilings(
        "cpu", "fp32", threads, flop_per_s, 2 * source.nbytes / copy_s, source.nbytes / read_s, cpu_cache_bytes()
    )


def _measure_gpu(precision: Precision, threads: int) -> Ceilings:
    import cupy

    from common.gpu import CudaRuntime, Operand

    runtime = CudaRuntime(precision)

    def best(call: Callable[[], Any]) -> float:
        call()
        times = []
        for _ in range(ROUNDS):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(runtime.stream)
            call()
            end.record(runtime.stream)
            end.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
        return min(times)

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
