"""Clocks and cache flushes for timing a short operation, on either device.

On the CPU the clock is ``perf_counter``. On a GPU a launch returns long before the work is done, so the clock uses
device events: a reading records an event on the backend's stream. The difference of two readings waits for the later
event and returns the seconds between them. pytest-benchmark's loop computes ``end - start``, so it works unchanged.

In a warm call the operands may be in the caches, from the call before. Before a cold call, and outside the timed part,
the last cache is filled with other data.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.ceilings import cpu_cache_bytes
from common.backend import Backend

Timer = Callable[[], Any]
"""Returns a reading; the difference of two readings is in seconds."""

LEAST_ROUND_S = 0.005
"""In a shorter round, the cost of a reading and the jitter of the machine are not negligible."""

MOST_ITERATIONS = 10_000
ESTIMATES, LONGEST_ESTIMATE_S = 50, 0.1
FLOATS_OF_A_LINE = 8  # float64 in a cache line of 64 bytes
CPU_FLUSH, GPU_FLUSH = 2, 4  # a flush writes this multiple of the last cache; a GPU's L2 is not strictly LRU
UNKNOWN_CACHE_BYTES = 64 * 1024 * 1024  # as large as most caches


@dataclass(frozen=True)
class EventReading:
    """An event on a stream of the device; ``later - earlier`` waits for ``later`` and returns seconds."""

    event: Any
    events: Any

    def __sub__(self, earlier: EventReading) -> float:
        """Seconds from ``earlier`` to this event; waits for this event."""
        self.event.synchronize()
        return self.events.get_elapsed_time(earlier.event, self.event) / 1e3  # CUDA counts in milliseconds


class EventTimer:
    """A clock of device events on one stream. The host does not wait between two readings.

    If the device waits for a late launch in between, that time counts, as it does in training.
    """

    __name__ = "cuda_event"  # what pytest-benchmark writes into its file

    def __init__(self, stream: Any, events: Any = None) -> None:
        """Time ``stream``, a CuPy stream; ``events`` replaces ``cupy.cuda`` in tests."""
        if events is None:
            import cupy

            events = cupy.cuda
        self._stream = stream
        self._events = events

    def __call__(self) -> EventReading:
        """Record an event and return at once."""
        event = self._events.Event()
        event.record(self._stream)
        return EventReading(event, self._events)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, the garbage collector does not run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
    """A function that writes a vector; then every thread reads all of it.

    Cores, and groups of cores, have caches of their own, so each thread must fill its caches.
    """
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


def seconds_of(timer: Timer, call: Callable[[], None]) -> float:
    """Approximate seconds of a call: the shortest of a few, after a call that compiles and warms up."""
    call()
    shortest, spent = float("inf"), 0.0
    for _ in range(ESTIMATES):
        start = timer()
        call()
        seconds = timer() - start
        shortest, spent = min(shortest, seconds), spent + seconds
        if spent > LONGEST_ESTIMATE_S:
            break
    return shortest


def iterations_for(seconds: float) -> int:
    """The number of calls of ``seconds`` each that fill a round of at least ``LEAST_ROUND_S``."""
    return min(MOST_ITERATIONS, max(1, ceil(LEAST_ROUND_S / max(seconds, 1e-9))))
