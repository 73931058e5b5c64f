"""The process that a version is verified or timed in.

It reads its task as one JSON line, then commands, a line each: ``verify``, ``epoch``. It answers each with
one JSON line on the standard output it was started with; whatever a library prints goes to standard error instead.
Thread counts come from the environment, set before this module is imported.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from time import perf_counter
from typing import Any

import numpy as np

from bench.environment import gpu_used_bytes, peak_process_bytes
from common.architecture import autoencoder
from common.backend import Backend
from common.network import Network, initial_parameters
from common.training import Trainer
from common.verify import verify
from versions.registry import find


class Timed:
    """A version in training; its kernels are compiled by the first epoch, and so within that epoch's time."""

    def __init__(self, backend: Backend, task: dict[str, Any]) -> None:
        """Build the network and move the pictures to the device."""
        architecture = autoencoder()
        parameters = initial_parameters(architecture, task["seed"])
        network = Network(backend, architecture, task["batch_size"], parameters)
        images = np.load(task["images"])
        self.trainer = Trainer(network, images, learning_rate=task["learning_rate"], seed=task["seed"])
        self.backend = backend

    def epoch(self) -> tuple[float, float]:
        """Seconds and mean loss of one epoch; nothing but the epoch is between the two clock readings."""
        self.backend.synchronize()
        gc.collect()
        gc.disable()
        try:
            start = perf_counter()
            self.trainer.run_epoch()
            seconds = perf_counter() - start
        finally:
            gc.enable()
        return seconds, self.trainer.read_epoch_loss()


def serve(task: dict[str, Any], commands: Any, answer: Any) -> None:
    """Carry out commands until the end of input."""
    on_gpu = task["device"] == "gpu"
    used_before = gpu_used_bytes() if on_gpu else 0
    backend = find(task["backend"]).load(task["device"], math=task["math"], threads=task["threads"])
    timed: Timed | None = None
    peak = 0
    for line in commands:
        command = line.strip()
        if command == "verify":
            checks = verify(backend, autoencoder(), batch_sizes=task["batch_sizes"])
            failures = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
            answer(
                checks=len(checks),
                failures=failures,
                worst=max((check.worst for check in checks if check.passed), default=0.0),
                deterministic=backend.deterministic,
            )
        elif command == "epoch":
            first = timed is None
            timed = timed or Timed(backend, task)
            seconds, loss = timed.epoch()
            if not on_gpu:
                peak = peak_process_bytes()
            elif first:  # later, other versions' processes have memory there too
                peak = gpu_used_bytes() - used_before
            answer(seconds=seconds, loss=loss, peak_bytes=peak)
        else:
            raise ValueError(f"unknown command {command!r}")


def main() -> None:
    """Keep the answer channel, send everything else that is printed to standard error, and serve."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**fields: Any) -> None:
        channel.write(json.dumps(fields) + "\n")
        channel.flush()

    task = json.loads(sys.stdin.readline())
    try:
        serve(task, sys.stdin, answer)
    except Exception as error:  # the parent needs the reason, whatever it is; the traceback goes to standard error
        answer(error=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
        raise


if __name__ == "__main__":
    main()
