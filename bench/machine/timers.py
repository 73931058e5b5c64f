"""Clocks and caches for timing a short piece of work, on either device.

On the CPU the clock is ``perf_counter``. On a GPU a launch returns long before the work is done, so the clock is the
device's own: a reading records an event on the backend's stream, and the difference of two readings waits for the later
event and asks the device how far apart they were. A reading is all that a timing tool needs to know of it, so
pytest-benchmark's loop, which takes ``end - start``, works with it unchanged.

Warm means that the operands may lie in the caches, from the call before. Before a cold call the last cache is filled
with something else, outside the timed part.
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
"""Gives a reading; the difference of two is in seconds."""

LEAST_ROUND_S = 0.005
"""Shorter than this, the cost of a reading and the jitter of the machine are no longer small beside the work."""

MOST_ITERATIONS = 10_000
ESTIMATES, LONGEST_ESTIMATE_S = 50, 0.1
FLOATS_OF_A_LINE = 8  # float64 in the 64 bytes that a cache fetches at once
CPU_FLUSH, GPU_FLUSH = 2, 4  # times the last cache that are written; a GPU's L2 may not replace the oldest first
UNKNOWN_CACHE_BYTES = 64 * 1024 * 1024  # as large as most


@dataclass(frozen=True)
class EventReading:
    """A moment on a stream of the device; ``later - earlier`` waits for ``later`` and gives seconds."""

    event: Any
    events: Any

    def __sub__(self, earlier: EventReading) -> float:
        """Seconds from ``earlier`` to this; both are over when it returns."""
        self.event.synchronize()
        return self.events.get_elapsed_time(earlier.event, self.event) / 1e3  # CUDA counts in milliseconds


class EventTimer:
    """A clock of device events on one stream. Pieces of work between two readings queue up without the host waiting.

    What the device waits for the host in between (a launch that comes late) is inside, as it is in training.
    """

    __name__ = "cuda_event"  # what pytest-benchmark writes into its file

    def __init__(self, stream: Any, events: Any = None) -> None:
        """Read moments of ``stream``, a CuPy stream; ``events`` stands in for ``cupy.cuda`` in tests."""
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
    """No garbage collection inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def device_timer(backend: Backend) -> Timer:
    """The clock for work on ``backend``'s device."""
    return EventTimer(backend.runtime.stream) if backend.device == "gpu" else perf_counter


def timed_call(backend: Backend, call: Callable[[], None]) -> Callable[[], None]:
    """``call`` as it goes between two readings of ``device_timer``: on the CPU it has to be over when it returns."""
    if backend.device == "gpu":
        return call

    def finished() -> None:
        call()
        backend.synchronize()

    return finished


def cache_clearer(backend: Backend) -> Callable[[], None]:
    """A function that fills the last cache of ``backend``'s device with something else.

    On a GPU it only queues that, on the backend's stream and so before the next reading of its clock.
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
    """A function that writes a vector, and then has each of the threads that do the work read all of it.

    Cores have caches of their own, and groups of cores a last cache of their own: each thread has to fill its.
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
    """Seconds that a call takes about: the shortest of a few, after one that compiles and warms up."""
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
    """How many calls of ``seconds`` make a round of at least ``LEAST_ROUND_S``."""
    return min(MOST_ITERATIONS, max(1, ceil(LEAST_ROUND_S / max(seconds, 1e-9))))
