"""The process that one version, or one peer, is verified or timed in.

It reads its task as one JSON line, then commands, a line each, and answers each with one JSON line on the standard
output it was started with; whatever a library prints goes to standard error instead. Thread counts come from the
environment, set before this module is imported.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import cached_property
from time import perf_counter
from typing import Any

import numpy as np

from bench.machine.ceilings import measure_ceilings
from bench.machine.environment import gpu_used_bytes, peak_process_bytes
from bench.machine.timers import undisturbed
from bench.measure import peers
from bench.measure.layer_clock import device_clock
from bench.measure.setup import WorkerTask
from bench.measure.steps import Steps
from bench.views.pictures import SHOWN, strip_png
from common.backend import Backend
from common.network import Network, initial_parameters
from common.training import Trainer
from common.verify import Check, verify
from versions.registry import find


class VersionWorker:
    """One of the suite's versions; its kernels are compiled by the first epoch, and so within that epoch's time."""

    def __init__(self, task: WorkerTask) -> None:
        """Load nothing yet: ceilings are measured without the version's code."""
        self.task = task
        self.on_gpu = task.device == "gpu"
        self.gpu_bytes_before = gpu_used_bytes() if self.on_gpu else 0
        self.peak_bytes = 0

    # Commands -----------------------------------------------------------------------------------------------------

    def ceilings(self) -> dict[str, Any]:
        """What the machine can do, in this task's arithmetic."""
        return asdict(measure_ceilings(self.task.device, self.task.precision, self.task.threads))

    def verify(self) -> dict[str, Any]:
        """How many checks there were, which failed, and the largest error as a share of its tolerance."""
        checks = self.checks()
        return {
            "checks": len(checks),
            "failures": [f"{check.name}: {check.detail}" for check in checks if not check.passed],
            "worst": max((check.worst for check in checks if check.passed), default=0.0),
            "deterministic": self.deterministic,
        }

    def epoch(self) -> dict[str, Any]:
        """Seconds and loss of one epoch, and the memory so far; the first epoch compiles."""
        first = "trainer" not in vars(self)
        seconds = timed_epoch(self.trainer)
        if not self.on_gpu:
            self.peak_bytes = peak_process_bytes()
        elif first:  # later, other versions' processes have memory there too
            self.peak_bytes = gpu_used_bytes() - self.gpu_bytes_before
        return {"seconds": seconds, "loss": self.trainer.read_epoch_loss(), "peak_bytes": self.peak_bytes}

    def pictures(self) -> dict[str, Any]:
        """What the trained network makes of the first pictures."""
        return {"png": strip_png(self.trainer.reconstruct(SHOWN))}

    def start_steps(self) -> dict[str, Any]:
        """Build the network for single steps, compile, and tell the memory."""
        queued_s, losses = self.steps.warm_up()
        memory = self._peak_memory()
        self.clock = device_clock(self.backend, queued_s)  # on a GPU it takes memory of its own
        losses += self.steps.clocked(self.clock)[2]
        return {"memory": memory, "losses": losses}

    def time_step(self) -> dict[str, Any]:
        """Time whole steps with no clock inside, then one step operation by operation."""
        seconds, losses = self.steps.timed()
        operations, clean, more = self.steps.clocked(self.clock)
        return {
            "seconds": seconds,
            "operations": [[*key, spent] for key, spent in operations.items()],
            "clean": clean,
            "losses": losses + more,
        }

    def finish_steps(self) -> dict[str, Any]:
        """Take a step from poisoned outputs, and name those that it did not write."""
        unwritten, losses = self.steps.unwritten()
        return {"unwritten": unwritten, "losses": losses}

    # What they work on --------------------------------------------------------------------------------------------

    @cached_property
    def backend(self) -> Backend:
        """The version, loaded."""
        task = self.task
        return find(task.backend).load(task.device, precision=task.precision, threads=task.threads)

    @property
    def deterministic(self) -> bool | None:
        """Whether the version says that the same step gives the same bits."""
        return self.backend.deterministic

    def checks(self) -> list[Check]:
        """Every check there is."""
        return verify(self.backend, self.task.architecture, batch_sizes=self.task.verified_sizes)

    @cached_property
    def trainer(self) -> Trainer | peers.TorchTrainer:
        """The network in training, with the pictures on the device."""
        task, architecture = self.task, self.task.architecture
        network = Network(self.backend, architecture, task.batch_size, initial_parameters(architecture, task.seed))
        network.poison()
        trainer = Trainer(network, np.load(task.images), learning_rate=task.learning_rate, seed=task.seed)
        self.backend.synchronize()
        return trainer

    @cached_property
    def steps(self) -> Steps:
        """The network in training, step by step."""
        return Steps(self.backend, self.task.architecture, np.load(self.task.images), self.task)

    def _peak_memory(self) -> dict[str, int | None]:
        """Peak of this process; on a GPU also what CuPy's pool holds and what NVML sees added. None: not measured."""
        memory = {"process_bytes": peak_process_bytes(), "pool_bytes": None, "device_bytes": None}
        if self.on_gpu:
            import cupy

            memory["pool_bytes"] = cupy.get_default_memory_pool().total_bytes()
            memory["device_bytes"] = gpu_used_bytes() - self.gpu_bytes_before
        return memory


class PeerWorker(VersionWorker):
    """The network in another library."""

    deterministic = None  # not tested

    @cached_property
    def _form(self) -> peers.TorchForm:
        task = self.task
        return peers.TorchForm(peers.find_peer(task.backend), task.device, task.precision, task.threads)

    def checks(self) -> list[Check]:
        """A whole training step at each size of batch."""
        architecture = self.task.architecture
        return [check for n in self.task.verified_sizes for check in peers.peer_checks(self._form, architecture, n)]

    @cached_property
    def trainer(self) -> peers.TorchTrainer:
        """The network in training, with the pictures on the device."""
        task, architecture = self.task, self.task.architecture
        parameters = initial_parameters(architecture, task.seed)
        trainer = peers.TorchTrainer(self._form, architecture, parameters, learning_rate=task.learning_rate)
        trainer.load(np.load(task.images), batch_size=task.batch_size, seed=task.seed)
        return trainer


COMMANDS = ("ceilings", "verify", "epoch", "pictures", "start_steps", "time_step", "finish_steps")


def timed_epoch(trainer: Trainer | peers.TorchTrainer) -> float:
    """Seconds of one epoch; nothing but the epoch is between the two clock readings."""
    with undisturbed():
        start = perf_counter()
        trainer.run_epoch()
        return perf_counter() - start


def main() -> None:
    """Keep the answer channel, send everything else that is printed to standard error, and serve."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(**fields: Any) -> None:
        channel.write(json.dumps(fields) + "\n")
        channel.flush()

    task = WorkerTask(**json.loads(sys.stdin.readline()))
    try:
        worker = (PeerWorker if task.peer else VersionWorker)(task)
        for line in sys.stdin:
            command = line.strip()
            if command not in COMMANDS:
                raise ValueError(f"unknown command {command!r}: choose from {', '.join(COMMANDS)}")
            answer(**getattr(worker, command)())
    except Exception as error:  # the parent needs the reason, whatever it is; the traceback goes to standard error
        answer(error=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
        raise


if __name__ == "__main__":
    main()
