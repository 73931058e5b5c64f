"""How a benchmark is timed: its clock, the caches before a call, the calls in a round, the registers of its kernels.

In a warm call the operands may be in the caches, from the call before. Before a cold call, and outside the timed part,
the last cache is filled with other data. pytest-benchmark's loop computes ``end - start``, so both clocks work with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import ceil
from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.devices import cpu_cache_bytes
from bench.machine.timers import EventTimer, Timer
from common.backend import Backend

LEAST_ROUND_S = 0.005
"""In a shorter round, the cost of a reading and the jitter of the machine are not negligible."""

MOST_ITERATIONS = 10_000
FLOATS_OF_A_LINE = 8  # float64 in a cache line of 64 bytes
CPU_FLUSH, GPU_FLUSH = 2, 4  # a flush writes this multiple of the last cache; a GPU's L2 is not strictly LRU
UNKNOWN_CACHE_BYTES = 64 * 1024 * 1024  # as large as most caches


def device_timer(backend: Backend) -> Timer:
    """The clock for ``backend``'s device."""
    return EventTimer(backend.runtime.stream) if backend.device == "gpu" else perf_counter


def timed_call(backend: Backend, call: Callable[[], None]) -> Callable[[], None]:
    """``call`` for timing between two readings of ``device_timer``; on the CPU it synchronises before it returns."""
    if backend.device == "gpu":
        return call

    def finished() -> None:
        call()
        backend.synchronize()

    return finished


def iterations_for(seconds: float) -> int:
    """The number of calls of ``seconds`` each that fill a round of at least ``LEAST_ROUND_S``."""
    return min(MOST_ITERATIONS, max(1, ceil(LEAST_ROUND_S / max(seconds, 1e-9))))


def cache_clearer(backend: Backend) -> Callable[[], None]:
    """A function that fills the last cache of ``backend``'s device with other data.

    On a GPU it only queues that on the backend's stream, and so before the next reading of its clock.
    """
    if backend.device == "gpu":
        import cupy

        stream = backend.runtime.stream
        size = cupy.cuda.Device().attributes["L2CacheSize"]
        with stream:
            filler = cupy.empty(GPU_FLUSH * size, np.uint8)
        return lambda: filler.data.memset_async(0, filler.nbytes, stream)
    filler = np.zeros(CPU_FLUSH * (cpu_cache_bytes() or UNKNOWN_CACHE_BYTES) // 8)
    sums = np.zeros(backend.threads)
    overwrite = _overwrite_and_read()
    return lambda: overwrite(filler, filler[0] + 1, sums)


@functools.cache
def _overwrite_and_read() -> Callable[[np.ndarray, float, np.ndarray], None]:
    """A function that writes a vector, then lets every thread read all of it: cores have caches of their own."""
    import numba

    @numba.njit(parallel=True)
    def overwrite(vector, value, sums):
        for i in numba.prange(len(vector)):
            vector[i] = value
        for thread in numba.prange(len(sums)):
            total = 0.0
            for i in range(0, len(vector), FLOATS_OF_A_LINE):
                total += vector[i]
            sums[thread] = total

    return overwrite


def kernel_registers(backend: Backend, call: Callable[[], None]) -> dict[str, int] | None:
    """Registers a thread of each Numba kernel that ``call`` launches; None on a CPU.

    A kernel compiled for several argument types counts with its largest. Numba knows nothing of cuBLAS's kernels.
    """
    if backend.device != "gpu":
        return None
    launch_grid = backend.launch_grid
    launched: list[Any] = []

    def recording(kernel: Any, *arguments: Any) -> None:
        launched.append(kernel)
        launch_grid(kernel, *arguments)

    backend.launch_grid = recording
    try:
        call()
        backend.synchronize()
    finally:
        del backend.launch_grid
    registers: dict[str, int] = {}
    for kernel in launched:
        name = kernel.py_func.__name__  # kernels made by one function share it
        registers[name] = max(registers.get(name, 0), *kernel.get_regs_per_thread().values())
    return registers
