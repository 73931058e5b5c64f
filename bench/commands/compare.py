"""``convbench compare``: judge every row that two results files share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.console import say, show, wide_console


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The two files, the criteria, and what makes the command fail."""

    old: Annotated[Path, typer.Argument(help="A file of run, layers or pytest-benchmark.", metavar="OLD")]
    new: Annotated[Path, typer.Argument(help="A file of the same kind.", metavar="NEW")]
    alpha: Annotated[float, typer.Option(help="Largest chance of one false alarm in the whole comparison.")] = 0.05
    effect: Annotated[float, typer.Option(help="Least difference of medians that counts; 0.05 is 5 %.")] = 0.05
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Compare although this differs: machine, gpu, threads, data, math.", metavar="WHAT"),
    ] = None
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 1 if any row is: slower, unclear, missing.", metavar="WHAT"),
    ] = None


def compare_command(options: CompareOptions) -> None:
    """Judge each row that two results files share: SAME, FASTER, SLOWER or UNCLEAR.

    The criteria are a Mann-Whitney U test with Holm's correction for the
    number of rows, a least effect, and a bootstrap interval. The exit code
    is 1 if a row meets a --fail-on condition.

    \b
    Examples:
      convbench compare old.json new.json
      convbench compare old.json new.json --fail-on slower --fail-on missing
      convbench compare old.json new.json --effect 0.1 --allow machine
    """
    from bench.records.compare import compare_files  # with their checked models, these are slow to import
    from bench.views.compare_tables import comparison_lines, comparison_table

    fail_on = options.fail_on or []
    found = compare_files(
        options.old,
        options.new,
        alpha=options.alpha,
        effect=options.effect,
        allow=options.allow or [],
        fail_on=fail_on,
    )
    console = wide_console()
    show(comparison_table(found), console)
    for line in comparison_lines(found):
        say(console, line)
    failed = {what: rows for what in dict.fromkeys(fail_on) if (rows := found.failing(what))}
    for what, rows in failed.items():
        print(f"{what}: {', '.join(rows)}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)
