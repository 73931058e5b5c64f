"""``convbench report``: write one page from results files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    files: Annotated[list[Path], typer.Argument(help="Files of run, layers and kernels.", metavar="FILE...")],
    out: Annotated[Path, typer.Option(help="The page, .html; never written over another file.", metavar="PAGE.html")],
    force: Annotated[bool, typer.Option("--force", help="Write over an older page.")] = False,
) -> None:
    """Write one self-contained HTML page from results files."""
    from bench.views.page import write_report

    print(f"page: {write_report(files, out, force=force)}")
