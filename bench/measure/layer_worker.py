"""The process in which a version's training step is taken apart, spoken to like ``bench.measure.worker``.

Its commands, a line each: ``start`` builds the network, compiles, and tells the memory; ``step`` times whole steps
without any clock inside, then one step operation by operation; ``finish`` fills the outputs with NaN, takes one more
step and tells which of them still hold any. Every answer has the losses of the steps that were taken for it: the n-th
step of every version is taken on the same pictures from the same weights, so their losses have to agree.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.environment import gpu_used_bytes, peak_process_bytes
from bench.machine.timers import undisturbed
from bench.measure.layer_clock import Stopwatch, device_clock
from bench.measure.worker import main
from common.architecture import Architecture, autoencoder
from common.backend import Backend
from common.network import Network, initial_parameters
from versions.registry import find

WARM_UP_STEPS = 2
STEPS_TOGETHER = {"cpu": 1, "gpu": 10}
"""Whole steps between two clock readings: on a GPU several, as in an epoch, so that the host can run ahead."""

WATCHED_ATTEMPTS = 5


class Steps:
    """A network in training, step by step."""

    def __init__(
        self,
        backend: Backend,
        architecture: Architecture,
        images: np.ndarray,
        *,
        batch_size: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        """Build the network, poisoned, and move ``images`` (samples, 3, H, W) uint8, whole batches, to the device."""
        self.backend = backend
        self.network = Network(backend, architecture, batch_size, initial_parameters(architecture, seed))
        self.network.poison()
        self.learning_rate = learning_rate
        self.taken = 0
        order = np.random.default_rng(seed).permutation(len(images)).astype(np.int32)
        self._images, self._order = backend.upload(images), backend.upload(order)
        self._batches = len(images) // batch_size
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
        """Of the steps since the last call."""
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

    def watched(self, clock: Any) -> tuple[dict[tuple[str, str], float], bool, list[float]]:
        """Seconds by stage and operation of one step, whether they hold nothing else, and the losses.

        A step in which the device had to wait for the host is taken again, a few times.
        """
        stopwatch = Stopwatch(self.backend, clock.timer)
        losses = []
        for _ in range(WATCHED_ATTEMPTS):
            self.backend.synchronize()
            with undisturbed(), stopwatch.watching():
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


def serve(task: dict[str, Any], commands: Any, answer: Any) -> None:
    """Carry out commands until the end of input."""
    on_gpu = task["device"] == "gpu"
    used_before = gpu_used_bytes() if on_gpu else 0
    backend = find(task["backend"]).load(task["device"], math=task["math"], threads=task["threads"])
    settings = {key: task[key] for key in ("batch_size", "learning_rate", "seed")}
    for line in commands:
        command = line.strip()
        if command == "start":
            steps = Steps(backend, autoencoder(), np.load(task["images"]), **settings)
            queued_s, losses = steps.warm_up()
            memory = peak_memory(used_before if on_gpu else None)
            clock = device_clock(backend, queued_s)  # on a GPU it takes memory of its own
            losses += steps.watched(clock)[2]
            answer(memory=memory, losses=losses)
        elif command == "step":
            seconds, losses = steps.timed()
            watched, clean, more = steps.watched(clock)
            operations = [[stage, name, spent] for (stage, name), spent in watched.items()]
            answer(seconds=seconds, operations=operations, clean=clean, losses=losses + more)
        elif command == "finish":
            unwritten, losses = steps.unwritten()
            answer(unwritten=unwritten, losses=losses)
        else:
            raise ValueError(f"unknown command {command!r}")


def peak_memory(gpu_used_before: int | None) -> dict[str, int | None]:
    """Peak of this process; on a GPU also what CuPy's pool holds and what NVML sees added. None: not measured."""
    memory: dict[str, int | None] = {"process_bytes": peak_process_bytes(), "pool_bytes": None, "device_bytes": None}
    if gpu_used_before is not None:
        import cupy

        memory["pool_bytes"] = cupy.get_default_memory_pool().total_bytes()
        memory["device_bytes"] = gpu_used_bytes() - gpu_used_before
    return memory


if __name__ == "__main__":
    main(serve)
