"""The processor that this runs on: cores, cache lines, and whether CUDA kernels run in Numba's simulator."""

from __future__ import annotations

import os

CACHE_LINE = 64
"""Bytes, on x86 and most other processors."""

VECTOR = CACHE_LINE // 4
"""Floats that loops on the CPU take at a time: a cache line, a vector of AVX-512, two of AVX2."""


def in_simulator() -> bool:
    """Whether this process runs CUDA kernels in Numba's simulator, which is never to be called a GPU."""
    from numba.core import config

    return bool(config.ENABLE_CUDASIM)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
