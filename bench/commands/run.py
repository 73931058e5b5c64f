"""``convbench run``: verify every version, time its epochs, write one results file and its charts."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import end_measurement, progress, reporter, say, show, wide_console
from bench.commands.options import (
    DataDir,
    Out,
    Quiet,
    VersionOptions,
    Width,
    check_choice,
    check_learning_rate,
)
from bench.measure.peers import find_peers
from bench.measure.run import run
from bench.measure.setup import Setup, epoch_batch_sizes
from bench.records.documents import prepare_folder
from bench.records.run import RunRecord, write_run
from bench.views.run_tables import results_table
from common.architecture import scaled_autoencoder
from common.dataset import SOURCES, load_pictures
from common.errors import UsageError, check_number

DEFAULT_SAMPLES = {"cpu": 128, "gpu": 50_000}
DEFAULT_EPOCHS = 6  # enough for an interval, and for a difference between two files of seven rows to show
FULL_EPOCH = 50_000


@dataclass(frozen=True, kw_only=True)
class RunOptions(VersionOptions):
    """The options of ``convbench run``."""

    epochs: Annotated[int, typer.Option(help="Timed epochs.")] = DEFAULT_EPOCHS
    samples: Annotated[int | None, typer.Option(help="Pictures an epoch; 128 on a CPU, 50,000 on a GPU.")] = None
    batch_size: Annotated[int, typer.Option(help="Pictures a step.")] = 64
    width: Width = 1.0
    learning_rate: Annotated[float, typer.Option(help="Of plain SGD.")] = 0.001
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the photo crops.")] = 0
    data: Annotated[str, typer.Option(help="auto, cifar10 or photos.", metavar="SOURCE")] = "auto"
    data_dir: DataDir = Path("data")
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which no further round of epochs begins; one always runs.")
    ] = None
    peer: Annotated[
        list[str] | None, typer.Option("--peer", help="Also time the network in: torch.", metavar="NAME")
    ] = None
    out: Out = Path("results")
    quiet: Quiet = False


def run_command(options: RunOptions) -> None:
    """Verify every version, time its epochs, write one results file and the charts.

    \b
    Examples:
      convbench run                               all versions that can run here
      convbench run --backend v1 --backend v4     two of them
      convbench run --peer torch                  beside PyTorch
      convbench run --data cifar10 --samples 50000
      convbench run --backend v4 --backend v4     twice, to see the noise
    """
    _check(options)
    peers = find_peers(options.peer)
    choice = options.choose(repeats=True)
    device = choice.status.device
    samples = options.samples or DEFAULT_SAMPLES[device]
    setup = Setup(
        infos=(*choice.infos, *peers),
        device=device,
        precision=choice.precision,
        threads=choice.threads,
        batch_size=options.batch_size,
        verified_sizes=epoch_batch_sizes(samples, options.batch_size),
        learning_rate=options.learning_rate,
        seed=options.seed,
        width=options.width,
    )
    pictures = load_pictures(options.data, options.data_dir, samples, options.seed)
    runs = prepare_folder(options.out)

    console = wide_console(quiet=options.quiet)
    say(console, f"data: {pictures.description}")
    part = "the full epoch" if samples == FULL_EPOCH else f"--samples {FULL_EPOCH} is the full epoch"
    epochs = f"{options.epochs} epochs of {samples:,} pictures after one warm-up ({part})"
    say(console, f"device: {device} ({choice.status.name}), {choice.threads} threads; {epochs}")
    with progress(disable=options.quiet) as bar:
        report = reporter(bar, setup.messages(options.epochs), quiet=options.quiet)
        command = ["convbench", *sys.argv[1:]]
        record = run(setup, pictures, options.epochs, command, report, time_limit_s=options.time_limit)
    _show(record, write_run(record, runs), options)
    end_measurement(record.rows, record.warnings, interrupted=record.interrupted)


def _check(options: RunOptions) -> None:
    """Raise UsageError for a value that no run can have."""
    check_choice("data source", options.data, SOURCES)
    check_learning_rate(options.learning_rate)
    scaled_autoencoder(options.width)
    check_number("seed", options.seed, 0)
    for name, value in (
        ("epochs", options.epochs),
        ("samples", options.samples),
        ("batch size", options.batch_size),
    ):
        check_number(name, value, 1)
    if options.time_limit is not None and not options.time_limit > 0:
        raise UsageError(f"time limit {options.time_limit}: must be a positive number of seconds")


def _show(record: RunRecord, path: Path, options: RunOptions) -> None:
    """Print the table, draw the charts, and say where everything is."""
    console = wide_console(quiet=options.quiet)
    show(results_table(record), console)
    if options.math == "tf32" and not any(row.precision == "tf32" for row in record.rows):
        say(console, "--math tf32 changed nothing here: only cuBLAS on a GPU has it.")
    say(console, f"results: {path}")
    if any(row.finished for row in record.rows):
        from bench.views.charts import draw_charts  # matplotlib is slow to import

        for chart in draw_charts(path, options.out / "charts"):
            say(console, f"chart: {chart}")
