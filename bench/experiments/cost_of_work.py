"""Cost against work: how fast each version trains at several batch sizes and widths of the network.

``python -m bench.experiments.cost_of_work --peer torch`` makes a record as ``convbench run`` does for each batch size
and width, then one table and one chart over all of them. Each version is verified once for each width, with a training
step at each batch size; each record has warm-ups, ceilings and rounds of its own. Epochs are short: a few pictures on a
CPU, and at least one batch. A version is left out of a record if it would take too long, judged by its speed at the
next smaller batch; no such estimate is written down.

Run again, the program keeps the records of the same commit, machine and settings and measures the others. A record with
a failed row counts as measured: delete it to repeat it. If the code has changes, every record is measured anew.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import run_script, show
from bench.commands.options import Out, VersionOptions, check_choice, options_of
from bench.machine.environment import Environment, describe_environment
from bench.measure.peers import find_peers
from bench.measure.run import new_rows, run
from bench.measure.setup import Setup
from bench.measure.workers import Workers
from bench.records.documents import prepare_folder, read_object
from bench.records.run import SCHEMA, RunRecord, RunRow, read_run, write_run
from bench.views.charts import save_charts
from bench.views.cost_views import cost_figure, cost_table
from common.architecture import scaled_autoencoder
from common.dataset import load_pictures
from common.errors import UsageError, check_number

PROGRAM = ["python", "-m", "bench.experiments.cost_of_work"]
BATCHES = (1, 4, 16, 64, 256)
WIDTHS = (0.5, 1.0, 2.0)
PICTURES = {"cpu": 16, "gpu": 8192}
"""Pictures an epoch at width 1; at other widths as many as have about the same FLOPs, in whole batches."""
MOST_TIMES = 64
"""A narrow network gets at most so many times the pictures of width 1: its FLOPs no longer decide."""
SEED = 0
LEFT_OUT = "left out: "
PARTS = ("measure", "draw")


@dataclass(frozen=True, kw_only=True)
class CostOptions(VersionOptions):
    """The options of the experiment."""

    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Pictures a step, repeatable; 1 to 256 in fours by default.")
    ] = None
    width: Annotated[
        list[float] | None, typer.Option("--width", help="Of the network, repeatable; 0.5, 1 and 2 by default.")
    ] = None
    peer: Annotated[
        list[str] | None, typer.Option("--peer", help="Also time the network in: torch.", metavar="NAME")
    ] = None
    epochs: Annotated[int, typer.Option(help="Timed epochs of each record; fewer if its time is up.")] = 6
    time_limit: Annotated[
        float, typer.Option(help="Seconds of a record after which no further round of epochs begins.")
    ] = 120.0
    epoch_limit: Annotated[
        float, typer.Option(help="Seconds: a version whose epoch would take longer is left out.")
    ] = 10.0
    only: Annotated[str | None, typer.Option(help="measure or draw; both by default.", metavar="PART")] = None
    out: Out = Path("results")

    @property
    def batches(self) -> list[int]:
        """The batch sizes, in order."""
        return sorted({*(self.batch or BATCHES)})

    @property
    def widths(self) -> list[float]:
        """The widths, in order."""
        return sorted({*(self.width or WIDTHS)})

    def check(self) -> None:
        """Raise UsageError for a value that no experiment can have."""
        for batch in self.batch or ():
            check_number("batch size", batch, 1)
        for width in self.width or ():
            scaled_autoencoder(width)
        check_number("epochs", self.epochs, 1)
        for name, limit in (("time limit", self.time_limit), ("epoch limit", self.epoch_limit)):
            if not limit > 0:
                raise UsageError(f"{name} {limit}: must be a positive number of seconds")
        if self.only is not None:
            check_choice("part", self.only, PARTS)


def measure_cost_of_work(options: CostOptions) -> None:
    """Measure training speed by batch size and width; table and chart of all records so far."""
    options.check()
    records = measure(options) if options.only != "draw" else []
    if options.only != "measure":
        draw(options.out, records)
    failed = False
    for record in records:
        for row in record.rows:
            if row.reason and not row.reason.startswith(LEFT_OUT):
                failed = True
                print(
                    f"{place(record.config.batch_size, record.config.width)}, {row.id}: {row.reason}", file=sys.stderr
                )
    if failed:
        raise typer.Exit(1)


def pictures_an_epoch(width: float, batch: int, device: str) -> int:
    """Whole batches, at least one, of about the same FLOPs at every width."""
    times = scaled_autoencoder(1).training_flops / scaled_autoencoder(width).training_flops
    return batch * max(1, round(PICTURES[device] * min(times, MOST_TIMES) / batch))


# Measure --------------------------------------------------------------------------------------------------------------


def measure(options: CostOptions) -> list[RunRecord]:
    """Measure every batch size and width that has no record; returns all records that were asked for.

    Ctrl-C ends it with exit code 130; the record in progress is lost, those before it are kept.
    """
    choice = options.choose()
    base = Setup(
        (*choice.infos, *find_peers(options.peer)), choice.status.device, choice.precision, choice.threads, seed=SEED
    )
    runs = prepare_folder(options.out)
    environment = describe_environment(base.device, base.threads, PROGRAM)
    if environment.dirty:
        print("the code has changes: every record is measured anew", file=sys.stderr)
    older = [record for _, record in read_records(runs)]
    asked = []
    for width in options.widths:
        setups = [replace(base, batch_size=batch, width=width) for batch in options.batches]
        kept = [find_record(older, environment, setup, options.epochs) for setup in setups]
        sizes = [setup.batch_size for setup, record in zip(setups, kept, strict=True) if record is None]
        verified = verify(replace(setups[0], verified_sizes=tuple(reversed(sizes)))) if sizes else []
        rates: dict[str, float] = {}
        for setup, record in zip(setups, kept, strict=True):
            how = "kept"
            if record is None:
                record = measure_one(options, setup, verified, rates)
                how = str(write_run(record, runs))
            print(f"{place(setup.batch_size, width)}: {how}", flush=True)
            rates |= {row.id: row.images_per_s for row in record.rows if row.finished}
            asked.append(record)
    return asked


def verify(setup: Setup) -> list[RunRow]:
    """Verify every version and peer of a width at all of its batch sizes; returns rows without times."""
    rows = new_rows(setup)
    with Workers(setup) as workers:
        workers.verify(rows, lambda what: print(f"width {setup.width:.10g}: {what}", file=sys.stderr))
    return rows


def measure_one(options: CostOptions, setup: Setup, verified: list[RunRow], rates: Mapping[str, float]) -> RunRecord:
    """The record of one batch size and width; ``rates`` are pictures a second at the next smaller batch, by row."""
    where = place(setup.batch_size, setup.width)
    samples = pictures_an_epoch(setup.width, setup.batch_size, setup.device)
    rows = left_out(verified, rates, samples, options.epoch_limit)
    words = [*PROGRAM, "--batch", setup.batch_size, "--width", f"{setup.width:.10g}", "--epochs", options.epochs]
    words += [word for name in options.backend or () for word in ("--backend", name)]
    words += [word for name in options.peer or () for word in ("--peer", name)]
    words += ["--device", setup.device, "--math", setup.precision, "--threads", setup.threads]
    record = run(
        setup,
        load_pictures("photos", Path(), samples, SEED),
        options.epochs,
        list(map(str, words)),
        lambda what: print(f"{where}: {what}", file=sys.stderr),
        time_limit_s=options.time_limit,
        verified=rows,
    )
    if record.interrupted:
        raise typer.Exit(130)
    return record


def left_out(verified: Sequence[RunRow], rates: Mapping[str, float], samples: int, limit_s: float) -> list[RunRow]:
    """The rows, with a reason where an epoch of so many pictures would take longer than the limit."""
    reason = f"{LEFT_OUT}at its speed with smaller batches an epoch takes longer than {limit_s:g} s (--epoch-limit)"
    slow = {row_id for row_id, rate in rates.items() if samples > limit_s * rate}
    return [replace(row, reason=row.reason or reason) if row.id in slow else row for row in verified]


def place(batch: int, width: float) -> str:
    """``batch 4, width 0.5``."""
    return f"batch {batch}, width {width:.10g}"


# Records --------------------------------------------------------------------------------------------------------------


def read_records(runs: Path) -> list[tuple[Path, RunRecord]]:
    """The records of this program in a folder, the oldest first."""
    found = []
    for path in runs.glob("*.json"):
        record = read_run(path) if read_object(path)[0] == SCHEMA else None
        if record and record.environment.command_line[: len(PROGRAM)] == PROGRAM:
            found.append((path, record))
    return sorted(found, key=lambda pair: (pair[1].started, pair[0]))


def find_record(records: Sequence[RunRecord], environment: Environment, setup: Setup, epochs: int) -> RunRecord | None:
    """The newest record of this batch size and width with the same code, machine and settings; None if there is none.

    Code that differs from its commit is never the same.
    """
    samples = pictures_an_epoch(setup.width, setup.batch_size, setup.device)
    wanted = (setup.batch_size, setup.width, samples, epochs, setup.seed)
    for record in reversed(records):
        config = record.config
        settings = (config.batch_size, config.width, config.samples, config.epochs, config.seed)
        if not environment.dirty and settings == wanted and _series(record) == _series_of(environment, setup):
            return record
    return None


def draw(out: Path, asked: Sequence[RunRecord] = ()) -> None:
    """Print the table and draw the chart of all records like those asked for, or else like the newest."""
    found = read_records(out / "runs")
    if not found:
        raise UsageError(f"{out / 'runs'} has no record of this program: measure first, without --only draw")
    wanted = _series(asked[-1] if asked else found[-1][1])
    paths, records = zip(*[(path, record) for path, record in found if _series(record) == wanted], strict=True)
    show(cost_table(records))
    rows = [row for record in records for row in record.rows]
    charts = {"cost-of-work": partial(cost_figure, records)} if any(row.finished for row in rows) else {}
    for chart in save_charts(paths[-1], rows, out / "charts", charts):
        print(f"chart: {chart}")


def _series(record: RunRecord) -> tuple:
    """What the records of one table share: commit, machine, arithmetic, device and rows."""
    device, ids = record.rows[0].device, tuple(row.id for row in record.rows)
    return (*_machine(record.environment), record.config.precision, device, ids)


def _series_of(environment: Environment, setup: Setup) -> tuple:
    """``_series`` of a record that this setup will make."""
    return (*_machine(environment), setup.precision, setup.device, tuple(setup.by_row))


def _machine(environment: Environment) -> tuple:
    return environment.commit, environment.dirty, environment.machine_slug, environment.threads


if __name__ == "__main__":
    run_script(options_of(measure_cost_of_work, CostOptions))
