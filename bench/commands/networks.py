"""What ``train``, ``encode``, ``reconstruct`` and ``probe`` share: one version, its place, pictures, a progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskProgressColumn, TimeRemainingColumn

from bench.commands.console import progress
from bench.commands.options import (
    DataDir,
    Device,
    Math,
    Threads,
    check_choice,
    check_precision,
    check_threads,
)
from bench.machine.devices import DeviceStatus, choose_device
from bench.machine.environment import worker_environment
from bench.training.checkpoint import load_checkpoint
from bench.training.data import load_split
from bench.training.settings import NetworkSettings
from common.architecture import autoencoder
from common.backend import Precision
from common.errors import check_number
from common.network import Network
from common.training import Pictures
from versions.registry import BackendInfo, find

DEFAULT_BACKEND = "v4"
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Place:
    """A version, and where and how it runs."""

    info: BackendInfo
    status: DeviceStatus
    precision: Precision
    threads: int


def choose_place(info: BackendInfo, device: str, math: str, threads: int | None) -> Place:
    """Check where the version is to run; UsageError names a wrong value and the valid ones."""
    precision = check_precision(math)
    threads = check_threads(threads)
    # Libraries read their thread counts from the environment when they are imported.
    os.environ.update(worker_environment(threads))
    status = choose_device(device)
    return Place(info, status, info.effective_precision(status.device, precision), threads)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The options of every command that runs a trained network."""

    backend: Annotated[str, typer.Option("--backend", help="The version.", metavar="NAME")] = DEFAULT_BACKEND
    device: Device = "auto"
    math: Math = "fp32"
    threads: Threads = None
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures in a batch.")] = 64
    data: Annotated[str, typer.Option("--data", help="auto, cifar10, photos or a FILE.npy.", metavar="SOURCE")] = "auto"
    data_dir: DataDir = Path("data")
    seed: Annotated[int, typer.Option("--seed", help="Of the photo crops.")] = 0

    def settings(self) -> NetworkSettings:
        """Check the options and choose the device; UsageError names a wrong value and the valid ones."""
        check_number("batch size", self.batch_size, 1)
        check_number("seed", self.seed, 0)
        place = choose_place(find(self.backend), self.device, self.math, self.threads)
        return NetworkSettings(
            backend=place.info,
            device=place.status.device,
            precision=place.precision,
            threads=place.threads,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(NetworkOptions):
    """The options of the commands that run one checkpoint on the pictures of a split."""

    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.", metavar="CHECKPOINT")]
    split: Annotated[str | None, typer.Option("--split", help="train or test.", metavar="SPLIT")] = None

    def load(self, settings: NetworkSettings, split: str | None, samples: int | None) -> tuple[Network, Pictures, str]:
        """The network with the checkpoint's parameters, the pictures, and a line that describes them."""
        if split is not None:
            check_choice("split", split, SPLITS)
        architecture = autoencoder()
        parameters = load_checkpoint(self.checkpoint, architecture).parameters
        pictures, description = load_split(self.data, self.data_dir, split, samples, self.seed)
        return settings.network(architecture, parameters), pictures, description


def terminal_bar(*columns: ProgressColumn, quiet: bool = False) -> Progress:
    """A progress bar on a terminal; none where standard error is a file or a pipe."""
    return progress(*columns, disable=quiet or not Console(stderr=True).is_terminal)


def counted(what: str, total: int, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass parts on and count their pictures on a progress bar."""
    with terminal_bar(TaskProgressColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(what, total=total)
        for part in parts:
            bar.update(task, advance=len(part))
            yield part
