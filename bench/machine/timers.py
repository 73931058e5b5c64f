"""Clocks for timing a short operation, on either device.

On the CPU the clock is ``perf_counter``. On a GPU a launch returns long before the work is done, so the clock uses
device events on the backend's stream.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Timer = Callable[[], Any]
"""Returns a reading; the difference of two readings is in seconds."""


@dataclass(frozen=True)
class EventReading:
    """An event on a stream of the device."""

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


def seconds_of(timer: Timer, call: Callable[[], None], most_calls: int = 50, enough_s: float = 0.1) -> float:
    """The shortest of several calls, in seconds, after a call that compiles and warms up.

    It ends after ``most_calls``, or when the calls have taken more than ``enough_s`` together.
    """
    call()
    shortest, spent = float("inf"), 0.0
    for _ in range(most_calls):
        start = timer()
        call()
        seconds = timer() - start
        shortest, spent = min(shortest, seconds), spent + seconds
        if spent > enough_s:
            break
    return shortest
