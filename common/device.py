"""Facts about the processor: usable cores, cache lines, and whether CUDA kernels run in Numba's simulator."""

from __future__ import annotations

import os

CACHE_LINE = 64
"""Bytes, on x86 and most other processors."""

VECTOR = CACHE_LINE // 4
"""Floats that CPU loops process at a time: one cache line, one AVX-512 vector, two AVX2 vectors."""


def in_simulator() -> bool:
    """Whether this process runs CUDA kernels in Numba's simulator. The simulator is never reported as a GPU."""
    from numba.core import config

    return bool(config.ENABLE_CUDASIM)


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
