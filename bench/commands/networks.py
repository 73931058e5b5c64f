"""What ``train``, ``encode``, ``reconstruct`` and ``probe`` share: a network's settings, pictures, a progress bar."""

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
from bench.commands.options import DataDir, Device, Math, Threads, check_choice, check_precision, check_threads
from bench.machine.devices import choose_device
from bench.machine.environment import worker_environment
from bench.records.training import NetworkSettings
from bench.training.checkpoint import load_checkpoint, load_network
from bench.training.data import load_split
from bench.training.outputs import check_new
from common.architecture import autoencoder
from common.errors import check_number
from common.network import Network
from common.training import Pictures
from versions.registry import find

SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The options of every command that runs a trained network."""

    backend: Annotated[str, typer.Option("--backend", help="The version.", metavar="NAME")] = "v4"
    device: Device = "auto"
    math: Math = "fp32"
    threads: Threads = None
    batch_size: Annotated[int, typer.Option("--batch-size", help="Pictures in a batch.")] = 64
    data: Annotated[str, typer.Option("--data", help="auto, cifar10, photos or a FILE.npy.", metavar="SOURCE")] = "auto"
    data_dir: DataDir = Path("data")
    seed: Annotated[int, typer.Option("--seed", help="Of the photo crops.")] = 0

    def settings(self) -> NetworkSettings:
        """Check the options and choose the device; UsageError names a wrong value and the valid ones."""
        info = find(self.backend)
        precision, threads = check_precision(self.math), check_threads(self.threads)
        check_number("batch size", self.batch_size, 1)
        check_number("seed", self.seed, 0)
        # Libraries read their thread counts from the environment when they are imported.
        os.environ.update(worker_environment(threads))
        device = choose_device(self.device).device
        precision = info.effective_precision(device, precision)
        return NetworkSettings(
            backend=info.name, device=device, precision=precision, threads=threads, batch_size=self.batch_size
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(NetworkOptions):
    """The options of the commands that run one checkpoint on the pictures of a split and write a new file."""

    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint.", metavar="CHECKPOINT")]
    split: Annotated[str | None, typer.Option("--split", help="train or test.", metavar="SPLIT")] = None

    def load(self, out: Path, split: str | None, samples: int | None) -> tuple[Network, Pictures, str]:
        """The network with the checkpoint's parameters, the pictures, and a line that describes them."""
        settings = self.settings()
        check_new(out)
        if split is not None:
            check_choice("split", split, SPLITS)
        architecture = autoencoder()
        parameters = load_checkpoint(self.checkpoint, architecture).parameters
        pictures, description = load_split(self.data, self.data_dir, split, samples, self.seed)
        return load_network(settings, architecture, parameters), pictures, description


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
