"""A network in training, step by step: whole steps with no clock inside, and steps clocked operation by operation.

The n-th step of every version is taken on the same pictures from the same weights, so their losses have to agree.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.timers import undisturbed
from bench.measure.layer_clock import Stopwatch
from bench.measure.setup import WorkerTask
from common.architecture import Architecture
from common.backend import Backend
from common.network import Network, initial_parameters
from common.operations import Operation

WARM_UP_STEPS = 2
STEPS_TOGETHER = {"cpu": 1, "gpu": 10}
"""Whole steps between two clock readings: on a GPU several, as in an epoch, so that the host can run ahead."""

CLOCKED_ATTEMPTS = 5


class Steps:
    """A network in training, step by step."""

    def __init__(self, backend: Backend, architecture: Architecture, images: np.ndarray, task: WorkerTask) -> None:
        """Build the network, poisoned, and move ``images`` (samples, 3, H, W) uint8, whole batches, to the device."""
        self.backend = backend
        self.network = Network(backend, architecture, task.batch_size, initial_parameters(architecture, task.seed))
        self.network.poison()
        self.learning_rate = task.learning_rate
        self.taken = 0
        order = np.random.default_rng(task.seed).permutation(len(images)).astype(np.int32)
        self._images, self._order = backend.upload(images), backend.upload(order)
        self._batches = len(images) // task.batch_size
        self._losses = backend.upload(np.zeros(max(STEPS_TOGETHER.values()), np.float32))
        self._unread = 0

    def take(self) -> None:
        """Queue one step."""
        n = self.network.batch_size
        start = self.taken % self._batches * n
        self.network.step(self._images, self._order, start, n, self.learning_rate, self._losses, self._unread)
        self.taken += 1
        self._unread += 1

    def losses(self) -> list[float]:
        """The losses of the steps since the last call."""
        self.backend.synchronize()
        losses = self.backend.read(self._losses)[: self._unread].tolist()
        self._unread = 0
        return losses

    def warm_up(self) -> tuple[float, list[float]]:
        """Compile everything; returns the seconds in which the host queued the last step, and the losses."""
        losses = []
        queued_s = 0.0
        for _ in range(WARM_UP_STEPS):
            self.backend.synchronize()
            start = perf_counter()
            self.take()
            queued_s = perf_counter() - start
            losses += self.losses()
        return queued_s, losses

    def timed(self) -> tuple[float, list[float]]:
        """Seconds of a whole step with no clock inside, and the losses."""
        count = STEPS_TOGETHER[self.backend.device]
        self.backend.synchronize()
        with undisturbed():
            start = perf_counter()
            for _ in range(count):
                self.take()
            self.backend.synchronize()
            seconds = (perf_counter() - start) / count
        return seconds, self.losses()

    def clocked(self, clock: Any) -> tuple[dict[tuple[str, Operation], float], bool, list[float]]:
        """Seconds by stage and operation of one step, whether they hold nothing else, and the losses.

        A step in which the device had to wait for the host is repeated, a few times.
        """
        stopwatch = Stopwatch(self.backend, clock.timer)
        losses = []
        for _ in range(CLOCKED_ATTEMPTS):
            self.backend.synchronize()
            with undisturbed(), stopwatch.clocking():
                clock.begin()
                self.take()
                clean = clock.queued()
            losses += self.losses()
            if clean:
                break
        return stopwatch.seconds(), clean, losses

    def unwritten(self) -> tuple[list[str], list[float]]:
        """Poison, take a step, and name what is not finite after it: outputs of stages, gradients, parameters."""
        self.network.poison()
        self.take()
        losses = self.losses()
        network, views = self.network, self.network.views(self.network.batch_size)
        stages = network.architecture.stages
        buffers = {
            "input": views.picture,
            **{f"output of {stage.name}": buffer for stage, buffer in zip(stages, views.outputs, strict=True)},
            **{f"gradient of {name}": buffer for name, buffer in network.gradients.items()},
            **network.parameters,
        }
        return [name for name, buffer in buffers.items() if not np.isfinite(self.backend.read(buffer)).all()], losses
