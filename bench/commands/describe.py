"""``convbench describe``: the network, and what a version plans for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console

from bench.commands.console import show
from bench.commands.options import Threads, check_choice, check_threads
from bench.machine.devices import DEVICES
from bench.views import network_tables
from common.architecture import autoencoder
from common.errors import check_number
from versions.registry import find


@dataclass(frozen=True, kw_only=True)
class DescribeOptions:
    """The options of ``convbench describe``."""

    backend: Annotated[str, typer.Option(help="The version whose memory is planned.", metavar="NAME")] = "v1"
    device: Annotated[str, typer.Option(help="cpu or gpu; it need not be here.", metavar="DEVICE")] = "cpu"
    batch_size: Annotated[int, typer.Option(help="Pictures a step.")] = 64
    threads: Threads = None


def describe_command(options: DescribeOptions) -> None:
    """Print the network: shapes, parameters, FLOPs, receptive fields; a version's memory and, on a GPU, its kernels.

    \b
    Examples:
      convbench describe                                 the network; V1's memory
      convbench describe --backend v4 --batch-size 256   V4's, larger batches
      convbench describe --backend v2 --device gpu       and V2's GPU kernels
    """
    info = find(options.backend)
    device = check_choice("device", options.device, DEVICES)
    check_number("batch size", options.batch_size, 1)
    threads = check_threads(options.threads)
    architecture, console = autoencoder(), Console()
    show(network_tables.stages_table(architecture), console)
    show(network_tables.receptive_field_table(architecture), console)
    print()
    show(network_tables.memory_table(architecture, options.batch_size, info, device, threads), console)
    if device == "gpu":
        work = network_tables.work_table(architecture, options.batch_size, info)
        if work is None:
            print(f"{info.label} does not state the work of its kernels.")
        else:
            show(work)
