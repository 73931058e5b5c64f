"""Options that several commands share, the checks on them, and how a dataclass of options becomes a command.

Each command has one dataclass: a field is an option, its default the option's default. Typer reads the fields as if
they were the parameters of a function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import numpy as np
import typer

from bench.machine.devices import DeviceStatus, choose_device
from common.backend import PRECISIONS, Precision
from common.device import usable_cores
from common.errors import UsageError
from versions.registry import REGISTRY, BackendInfo, find, names

OptionsT = TypeVar("OptionsT")

Backends = Annotated[list[str] | None, typer.Option("--backend", help="A version, repeatable, or all.", metavar="NAME")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or gpu.", metavar="DEVICE")]
Math = Annotated[str, typer.Option("--math", help="fp32, or tf32 for cuBLAS on a GPU.", metavar="MATH")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; all cores by default.")]
DataDir = Annotated[Path, typer.Option("--data-dir", help="Folder with CIFAR-10's binary files.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for runs/ and charts/.")]
Width = Annotated[float, typer.Option("--width", help="Filters of the inner convolutions, times this: 1/128 to 4.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar and no table.")]


@dataclass(frozen=True, kw_only=True)
class VersionOptions:
    """Which versions run, on what and how: the options that all measuring commands share."""

    backend: Backends = None
    device: Device = "auto"
    math: Math = "fp32"
    threads: Threads = None

    def choose(self, *, repeats: bool = False) -> Choice:
        """Find the versions and the device; UsageError names a wrong value and the valid ones.

        With ``repeats`` a version that is named twice comes twice.
        """
        infos = find_backends(self.backend, repeats=repeats)
        precision = check_precision(self.math)
        threads = check_threads(self.threads)
        return Choice(infos, choose_device(self.device), precision, threads)


@dataclass(frozen=True)
class Choice:
    """The versions, device and arithmetic that ``VersionOptions`` select on this machine."""

    infos: tuple[BackendInfo, ...]
    status: DeviceStatus
    precision: Precision
    threads: int


def options_of(command: Callable[[OptionsT], None], options: type[OptionsT]) -> Callable[..., None]:
    """The function that Typer calls for ``command``: a parameter for each field of the dataclass ``options``."""
    hints = get_type_hints(options, include_extras=True)

    def call(**values: Any) -> None:
        command(options(**values))

    call.__doc__ = command.__doc__
    call.__name__ = command.__name__
    call.__annotations__ = hints
    parameters = []
    for field in fields(options):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name]))
    call.__signature__ = inspect.Signature(parameters)
    return call


def find_backends(backend: list[str] | None, *, repeats: bool = False) -> tuple[BackendInfo, ...]:
    """Find versions by name, in the order asked for; all by default. One named twice counts once unless ``repeats``."""
    asked = backend or ["all"]
    for name in asked:
        if name not in (*names(), "all"):
            raise UsageError(f"unknown backend {name!r}: choose from {', '.join(names())} or all")
    if "all" in asked:
        return REGISTRY
    infos = [find(name) for name in asked]
    return tuple(infos if repeats else dict.fromkeys(infos))


def check_precision(value: str) -> Precision:
    """The arithmetic that ``--math`` names; UsageError for any other."""
    return check_choice("math", value, PRECISIONS)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> Any:
    """The value; UsageError with the valid ones if it is none of them."""
    if value not in choices:
        raise UsageError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")
    return value


def check_learning_rate(value: float | None) -> None:
    """Raise UsageError for a learning rate that is not positive, or that float32 cannot hold."""
    if value is not None and not np.finfo(np.float32).tiny <= value <= np.finfo(np.float32).max:
        raise UsageError(f"learning rate {value}: must be a positive number that float32 can hold")


def check_threads(threads: int | None) -> int:
    """The number of threads to use; UsageError if there are not so many cores."""
    most = usable_cores()
    if threads is not None and not 1 <= threads <= most:
        raise UsageError(f"threads {threads}: choose from 1 to {most}, the cores of this machine")
    return threads or most
