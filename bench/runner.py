"""A run: verify every version, warm each up, then time their epochs in turn.

Each version is verified in one process and timed in another, so that the first epoch it is timed in compiles from
nothing. Verification is not timed, so two versions are verified at once; nothing runs beside a timed epoch. The n-th
epochs of all versions follow one another, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import describe_environment, worker_environment
from bench.records import Row, RunRecord, start_time
from common.backend import Device, Math
from common.dataset import Dataset
from versions.registry import BackendInfo

VERIFIED_AT_ONCE = 2
Report = Callable[[str], None]


@dataclass(frozen=True)
class RunConfig:
    """What was asked for, every default filled in."""

    backends: tuple[BackendInfo, ...]
    device: Device
    math: Math
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    threads: int
    samples: int

    @property
    def batch_sizes(self) -> list[int]:
        """The sizes of batch that an epoch has: the full one, and the last one if that is smaller."""
        sizes = {min(self.batch_size, self.samples), self.samples % self.batch_size}
        return sorted(sizes - {0}, reverse=True)


class WorkerError(RuntimeError):
    """A worker ended or answered with an error; the message is the row's reason."""


class Worker:
    """A version's process, spoken to by lines of JSON."""

    def __init__(self, info: BackendInfo, config: RunConfig, images: Path | None) -> None:
        """Start the process, in a session of its own, so that Ctrl-C reaches only the parent."""
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=worker_environment(config.threads),
            start_new_session=True,
        )
        task = {
            "backend": info.name,
            "device": config.device,
            "math": info.effective_math(config.device, config.math),
            "threads": config.threads,
            "batch_size": config.batch_size,
            "batch_sizes": config.batch_sizes,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "images": str(images) if images else None,
        }
        self.send(json.dumps(task))

    def send(self, line: str) -> None:
        """Ask without waiting."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; receive says why
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the answer; WorkerError with the reason if there is none or it is an error."""
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._why_it_ended())
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:  # it ended in the middle of a line
            raise WorkerError(self._why_it_ended()) from None
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self.send(command)
        return self.receive()

    def close(self) -> None:
        """End the process, by force if it is busy."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):  # something unsent was left for a process that is gone
                stream.close()

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "the process was killed (SIGKILL), most likely for want of memory"
        if code < 0:
            return f"the process crashed ({signal.Signals(-code).name})"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"the process ended with exit code {code}{': ' + lines[-1] if lines else ''}"


def run(config: RunConfig, data: Dataset, command_line: list[str], report: Report) -> RunRecord:
    """Verify and time; returns the record, marked ``interrupted`` with what there is if Ctrl-C ended it.

    ``report`` is told, in a line, what is being done each time that changes: ``total_steps`` times in all.
    """
    rows = [
        Row(
            backend=info.name,
            label=info.label,
            device=config.device,
            layout=info.layout,
            math=info.effective_math(config.device, config.math),
        )
        for info in config.backends
    ]
    record = RunRecord(
        environment=describe_environment(config.device, config.threads, command_line),
        config={
            "data": data.source,
            "data_description": data.description,
            "samples": len(data.images),
            "batch_size": config.batch_size,
            "epochs": config.epochs,
            "learning_rate": config.learning_rate,
            "seed": config.seed,
            "math": config.math,
        },
        rows=rows,
        started=start_time(),
    )
    workers: dict[str, Worker] = {}
    try:
        _verify(config, rows, workers, report)
        with tempfile.TemporaryDirectory(prefix="convbench-") as scratch:
            images = Path(scratch) / "images.npy"
            np.save(images, data.images)
            _time(config, rows, workers, images, report)
    except KeyboardInterrupt:
        record.interrupted = True
        for row in rows:
            if not row.reason and len(row.epoch_s) < config.epochs:
                row.reason = f"interrupted after {len(row.epoch_s)} of {config.epochs} epochs"
    finally:
        # A second Ctrl-C must not leave processes behind, nor cost the record.
        with _sigint_ignored():
            for worker in workers.values():
                worker.close()
    for row in rows:
        if row.epoch_s:
            row.images_per_s = len(data.images) / float(np.median(row.epoch_s))
    return record


@contextlib.contextmanager
def _sigint_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def total_steps(config: RunConfig) -> int:
    """How often ``run`` reports if nothing fails."""
    return len(config.backends) * (2 + config.epochs)


def _verify(config: RunConfig, rows: list[Row], workers: dict[str, Worker], report: Report) -> None:
    """Verify every version, ``VERIFIED_AT_ONCE`` in flight, and fill in the rows."""
    waiting = list(config.backends)
    for info, row in zip(config.backends, rows, strict=True):
        while waiting and len(workers) < VERIFIED_AT_ONCE:
            started = waiting.pop(0)
            workers[started.name] = Worker(started, config, None)
            workers[started.name].send("verify")
        report(f"{info.name}: verifying")
        try:
            answer = workers[info.name].receive()
        except WorkerError as error:
            row.reason = f"could not be verified: {error}"
        else:
            record_verification(row, answer)
        finally:
            workers.pop(info.name).close()


def record_verification(row: Row, answer: dict[str, Any]) -> None:
    """Enter what a worker found into its row."""
    row.checks = answer["checks"]
    row.deterministic = answer["deterministic"]
    row.verified = not answer["failures"]
    if answer["failures"]:
        more = f" (and {len(answer['failures']) - 1} more)" if len(answer["failures"]) > 1 else ""
        row.reason = f"failed verification: {answer['failures'][0]}{more}"


def _time(config: RunConfig, rows: list[Row], workers: dict[str, Worker], images: Path, report: Report) -> None:
    for info, row in zip(config.backends, rows, strict=True):
        if row.verified:
            report(f"{info.name}: first epoch, compiling")
            workers[info.name] = Worker(info, config, images)
            _epoch(row, workers, first=True)
    for epoch in range(config.epochs):
        for row in rows:
            if row.backend in workers:
                report(f"{row.backend}: epoch {epoch + 1} of {config.epochs}")
                _epoch(row, workers)


def _epoch(row: Row, workers: dict[str, Worker], *, first: bool = False) -> None:
    try:
        answer = workers[row.backend].ask("epoch")
        if not math.isfinite(answer["loss"]):
            raise WorkerError(f"the loss is {answer['loss']}: take a smaller learning rate")
    except WorkerError as error:
        row.reason = str(error)
        workers.pop(row.backend).close()
        return
    if first:
        row.first_epoch_s = answer["seconds"]
    else:
        row.epoch_s.append(answer["seconds"])
    row.loss.append(answer["loss"])
    row.peak_bytes = answer["peak_bytes"]
