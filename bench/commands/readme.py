"""``convbench readme``: write the README's chart and table of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def readme_command(
    file: Annotated[
        Path | None, typer.Argument(help="Results file; by default the one that the README names.", metavar="FILE")
    ] = None,
    readme: Annotated[Path, typer.Option(help="The README.")] = Path("README.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if it is stale.")] = False,
) -> None:
    """Write the README's chart and table of results, between its two markers, from a results file."""
    from bench.views.readme import named_file, replace, written

    present, wanted = written(readme, file or named_file(readme))
    if present == wanted:
        print(f"{readme} is up to date")
    elif check:
        print(f"{readme} is stale: write it with convbench readme", file=sys.stderr)
        raise typer.Exit(1)
    else:
        replace(readme, wanted)
        print(f"{readme} is updated")
