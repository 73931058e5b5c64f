"""What the commands share: options and their checks, a progress bar, a console as wide as its tables."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bench.machine.devices import DeviceStatus, choose_device
from common.device import usable_cores
from common.errors import RunError, UsageError
from versions.registry import REGISTRY, BackendInfo, find, names

MATHS = ("fp32", "tf32")
TABLE_COLUMNS = 132  # of a wide table where there is no terminal

Backends = Annotated[list[str] | None, typer.Option("--backend", help="A version, repeatable, or all.", metavar="NAME")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or gpu.", metavar="DEVICE")]
MathOption = Annotated[str, typer.Option("--math", help="fp32, or tf32 for cuBLAS on a GPU.", metavar="MATH")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; all cores by default.")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder with CIFAR-10's binary files.")]


def choose(
    backend: list[str] | None, device: str, math: str, threads: int | None, *, again: bool = False
) -> tuple[tuple[BackendInfo, ...], DeviceStatus, int]:
    """Resolve the options that say what runs where."""
    infos = find_backends(backend, again=again)
    if math not in MATHS:
        raise UsageError(f"unknown math {math!r}: choose from {', '.join(MATHS)}")
    threads = check_threads(threads)
    return infos, choose_device(device), threads


def check_learning_rate(value: float | None) -> None:
    """Raise UsageError for a learning rate that is not positive, or that float32 cannot hold."""
    if value is not None and not np.finfo(np.float32).tiny <= value <= np.finfo(np.float32).max:
        raise UsageError(f"learning rate {value}: must be a positive number that float32 can hold")


def find_backends(backend: list[str] | None, *, again: bool = False) -> tuple[BackendInfo, ...]:
    """Versions by name, in the order asked for; all by default; one that comes again counts once unless ``again``."""
    asked = backend or ["all"]
    for name in asked:
        if name not in (*names(), "all"):
            raise UsageError(f"unknown backend {name!r}: choose from {', '.join(names())} or all")
    if "all" in asked:
        return REGISTRY
    infos = [find(name) for name in asked]
    return tuple(infos if again else dict.fromkeys(infos))


def progress(*, disable: bool) -> Progress:
    """A bar on standard error that says what is being done, and goes when it is."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=disable,
        transient=True,
    )


def reporter(bar: Progress, total: int, *, quiet: bool) -> Callable[[str], None]:
    """What moves the bar on by one and says what is being done, in lines where there is no terminal."""
    task = bar.add_task("starting", total=total)
    begun = itertools.count()

    def report(what: str) -> None:
        bar.update(task, description=what, completed=next(begun))
        if not bar.console.is_terminal and not quiet:
            bar.console.print(what, highlight=False)

    return report


def wide_console(*, quiet: bool = False) -> Console:
    """Standard output; a file or a pipe has no width of its own, and gets that of the wide tables."""
    console = Console(quiet=quiet)
    return console if console.is_terminal else Console(width=TABLE_COLUMNS, quiet=quiet)


def check_threads(threads: int | None) -> int:
    """The number of threads to use; UsageError if there are not so many cores."""
    most = usable_cores()
    if threads is not None and not 1 <= threads <= most:
        raise UsageError(f"threads {threads}: choose from 1 to {most}, the cores of this machine")
    return threads or most


def run_script(function: Callable[..., None]) -> None:
    """Run a function as a command line of its own, ``python -m bench.something``."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(function)
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command line; every bad request becomes one line on standard error and exit code 2. Ends the process."""
    try:
        code = app(standalone_mode=False)
    except (UsageError, RunError) as error:
        message = str(error).replace("\n", "\\n")  # a path may hold one, and the error is one line
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except MemoryError as error:  # CuPy's is one too
        print(f"error: not enough memory ({error}): fewer pictures, or smaller batches, need less", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if (
            isinstance(error, OSError) and error.filename is not None
        ):  # a name that cannot be, a file that may not be read
            print(f"error: cannot use {error.filename!r}: {error.strerror or error}", file=sys.stderr)
            sys.exit(2)
        # Typer's own parsing errors know their exit code and how to say what was wrong; anything else is a defect.
        message = getattr(error, "format_message", None)
        if message is None:
            if type(error).__name__ == "Abort":
                sys.exit(130)
            raise
        if message():  # without a command there is only the help, already printed
            print(f"error: {message()}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code or 0)
