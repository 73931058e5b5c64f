"""The A/A test: one version against itself, many times, on a machine that is busy on purpose.

``python -m bench.experiments.aa_test --out results`` runs ``convbench run --backend v4 --backend v4`` twenty times beside a load
that comes and goes, and counts how often the 95 % interval of the ratio holds 1.0. It should nearly always: two rows of
the same version differ by nothing but noise. One JSON file keeps every run's interval and samples. The exit code is 1
if fewer than 18 of 20 (nine in ten) hold it.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.commands.options import run_script
from bench.machine.devices import child_environment
from bench.machine.environment import describe_environment, usable_cores
from bench.records.run import prepare_folder, read_record, start_time, summarise, write_json
from bench.records.statistics import FEWEST_PAIRS
from versions.registry import find

NEEDED = 0.9


def measure(
    runs: Annotated[int, typer.Option(help="Runs of two rows each.", min=1)] = 20,
    backend: Annotated[str, typer.Option(help="The version.")] = "v4",
    samples: Annotated[int, typer.Option(help="Pictures an epoch.", min=1)] = 64,
    epochs: Annotated[int, typer.Option(help="Timed epochs of each row.", min=FEWEST_PAIRS)] = 10,
    load: Annotated[int, typer.Option(help="Processes that keep a core busy now and then.", min=0)] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for a JSON file of all runs.")] = None,
) -> None:
    """Count how often the interval of a version against itself holds 1."""
    find(backend)
    folder = prepare_folder(out) if out is not None else None
    command = ["run", "--backend", backend, "--backend", backend, "--device", "cpu"]
    command += ["--samples", str(samples), "--epochs", str(epochs), "--quiet"]
    started = start_time()
    found = []
    with _busy(load):
        for number in range(runs):
            found.append(_one_run(command))
            print(f"run {number + 1}: {_words(found[-1])}", flush=True)
    held = sum("failed" not in run and run["interval"][0] <= 1 <= run["interval"][1] for run in found)
    print(f"the interval held 1.0 in {held} of {runs} runs")
    if folder is not None:
        threads = usable_cores()
        document = {
            "schema": "convbench-aa/1",
            "started": started,
            "environment": describe_environment(
                "cpu", threads, ["python", "-m", "bench.experiments.aa_test", *sys.argv[1:]]
            ),
            "config": {"command": ["convbench", *command], "runs": runs, "load": load},
            "held": held,
            "runs": found,
        }
        print(f"results: {write_json(document, folder, f'{started}_aa-test')}")
    if held < math.ceil(NEEDED * runs):
        raise typer.Exit(1)


def _one_run(command: list[str]) -> dict[str, Any]:
    """Run once; the ratio of the second row's speed to the first's, its interval, and the samples, or why it failed."""
    with tempfile.TemporaryDirectory(prefix="convbench-") as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "bench", *command, "--out", scratch],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        files = list((Path(scratch) / "runs").glob("*.json"))
        if done.returncode or len(files) != 1:
            reasons = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
            return {"failed": "; ".join(reasons[-2:])}
        record = read_record(files[0])
    first, second = summarise(record.rows, record.rows[0].backend)
    return {
        "ratio": second.speedup,
        "interval": list(second.interval),
        "epoch_s": [first.row.epoch_s, second.row.epoch_s],
        "order": record.order,
        "warnings": record.warnings,
        "conditions": record.conditions,
    }


def _words(run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"failed: {run['failed']}"
    low, high = run["interval"]
    return f"{run['ratio']:.3f} ({low:.3f} to {high:.3f})"


@contextmanager
def _busy(processes: int):
    """Keep cores busy now and then, as other people's work does."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_bursts, args=(seed,), daemon=True) for seed in range(processes)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.kill()


def _bursts(seed: int) -> None:
    """Compute and sleep in turn, up to two seconds each, for ever."""
    lengths = random.Random(seed)
    while True:
        end = time.perf_counter() + lengths.uniform(0, 2)
        while time.perf_counter() < end:
            json.dumps(list(range(1000)))
        time.sleep(lengths.uniform(0, 2))


if __name__ == "__main__":
    run_script(measure)
