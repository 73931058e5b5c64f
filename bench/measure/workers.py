"""Worker processes as their parent sees them: started, verified, asked and ended in one way.

Each version runs in a process of its own, so that its first epoch compiles from nothing, its memory is its own, and a
crash costs one row. A worker is spoken to by lines of JSON; ``bench/measure/worker.py`` is its other end.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine.ceilings import Ceilings
from bench.machine.environment import worker_environment
from bench.measure.setup import Setup, WorkerTask
from bench.records.rows import VersionRow

VERIFIED_AT_ONCE = 2
"""Verification is not timed, so two versions are verified at once; nothing runs beside a timed epoch."""

OnProgress = Callable[[str], None]
"""Called with one line of text whenever another activity begins."""


class WorkerError(RuntimeError):
    """A worker ended or answered with an error; the message is the row's reason."""


class WorkerProcess:
    """One worker process."""

    def __init__(self, task: WorkerTask) -> None:
        """Start it in a session of its own, so that Ctrl-C reaches only the parent."""
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=worker_environment(task.threads),
            start_new_session=True,
        )
        self.send(json.dumps(asdict(task)))

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


class Workers:
    """The processes of one measurement, by the id of their row. Leaving the ``with`` block ends them all."""

    def __init__(self, setup: Setup) -> None:
        """Start none yet."""
        self.setup = setup
        self._processes: dict[str, WorkerProcess] = {}

    def __enter__(self) -> Workers:
        """Nothing to prepare."""
        return self

    def __exit__(self, *error: object) -> None:
        """End every process; a second Ctrl-C must not leave any behind."""
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.end_all()
        finally:
            signal.signal(signal.SIGINT, previous)

    def running(self, row: VersionRow) -> bool:
        """Whether the row's process was started and has not failed."""
        return row.id in self._processes

    def start(self, row: VersionRow, images: Path) -> None:
        """Start the process that times a row."""
        self._processes[row.id] = WorkerProcess(self.setup.task(self.setup.by_row[row.id], images))

    def ask(self, row: VersionRow, command: str) -> dict[str, Any]:
        """Send a command to the row's process and wait for its answer; WorkerError if there is none."""
        self._processes[row.id].send(command)
        return self._processes[row.id].receive()

    def fail(self, row: VersionRow, reason: str) -> None:
        """Give the row its reason and end its process."""
        row.reason = reason
        self._processes.pop(row.id).close()

    def end_all(self) -> None:
        """End every process and forget it."""
        for row_id in list(self._processes):
            self._processes.pop(row_id).close()

    def verify(self, rows: Iterable[VersionRow], report: OnProgress) -> dict[str, dict[str, Any] | None]:
        """Verify every version once, ``VERIFIED_AT_ONCE`` in flight, and fill in its rows.

        Returns each version's answer by name: ``checks``, ``failures``, ``worst`` and ``deterministic``; None where the
        process failed.
        """
        infos = {info.name: info for info in self.setup.infos}
        waiting = list(infos.values())
        answers: dict[str, dict[str, Any] | None] = {}
        for name in infos:
            while waiting and len(self._processes) < VERIFIED_AT_ONCE:
                info = waiting.pop(0)
                self._processes[info.name] = WorkerProcess(self.setup.task(info, None))
                self._processes[info.name].send("verify")
            report(f"{name}: verifying")
            try:
                answers[name] = self._processes[name].receive()
                reason = ""
            except WorkerError as error:
                answers[name], reason = None, f"could not be verified: {error}"
            finally:
                self._processes.pop(name).close()
            for row in rows:
                if row.backend == name:
                    _record_verification(row, answers[name], reason)
        return answers

    def measure_ceilings(self, precision: str) -> Ceilings:
        """Measure the ceilings in ``precision``, or in what the first version uses if none uses that.

        In a process of its own; WorkerError if that fails.
        """
        infos = self.setup.infos
        info = next((info for info in infos if self.setup.precision_of(info) == precision), infos[0])
        process = self._processes["ceilings"] = WorkerProcess(self.setup.task(info, None))
        try:
            process.send("ceilings")
            return Ceilings(**process.receive())
        except WorkerError as error:
            raise WorkerError(f"the machine's ceilings could not be measured: {error}") from error
        finally:
            self._processes.pop("ceilings").close()


def _record_verification(row: VersionRow, answer: dict[str, Any] | None, reason: str) -> None:
    if answer is None:
        row.reason = reason
        return
    row.checks = answer["checks"]
    row.deterministic = answer["deterministic"]
    row.verified = not answer["failures"]
    if answer["failures"]:
        more = f" (and {len(answer['failures']) - 1} more)" if len(answer["failures"]) > 1 else ""
        row.reason = f"failed verification: {answer['failures'][0]}{more}"


@contextlib.contextmanager
def images_file(images: np.ndarray) -> Iterator[Path]:
    """The pictures in a file that workers read, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="convbench-") as scratch:
        path = Path(scratch) / "images.npy"
        np.save(path, images)
        yield path
