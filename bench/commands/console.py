"""What a person sees of a command: lines, tables, a progress bar; and how it ends.

Bad input ends in one line on standard error and exit code 2; work that could not be finished in exit code 1; Ctrl-C in
130. No user error shows a traceback.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.records.rows import VersionRow
from bench.views.table import Table, to_rich
from common.errors import RunError, UsageError

TABLE_COLUMNS = 132  # of a wide table where there is no terminal


def wide_console(*, quiet: bool = False) -> Console:
    """Standard output; a file or a pipe has no width of its own, and gets that of the wide tables."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(width=TABLE_COLUMNS, quiet=quiet)


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def show(table: Table, console: Console | None = None) -> None:
    """Print a table."""
    (console or wide_console()).print(to_rich(table))


def progress(*columns: ProgressColumn, disable: bool) -> Progress:
    """A progress bar with a description, on standard error; it disappears at the end."""
    shown = columns or (TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn())
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        *shown,
        console=Console(stderr=True),
        disable=disable,
        transient=True,
    )


def reporter(bar: Progress, total: int, *, quiet: bool) -> Callable[[str], None]:
    """Make the function that advances the bar by one with a new description; without a terminal it prints a line."""
    task = bar.add_task("starting", total=total)
    begun = itertools.count()

    def report(what: str) -> None:
        bar.update(task, description=what, completed=next(begun))
        if not bar.console.is_terminal and not quiet:
            say(bar.console, what)

    return report


def end_measurement(rows: Sequence[VersionRow], warnings: Sequence[str], *, interrupted: bool = False) -> None:
    """Say on standard error which rows have no result and what to be careful of; exit code 1 or 130 where due."""
    failed = [row for row in rows if row.reason]
    for row in failed:
        print(f"{row.id}: {row.reason}", file=sys.stderr)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if interrupted:
        raise typer.Exit(130)
    if failed:
        raise typer.Exit(1)


def run_script(function: Callable[..., None]) -> None:
    """Run a function as a command line of its own, ``python -m bench.experiments.something``."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(function)
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command line and end the process; see the top of this file for how."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message, code = _ending(error)
        if message is None:
            raise
        if message:
            print(f"error: {message}".replace("\n", "\\n"), file=sys.stderr)  # a path may hold one
    sys.exit(code or 0)


def _ending(error: Exception) -> tuple[str | None, int]:
    """The line and the exit code that an error ends in; no line (None) for a defect, which keeps its traceback."""
    if isinstance(error, UsageError | RunError):
        return str(error), 2 if isinstance(error, UsageError) else 1
    if isinstance(error, MemoryError):  # CuPy's is one too
        return f"not enough memory ({error}): fewer pictures, or smaller batches, need less", 2
    if isinstance(error, OSError) and error.filename is not None:  # an impossible name, a file that may not be read
        return f"cannot use {error.filename!r}: {error.strerror or error}", 2
    if type(error).__name__ == "Abort":  # Typer's
        return "", 130
    # Typer's parsing errors know their exit code and how to say what was wrong. Without a command there is only the
    # help, already printed, and no message.
    said: Any = getattr(error, "format_message", None)
    return (said(), getattr(error, "exit_code", 2)) if said else (None, 1)
