"""The process that a version, or a peer, is verified or timed in.

It reads its task as one JSON line, then commands, a line each: ``verify``, ``epoch``, ``pictures`` (what the trained
network makes of the first ones) and ``ceilings`` (what the machine can do; nothing of the version is loaded). It
answers each with one JSON line on the standard output it was started with; whatever a library prints goes to standard
error instead. Thread counts come from the environment, set before this module is imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.ceilings import measure_ceilings
from bench.machine.environment import gpu_used_bytes, peak_process_bytes
from bench.machine.timers import undisturbed
from bench.measure import peers
from bench.views.pictures import SHOWN, strip_png
from common.architecture import autoencoder
from common.network import Network, initial_parameters
from common.training import Trainer
from common.verify import Check, verify
from versions.registry import find


class Version:
    """One of the suite's versions; its kernels are compiled by the first epoch, and so within that epoch's time."""

    def __init__(self, task: dict[str, Any]) -> None:
        """Load its code."""
        self.task = task
        self.backend = find(task["backend"]).load(task["device"], math=task["math"], threads=task["threads"])
        self.deterministic: bool | None = self.backend.deterministic

    def verify(self) -> list[Check]:
        """Every check there is."""
        return verify(self.backend, autoencoder(), batch_sizes=self.task["batch_sizes"])

    def trainer(self) -> Trainer:
        """Build the network and move the pictures to the device."""
        task = self.task
        architecture = autoencoder()
        parameters = initial_parameters(architecture, task["seed"])
        network = Network(self.backend, architecture, task["batch_size"], parameters)
        network.poison()
        images = np.load(task["images"])
        trainer = Trainer(network, images, learning_rate=task["learning_rate"], seed=task["seed"])
        self.backend.synchronize()
        return trainer


class PeerVersion:
    """The network in another library."""

    deterministic: bool | None = None  # not tested

    def __init__(self, task: dict[str, Any]) -> None:
        """Find which."""
        self.task = task
        self.peer = peers.find_peer(task["backend"])
        self.where = {key: task[key] for key in ("device", "math", "threads")}

    def verify(self) -> list[Check]:
        """A whole training step at each size of batch."""
        architecture = autoencoder()
        return [
            check
            for n in self.task["batch_sizes"]
            for check in peers.peer_checks(self.peer, architecture, n, **self.where)
        ]

    def trainer(self) -> peers.TorchTrainer:
        """Build the network and move the pictures to the device."""
        task = self.task
        architecture = autoencoder()
        parameters = initial_parameters(architecture, task["seed"])
        settings = {key: task[key] for key in ("batch_size", "learning_rate", "seed")}
        images = np.load(task["images"])
        return peers.TorchTrainer(self.peer, architecture, parameters, images, **self.where, **settings)


def timed_epoch(trainer: Trainer | peers.TorchTrainer) -> float:
    """Seconds of one epoch; nothing but the epoch is between the two clock readings."""
    with undisturbed():
        start = perf_counter()
        trainer.run_epoch()
        return perf_counter() - start


def serve(task: dict[str, Any], commands: Any, answer: Any) -> None:
    """Carry out commands until the end of input."""
    on_gpu = task["device"] == "gpu"
    used_before = gpu_used_bytes() if on_gpu else 0
    version: Version | PeerVersion | None = None
    trainer: Trainer | peers.TorchTrainer | None = None
    peak = 0
    for line in commands:
        command = line.strip()
        if command == "ceilings":
            answer(**measure_ceilings(task["device"], task["math"], task["threads"]).as_record())
            continue
        version = version or (PeerVersion(task) if task["peer"] else Version(task))
        if command == "verify":
            checks = version.verify()
            answer(
                checks=len(checks),
                failures=[f"{check.name}: {check.detail}" for check in checks if not check.passed],
                worst=max((check.worst for check in checks if check.passed), default=0.0),
                deterministic=version.deterministic,
            )
        elif command == "epoch":
            first = trainer is None
            trainer = trainer or version.trainer()
            seconds = timed_epoch(trainer)
            if not on_gpu:
                peak = peak_process_bytes()
            elif first:  # later, other versions' processes have memory there too
                peak = gpu_used_bytes() - used_before
            answer(seconds=seconds, loss=trainer.read_epoch_loss(), peak_bytes=peak)
        elif command == "pictures":
            answer(png=strip_png(trainer.reconstruct(SHOWN)))
        else:
            raise ValueError(f"unknown command {command!r}")


def main(serve: Callable[[dict[str, Any], Any, Any], None] = serve) -> None:
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
