"""Clocks inside a training step: how long each operation of each stage takes while the network really trains.

The step is the network's own, so operations run in their true order and find in the caches what the one before left.
For a clocked step every operation of the backend is wrapped, on that one object, in two readings of a clock.
Afterwards the object is as it was, so that a step that is timed as a whole has no clocks in it.

On a CPU an operation is over when its call returns, and the clock is the host's. On a GPU calls only queue work, and
readings are events on the same stream. If the device ran dry, the gap between two events would hold the host's launches
as well; so it is first given other work, copies that last about twice as long as the host takes to queue a whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from time import perf_counter
from typing import Any

from bench.machine.timers import Timer
from common.architecture import Stage
from common.backend import Backend
from common.operations import METHODS, STAGE_METHODS, WHOLE_STEP, Operation

COPY_BYTES = 64 * 1024 * 1024
MOST_COPIES = 500  # of a head start: a stream takes about a thousand launches before the host has to wait


@dataclass(frozen=True)
class _Span:
    stage: str
    operation: Operation
    start: Any
    end: Any


class Stopwatch:
    """Clocks every operation of a backend while ``clocking``."""

    def __init__(self, backend: Backend, timer: Timer) -> None:
        """``timer`` gives readings whose difference is in seconds."""
        self._backend = backend
        self._timer = timer
        self._spans: list[_Span] = []
        self._stage = WHOLE_STEP
        self._inside = False

    @contextmanager
    def clocking(self) -> Iterator[None]:
        """Within this, every operation is clocked; what was clocked before is forgotten."""
        backend = self._backend
        self._spans.clear()
        clocked = {
            method: self._operation(getattr(backend, method), operation) for method, operation in METHODS.items()
        }
        clocked |= {method: self._whole_stage(getattr(backend, method), method) for method in STAGE_METHODS}
        clocked["replayed"] = lambda owner, name, work: work()  # a replay would not pass through the operations
        kept = {name: value for name, value in vars(backend).items() if name in clocked}
        vars(backend).update(clocked)
        try:
            yield
        finally:
            for name in clocked:
                delattr(backend, name)
            vars(backend).update(kept)

    def seconds(self) -> dict[tuple[str, Operation], float]:
        """Seconds by stage and operation, in the order of the step.

        A stage that the version overrides also has the time that none of its operations covers, as ``stage_forward`` or
        ``stage_backward``.
        """
        found: dict[tuple[str, Operation], float] = {}
        for span in self._spans:
            key = (span.stage, span.operation)
            found[key] = found.get(key, 0.0) + (span.end - span.start)
        return found

    def _operation(self, call: Callable[..., None], operation: Operation) -> Callable[..., None]:
        def clocked(*arguments: Any, **options: Any) -> None:
            if self._inside:  # an operation that uses another: the outer one has the time
                call(*arguments, **options)
                return
            self._inside = True
            start = self._timer()
            call(*arguments, **options)
            self._spans.append(_Span(self._stage, operation, start, self._timer()))
            self._inside = False

        return clocked

    def _whole_stage(self, call: Callable[..., None], method: str) -> Callable[..., None]:
        fused = getattr(type(self._backend), method) is not getattr(Backend, method)

        def clocked(stage: Stage, *arguments: Any, **options: Any) -> None:
            self._stage = stage.name
            first, start = len(self._spans), self._timer() if fused else None
            call(stage, *arguments, **options)
            if fused:
                # What lies between the operations that it did call, and before and after them.
                gaps = [start, *(moment for span in self._spans[first:] for moment in (span.start, span.end))]
                gaps.append(self._timer())
                for gap_start, gap_end in zip(gaps[::2], gaps[1::2], strict=True):
                    self._spans.append(_Span(stage.name, STAGE_METHODS[method], gap_start, gap_end))
            self._stage = WHOLE_STEP

        return clocked


class HostClock:
    """For a CPU, where nothing is queued and nothing needs a head start."""

    timer: Timer = staticmethod(perf_counter)

    def begin(self) -> None:
        """Do nothing."""

    def queued(self) -> bool:
        """Whether the readings hold nothing but the operations: always."""
        return True


class StreamClock:
    """For a GPU: events on the backend's stream, and a head start for the host."""

    def __init__(
        self, timer: Timer, copy: Callable[[], None], over: Callable[[Any], bool], head_start_s: float
    ) -> None:
        """``copy`` queues a piece of filling work, ``over`` tells whether a reading has been reached."""
        self.timer = timer
        self.head_start_s = head_start_s
        self._copy = copy
        self._over = over
        copy()  # what the first one sets up is not to be measured
        start = timer()
        copy()
        self._copy_s = timer() - start
        self._filled: Any = None
        self._begun = 0.0

    def begin(self) -> None:
        """Give the device ``head_start_s`` of other work; called right before a clocked step is queued."""
        for _ in range(min(MOST_COPIES, ceil(self.head_start_s / self._copy_s))):
            self._copy()
        self._filled = self.timer()
        self._begun = perf_counter()

    def queued(self) -> bool:
        """Whether the device was still busy with that when the host had queued the whole step.

        If not, the readings may hold launches. Called right after the step; the next head start follows what the host
        took, and is longer after a failure.
        """
        ahead = not self._over(self._filled)
        self.head_start_s = max(2 * (perf_counter() - self._begun), 0.0 if ahead else 2 * self.head_start_s)
        return ahead


def device_clock(backend: Backend, host_s: float) -> HostClock | StreamClock:
    """The clock for ``backend``; ``host_s`` is what the host takes to queue a step, on a GPU."""
    if backend.device == "cpu":
        return HostClock()
    import cupy

    from bench.machine.timers import EventTimer

    stream = backend.runtime.stream
    with stream:
        source, target = cupy.zeros(COPY_BYTES, cupy.uint8), cupy.empty(COPY_BYTES, cupy.uint8)

    def copy() -> None:
        target.data.copy_from_device_async(source.data, COPY_BYTES, stream)

    return StreamClock(EventTimer(stream), copy, lambda reading: reading.event.done, 2 * host_s)
