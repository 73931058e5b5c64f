"""The A/A test: one version against itself, many times, on a machine with a random background load.

``python -m bench.experiments.aa_test --out results`` runs ``convbench run --backend v4 --backend v4`` twenty times
beside a load that comes and goes. It counts how often the 95 % interval of the ratio contains 1, which it should nearly
always do: two rows of the same version differ only by noise. The exit code is 1 if fewer than nine in ten do.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic.dataclasses import dataclass

from bench.commands.console import run_script
from bench.machine.conditions import ConditionsAround
from bench.machine.devices import child_environment
from bench.machine.environment import Environment, describe_environment
from bench.model import CHECKED, AtLeastOne, Count, Positive
from bench.records.documents import prepare_folder, start_time, write_document
from bench.records.run import read_run, summarise
from bench.records.statistics import FEWEST_PAIRS
from common.device import usable_cores
from versions.registry import find

NEEDED = 0.9  # of the intervals must contain 1


@dataclass(config=CHECKED)
class AaRun:
    """One run: the speed of the second row relative to the first, and the samples of both."""

    ratio: Positive
    interval: tuple[Positive, Positive]
    epoch_s: tuple[list[Positive], list[Positive]]
    order: list[list[str]]
    warnings: list[str]
    conditions: ConditionsAround | None


@dataclass(config=CHECKED)
class FailedAaRun:
    """A run without a result, and the reason."""

    failed: str


@dataclass(config=CHECKED)
class AaSettings:
    """The command of each run, the number of runs, and the number of processes that make the load."""

    command: list[str]
    runs: AtLeastOne
    load: Count


@dataclass(config=CHECKED, kw_only=True)
class AaRecord:
    """The file of an A/A test; ``held`` is the number of intervals that contain 1."""

    schema: Literal["convbench-aa/1"] = "convbench-aa/1"
    started: str
    environment: Environment
    config: AaSettings
    held: Count
    runs: list[AaRun | FailedAaRun]


def run_aa_test(
    runs: Annotated[int, typer.Option(help="Runs of two rows each.", min=1)] = 20,
    backend: Annotated[str, typer.Option(help="The version.")] = "v4",
    samples: Annotated[int, typer.Option(help="Pictures an epoch.", min=1)] = 64,
    epochs: Annotated[int, typer.Option(help="Timed epochs of each row.", min=FEWEST_PAIRS)] = 10,
    load: Annotated[int, typer.Option(help="Background processes that compute and sleep in turn.", min=0)] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for a JSON file of all runs.")] = None,
) -> None:
    """Compare a version with itself and count how often the interval of the ratio contains 1."""
    find(backend)
    folder = prepare_folder(out) if out is not None else None
    command = ["run", "--backend", backend, "--backend", backend, "--device", "cpu"]
    command += ["--samples", str(samples), "--epochs", str(epochs), "--quiet"]
    started, held, found = start_time(), 0, []
    for seed in range(load):
        multiprocessing.get_context("spawn").Process(target=_compute_in_bursts, args=(seed,), daemon=True).start()
    for number in range(1, runs + 1):
        run = _run_once(command)
        found.append(run)
        if isinstance(run, FailedAaRun):
            words = f"failed: {run.failed}"
        else:
            low, high = run.interval
            held += low <= 1 <= high
            words = f"{run.ratio:.3f} ({low:.3f} to {high:.3f})"
        print(f"run {number}: {words}", flush=True)
    print(f"the interval contained 1 in {held} of {runs} runs")
    if folder is not None:
        typed = ["python", "-m", "bench.experiments.aa_test", *sys.argv[1:]]
        record = AaRecord(
            started=started,
            environment=describe_environment("cpu", usable_cores(), typed),
            config=AaSettings(["convbench", *command], runs, load),
            held=held,
            runs=found,
        )
        print(f"results: {write_document(record, folder, f'{started}_aa-test')}")
    if held < NEEDED * runs:
        raise typer.Exit(1)


def _run_once(command: list[str]) -> AaRun | FailedAaRun:
    with tempfile.TemporaryDirectory(prefix="convbench-") as scratch:
        program = [sys.executable, "-m", "bench", *command, "--out", scratch]
        done = subprocess.run(program, env=child_environment(), capture_output=True, text=True, check=False)
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
            return FailedAaRun("; ".join(reasons[-2:]))
        (file,) = Path(scratch).glob("runs/*.json")
        record = read_run(file)
    first, second = summarise(record.rows, record.rows[0].backend)
    return AaRun(
        ratio=second.speedup,
        interval=second.interval,
        epoch_s=(first.row.epoch_s, second.row.epoch_s),
        order=record.order,
        warnings=record.warnings,
        conditions=record.conditions,
    )


def _compute_in_bursts(seed: int) -> None:
    """Compute and sleep in turn, up to two seconds each; a daemon process is killed when the program ends."""
    lengths = random.Random(seed)
    while True:
        end = time.perf_counter() + lengths.uniform(0, 2)
        while time.perf_counter() < end:
            json.dumps(list(range(1000)))
        time.sleep(lengths.uniform(0, 2))


if __name__ == "__main__":
    run_script(run_aa_test)
