"""What this machine can do at best, measured in the run that uses it: a large matrix product, copy and read.

The product is the faster of two ways of giving it to a CPU's threads: each thread a product of its own, with matrices
that its caches hold, or one product shared by all. On a GPU it is one product by cuBLAS, in the math asked for.
A copy's bytes are those read and those written. A read is a dot product of a vector with itself, since operations that
mostly read can outrun a copy. The best of several rounds counts: a ceiling is what was reached once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from common.backend import Device, Math
from common.operations import Operation

MARGIN = 1.10
"""How far above a ceiling a speed may lie before it is suspicious: the ceiling is a measurement too."""

BEYOND_CACHE = 4
"""How many times the last cache an operation has to move before what lies in there hardly helps it."""

CPU_OWN_GEMM, CPU_SHARED_GEMM = 768, 2048  # sides of the square matrices
CPU_VECTOR = 32 * 1024 * 1024  # floats: 128 MiB
GPU_GEMM = 8192
GPU_VECTOR = 128 * 1024 * 1024  # floats: 512 MiB, several times the largest L2
ROUNDS = 20  # short ones: on a busy machine, some fall between what else it does


SPEEDS = ("gemm_flop_per_s", "copy_bytes_per_s", "read_bytes_per_s")


@dataclass(frozen=True)
class Ceilings:
    """The best that the device reached, per second; ``cache_bytes`` is its last cache, None where unknown."""

    device: Device
    math: Math
    threads: int
    gemm_flop_per_s: float
    copy_bytes_per_s: float
    read_bytes_per_s: float
    cache_bytes: int | None

    @property
    def memory_bytes_per_s(self) -> float:
        """The faster of copying and reading."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def bound_s(self, operation: Operation) -> float:
        """Seconds that the operation needs at the ceilings: the later of its arithmetic and its traffic."""
        return max(operation.flops / self.gemm_flop_per_s, operation.least_bytes / self.memory_bytes_per_s)

    def bound_by(self, operation: Operation) -> str:
        """``arithmetic`` or ``memory``: the ceiling that the operation meets first."""
        arithmetic = operation.flops / self.gemm_flop_per_s > operation.least_bytes / self.memory_bytes_per_s
        return "arithmetic" if arithmetic else "memory"

    def fraction(self, operation: Operation, seconds: float) -> float:
        """Share of the ceiling that was reached: 1 is as fast as the measured ceilings let it be."""
        return self.bound_s(operation) / seconds

    def suspicion(self, operation: Operation, seconds: float) -> str:
        """Why such a time cannot be believed; empty where it can.

        Memory speeds are only held to the ceiling where the operands are far larger than the last cache.
        """
        rate = operation.flops / seconds
        if rate > MARGIN * self.gemm_flop_per_s:
            return f"suspicious: {rate / 1e9:,.1f} GFLOP/s, above the measured {self.gemm_flop_per_s / 1e9:,.1f}"
        rate = operation.least_bytes / seconds
        beyond_cache = self.cache_bytes is not None and operation.least_bytes > BEYOND_CACHE * self.cache_bytes
        if beyond_cache and rate > MARGIN * self.memory_bytes_per_s:
            return f"suspicious: {rate / 1e9:,.1f} GB/s, above the measured {self.memory_bytes_per_s / 1e9:,.1f}"
        return ""

    def as_record(self) -> dict[str, Any]:
        """For a results file."""
        return asdict(self)


def higher(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The faster of two measurements of one machine, speed by speed: a ceiling is what was reached once."""
    return {**one, **{key: max(one[key], other[key]) for key in SPEEDS}}


def measure_ceilings(device: Device, math: Math, threads: int) -> Ceilings:
    """Measure all three, on this process's device; the operands take some 0.3 GB (GPU: 1.9 GB)."""
    return _measure_gpu(math, threads) if device == "gpu" else _measure_cpu(threads)


def cpu_cache_bytes() -> int | None:
    """Size of the processor's last cache, as Linux tells it; None where it does not."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1024, "M": 1024**2, "G": 1024**3}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * unit)
    return max(sizes, default=None)


def _best(call: Callable[[], None]) -> float:
    """Shortest of ``ROUNDS`` calls, in seconds, after one that warms up."""
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


def _measure_gpu(math: Math, threads: int) -> Ceilings:
    import cupy

    from common.gpu import CudaRuntime, Operand

    runtime = CudaRuntime(math)

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
    return Ceilings("gpu", math, threads, 2 * side**3 / gemm_s, 2 * size / copy_s, size / read_s, cache)
