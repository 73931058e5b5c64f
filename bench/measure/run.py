"""A run: verify every version, warm each up, then time their epochs in turn.

Each version is verified in one process and timed in another, so that the first epoch it is timed in compiles from
nothing. Verification is not timed, so two versions are verified at once; nothing runs beside a timed epoch. The n-th
epochs of all versions follow one another, so that a machine that slows down slows all of them, in an order that is
shuffled each time, so that load that comes and goes favours none. A version that is asked for twice has two rows:
whatever they differ by is noise. What the machine can do at best is measured before the first epoch and after the last;
a row that claims more is not believed.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from bench.machine.ceilings import MARGIN, higher
from bench.machine.conditions import condition_warnings, conditions
from bench.machine.environment import describe_environment, worker_environment
from bench.measure.peers import Peer
from bench.records.run import Row, RunRecord, start_time
from bench.records.statistics import NOISY_SPREAD, spread
from bench.views.pictures import SHOWN, strip_png
from common.architecture import autoencoder
from common.backend import Device, Math
from common.dataset import Dataset
from versions.registry import BackendInfo

VERIFIED_AT_ONCE = 2
CEILING_ATTEMPTS = 5
LOSS_TOLERANCE = {"fp32": 1e-3, "tf32": 5e-2}
"""How far, relatively, the mean losses of an epoch may lie apart."""

Report = Callable[[str], None]
RowT = TypeVar("RowT")


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
    peers: tuple[Peer, ...] = ()
    time_limit_s: float | None = None
    """Seconds from the start after which no further round of epochs is begun; the first one always is."""

    @property
    def contestants(self) -> dict[str, BackendInfo | Peer]:
        """Everything that gets a row, by its row's id; one that comes again is ``v4#2``."""
        counts: dict[str, int] = {}
        contestants: dict[str, BackendInfo | Peer] = {}
        for info in (*self.backends, *self.peers):
            counts[info.name] = counts.get(info.name, 0) + 1
            number = counts[info.name]
            contestants[info.name if number == 1 else f"{info.name}#{number}"] = info
        return contestants

    @property
    def batch_sizes(self) -> list[int]:
        """The sizes of batch that an epoch has: the full one, and the last one if that is smaller."""
        sizes = {min(self.batch_size, self.samples), self.samples % self.batch_size}
        return sorted(sizes - {0}, reverse=True)


class WorkerError(RuntimeError):
    """A worker ended or answered with an error; the message is the row's reason."""


class Worker:
    """A version's process, spoken to by lines of JSON."""

    def __init__(
        self, info: BackendInfo | Peer, config: RunConfig, images: Path | None, module: str = "bench.measure.worker"
    ) -> None:
        """Start ``module`` in a process and a session of its own, so that Ctrl-C reaches only the parent."""
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=worker_environment(config.threads),
            start_new_session=True,
        )
        task = {
            "backend": info.name,
            "peer": isinstance(info, Peer),
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
            id=row_id,
            peer=isinstance(info, Peer),
        )
        for row_id, info in config.contestants.items()
    ]
    environment = describe_environment(config.device, config.threads, command_line)
    record = RunRecord(
        environment=environment,
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
        originals_png=strip_png(data.images[: min(SHOWN, config.batch_size)]),
    )
    workers: dict[str, Worker] = {}
    begun = perf_counter()
    try:
        verify_rows(config, rows, workers, report)
        try:
            record.ceilings = _ceilings(config, record, report)
        except WorkerError as error:
            record.warnings.append(str(error))
        with tempfile.TemporaryDirectory(prefix="convbench-") as scratch:
            images = Path(scratch) / "images.npy"
            np.save(images, data.images)
            _time(config, record, workers, images, report, begun)
        for row in rows:
            if row.id in workers:
                with contextlib.suppress(WorkerError):  # its times stand; only the pictures are missing
                    row.reconstruction_png = workers[row.id].ask("pictures")["png"]
        close_all(workers)
        _judge(config, record, report)
    except KeyboardInterrupt:
        record.interrupted = True
        for row in rows:
            if not row.reason and len(row.epoch_s) < config.epochs:
                row.reason = f"interrupted after {len(row.epoch_s)} of {config.epochs} epochs"
    finally:
        # A second Ctrl-C must not leave processes behind, nor cost the record.
        with sigint_ignored():
            close_all(workers)
    if record.conditions:
        record.warnings += condition_warnings(record.conditions["before"], record.conditions["after"])
    for row in rows:
        if row.epoch_s:
            row.images_per_s = len(data.images) / float(np.median(row.epoch_s))
    noisy = [row.id for row in rows if row.finished and spread(row.epoch_s) > NOISY_SPREAD]
    if noisy:
        record.warnings.append(f"noisy, epochs further apart than a tenth of their median: {', '.join(noisy)}")
    return record


def close_all(workers: dict[str, Worker]) -> None:
    """End every process and forget it."""
    for row_id in list(workers):
        workers.pop(row_id).close()


def _ceilings(config: RunConfig, record: RunRecord, report: Report) -> dict[str, Any]:
    """The faster, one by one, of what was measured so far and what the machine does now."""
    report("measuring what the machine can do")
    # A worker of what uses the math that was asked for, if anything does: only there has TF32 a ceiling of its own.
    infos = list(config.contestants.values())
    info = next((info for info in infos if info.effective_math(config.device, config.math) == config.math), infos[0])
    found = ask_ceilings(info, config)
    return higher(found, record.ceilings) if record.ceilings else found


def ask_ceilings(info: BackendInfo | Peer, config: RunConfig) -> dict[str, Any]:
    """Measure the ceilings in the arithmetic that ``info`` uses, in a process of its own; WorkerError if that fails."""
    worker = Worker(info, config, None)
    try:
        return worker.ask("ceilings")
    except WorkerError as error:
        raise WorkerError(f"the machine's ceilings could not be measured: {error}") from error
    finally:
        worker.close()


def _judge(config: RunConfig, record: RunRecord, report: Report) -> None:
    """Take rows out that cannot be believed: faster, over a whole epoch, than the machine's largest products.

    Other work on the machine can have lowered the ceilings, so they are measured again, and while any row lies above
    them a few times more, before it is accused.
    """
    flops = record.config["samples"] * autoencoder().training_flops
    rates = {row.id: flops / float(np.median(row.epoch_s)) for row in record.rows if row.finished}
    for _ in range(CEILING_ATTEMPTS):
        try:
            record.ceilings = _ceilings(config, record, report)
        except WorkerError as error:
            record.warnings.append(f"no row was held to the ceilings: {error}")
            return
        ceiling = record.ceilings["gemm_flop_per_s"]
        too_fast = [row for row in record.rows if rates.get(row.id, 0) > MARGIN * ceiling]
        if not too_fast:
            return
    for row in too_fast:
        row.reason = f"suspicious: {rates[row.id] / 1e9:,.1f} GFLOP/s, above the measured {ceiling / 1e9:,.1f}"


@contextlib.contextmanager
def sigint_ignored():
    """Let Ctrl-C do nothing inside."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def total_steps(config: RunConfig) -> int:
    """How often ``run`` reports if nothing fails."""
    return 2 + len({info.name for info in config.contestants.values()}) + len(config.contestants) * (1 + config.epochs)


def verify_rows(config: RunConfig, rows: list[Row], workers: dict[str, Worker], report: Report) -> None:
    """Verify every version once, ``VERIFIED_AT_ONCE`` in flight, and fill in all its rows."""
    infos = {info.name: info for info in config.contestants.values()}
    waiting = list(infos.values())
    for name in infos:
        while waiting and len(workers) < VERIFIED_AT_ONCE:
            started = waiting.pop(0)
            workers[started.name] = Worker(started, config, None)
            workers[started.name].send("verify")
        report(f"{name}: verifying")
        mine = [row for row in rows if row.backend == name]
        try:
            answer = workers[name].receive()
        except WorkerError as error:
            for row in mine:
                row.reason = f"could not be verified: {error}"
        else:
            for row in mine:
                record_verification(row, answer)
        finally:
            workers.pop(name).close()


def record_verification(row: Row, answer: dict[str, Any]) -> None:
    """Enter what a worker found into its row."""
    row.checks = answer["checks"]
    row.deterministic = answer["deterministic"]
    row.verified = not answer["failures"]
    if answer["failures"]:
        more = f" (and {len(answer['failures']) - 1} more)" if len(answer["failures"]) > 1 else ""
        row.reason = f"failed verification: {answer['failures'][0]}{more}"


def _time(
    config: RunConfig, record: RunRecord, workers: dict[str, Worker], images: Path, report: Report, begun: float
) -> None:
    rows = record.rows
    for row in rows:
        if row.verified:
            report(f"{row.id}: first epoch, compiling")
            workers[row.id] = Worker(config.contestants[row.id], config, images)
            _epoch(row, workers, first=True)
            _compare_first_loss(row, rows, workers)
    before = conditions(config.device)
    for epoch in range(config.epochs):
        if epoch and config.time_limit_s is not None and perf_counter() - begun > config.time_limit_s:
            record.warnings.append(f"time was up: {epoch} of {config.epochs} epochs")
            break
        record.order.append([])
        for row in shuffled([row for row in rows if row.id in workers]):
            report(f"{row.id}: epoch {epoch + 1} of {config.epochs}")
            _epoch(row, workers)
            record.order[-1].append(row.id)
    record.conditions = {"before": before, "after": conditions(config.device)}
    _compare_losses(rows)


def shuffled(rows: list[RowT]) -> list[RowT]:
    """The rows in an order drawn anew at every call, from the system's entropy.

    That makes either order of two rows as likely, on which ``statistics.ratio_interval`` rests. In an order that is
    fixed, load can keep in step with one row; forth and back, one burst spoils two samples of the row at the turn.
    """
    return random.SystemRandom().sample(rows, len(rows))


def _compare_losses(rows: list[Row]) -> None:
    """Take out every row whose losses, epoch by epoch, are not those of the others in the same arithmetic.

    The first finished row is what the others are held to: it was verified, and a version that leaves work out from its
    second epoch on would be fast and finite.
    """
    for math_used in {row.math for row in rows}:
        finished = [row for row in rows if row.finished and row.math == math_used]
        for row in finished[1:]:
            first = finished[0]
            if (epoch := first_apart(first.loss, row.loss, LOSS_TOLERANCE[math_used])) is not None:
                row.reason = (
                    f"suspicious: loss {row.loss[epoch]:.6g} in epoch {epoch}, {first.id} has {first.loss[epoch]:.6g}"
                )


def first_apart(ours: list[float], theirs: list[float], tolerance: float) -> int | None:
    """Where two courses of losses first lie further apart than the tolerance, relatively, or are no numbers."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if not abs(b - a) <= tolerance * abs(a):
            return place
    return None


def _compare_first_loss(row: Row, rows: list[Row], workers: dict[str, Worker]) -> None:
    """End a peer whose first epoch, which is not timed, did not compute what the versions' did."""
    ours = next((other.loss[0] for other in rows if not other.peer and other.loss and not other.reason), None)
    if not row.peer or ours is None or row.id not in workers:
        return
    if first_apart([ours], row.loss, LOSS_TOLERANCE[row.math]) is not None:
        row.reason = f"failed verification: a first epoch with loss {row.loss[0]:.6g}, the versions' is {ours:.6g}"
        row.verified, row.first_epoch_s = False, None
        workers.pop(row.id).close()


def _epoch(row: Row, workers: dict[str, Worker], *, first: bool = False) -> None:
    try:
        answer = workers[row.id].ask("epoch")
        if math.isnan(answer["loss"]) and first:
            raise WorkerError(
                "suspicious: the first epoch's loss is NaN, as all memory was before it; "
                "if a smaller learning rate does not help, a value was left unwritten"
            )
        if not math.isfinite(answer["loss"]):
            raise WorkerError(f"the loss is {answer['loss']}: take a smaller learning rate")
    except WorkerError as error:
        row.reason = str(error)
        workers.pop(row.id).close()
        return
    if first:
        row.first_epoch_s = answer["seconds"]
    else:
        row.epoch_s.append(answer["seconds"])
    row.loss.append(answer["loss"])
    row.peak_bytes = answer["peak_bytes"]
