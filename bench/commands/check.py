"""``convbench check``: verify versions against the float64 reference, without timing them."""

from __future__ import annotations

import typer

from bench.commands.console import progress, reporter, say, wide_console
from bench.commands.options import VersionOptions
from bench.measure.setup import Setup
from bench.measure.workers import Workers
from bench.records.rows import VersionRow

CHECKED_BATCH = 64  # the whole step that is verified; ``run`` verifies the sizes it will time


def check_command(options: VersionOptions) -> None:
    """Verify versions against the float64 reference, without timing them."""
    choice = options.choose()
    device = choice.status.device
    setup = Setup(choice.infos, device, choice.precision, choice.threads, verified_sizes=(CHECKED_BATCH,))
    rows = [VersionRow(**setup.row_fields(row_id)) for row_id in setup.by_row]
    with progress(disable=False) as bar, Workers(setup) as workers:
        answers = workers.verify(rows, reporter(bar, len(rows), quiet=True))
    console = wide_console()
    for row in rows:
        answer = answers[row.backend]
        if answer is None:
            say(console, f"{row.label}: {row.reason}")
        elif row.verified:
            largest = f"largest error {answer['worst']:.2f} of the tolerance"
            if row.error_factor != 1:
                largest += f", which is {row.error_factor:.1f} times that of a direct sum"
            say(console, f"{row.label} on the {device}: {row.checks} checks passed, {largest}")
        else:
            console.print(f"{row.label} on the {device}: FAILED", style="bold red", highlight=False)
            for failure in answer["failures"]:
                say(console, f"  {failure}")
    if not all(row.verified for row in rows):
        raise typer.Exit(1)
