"""``convbench layers``: every operation of a training step against the machine's measured ceilings, and the memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import end_measurement, progress, reporter, say, show, wide_console
from bench.commands.options import Out, Quiet, VersionOptions
from bench.measure.layers import BATCHES, measure_layers
from bench.measure.setup import Setup
from bench.measure.workers import WorkerError
from bench.records.documents import prepare_folder
from bench.records.layers import LayersRecord, summarise_layers, write_layers
from bench.views.layer_tables import ceilings_line, layer_memory_table, operations_table
from common.dataset import photo_crops
from common.errors import RunError, check_number

ROUNDS = {"cpu": 8, "gpu": 20}  # enough for a difference between two files to show


@dataclass(frozen=True, kw_only=True)
class LayersOptions(VersionOptions):
    """The options of ``convbench layers``."""

    batch_size: Annotated[int, typer.Option(help="Pictures a step.")] = 64
    rounds: Annotated[int | None, typer.Option(help="Steps timed in turn; 8 on a CPU, 20 on a GPU.")] = None
    seed: Annotated[int, typer.Option(help="Of the weights, the order and the photo crops.")] = 0
    out: Out = Path("results")
    quiet: Quiet = False


def layers_command(options: LayersOptions) -> None:
    """Take the training step apart: every operation's time against the measured ceilings, and the memory."""
    check_number("batch size", options.batch_size, 1)
    check_number("rounds", options.rounds, 1)
    check_number("seed", options.seed, 0)
    choice = options.choose(repeats=True)
    device, batch_size = choice.status.device, options.batch_size
    setup = Setup(
        infos=choice.infos,
        device=device,
        precision=choice.precision,
        threads=choice.threads,
        batch_size=batch_size,
        verified_sizes=(batch_size,),
        seed=options.seed,
    )
    rounds = options.rounds or ROUNDS[device]
    images = photo_crops(BATCHES * batch_size, options.seed)
    runs = prepare_folder(options.out)

    console = wide_console(quiet=options.quiet)
    steps = f"{rounds} rounds of steps of {batch_size}"
    say(console, f"device: {device} ({choice.status.name}), {choice.threads} threads; {steps}")
    with progress(disable=options.quiet) as bar:
        report = reporter(bar, setup.messages(rounds), quiet=options.quiet)
        try:
            record = measure_layers(setup, images, rounds, ["convbench", *sys.argv[1:]], report)
        except WorkerError as error:
            raise RunError(str(error)) from error
    _show(record, write_layers(record, runs), options)
    end_measurement(record.rows, record.warnings)


def _show(record: LayersRecord, path: Path, options: LayersOptions) -> None:
    """Print the tables, draw the charts, and say where everything is."""
    console = wide_console(quiet=options.quiet)
    summaries = summarise_layers(record)
    for summary in summaries:
        show(operations_table(summary), console)
    for ceilings in (record.ceilings, *record.other_ceilings):
        say(console, ceilings_line(ceilings))
    show(layer_memory_table(record), console)
    say(console, f"results: {path}")
    if summaries:
        from bench.views.layer_charts import draw_layer_charts  # matplotlib is slow to import

        for chart in draw_layer_charts(path, options.out / "charts"):
            say(console, f"chart: {chart}")
