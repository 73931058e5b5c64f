"""``convbench describe``: the network, and what a version plans for it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Annotated

import typer
from rich.console import Console

from bench.commands.console import show
from bench.commands.options import Threads, Width, check_choice, check_threads
from bench.kernels.cards import Card, find_card
from bench.machine.devices import DEVICES
from bench.views import network_tables
from bench.views.table import Table
from bench.views.words import network_of
from common.architecture import Architecture, scaled_autoencoder
from common.errors import UsageError, check_number
from versions.registry import BackendInfo, find


@dataclass(frozen=True, kw_only=True)
class DescribeOptions:
    """The options of ``convbench describe``."""

    backend: Annotated[str, typer.Option(help="The version whose memory is planned.", metavar="NAME")] = "v1"
    device: Annotated[str, typer.Option(help="cpu or gpu; it need not be here.", metavar="DEVICE")] = "cpu"
    batch_size: Annotated[int, typer.Option(help="Pictures a step.")] = 64
    width: Width = 1.0
    threads: Threads = None
    card: Annotated[
        str | None, typer.Option(help="For predicted times: T4, A100, H100 or H200 (the default).", metavar="CARD")
    ] = None


def describe_command(options: DescribeOptions) -> None:
    """Print the network: shapes, parameters, FLOPs, receptive fields; a version's memory and, on a GPU, its kernels.

    With ``--device gpu`` it also predicts each kernel's time on one card from its machine code. This needs no GPU.

    \b
    Examples:
      convbench describe                                 the network; V1's memory
      convbench describe --backend v4 --batch-size 256   V4's, larger batches
      convbench describe --width 0.5                     half as many filters
      convbench describe --backend v2 --device gpu       and V2's GPU kernels
      convbench describe --device gpu --card A100        predicted for another card
    """
    info = find(options.backend)
    device = check_choice("device", options.device, DEVICES)
    card = find_card(options.card or "H200")
    if options.card and device != "gpu":
        raise UsageError(f"--card {options.card} predicts GPU kernels: add --device gpu")
    check_number("batch size", options.batch_size, 1)
    threads = check_threads(options.threads)
    architecture, console = scaled_autoencoder(options.width), Console()

    def show_named(table: Table, console: Console | None = None) -> None:
        named = filter(None, [table.caption, network_of(options.width)])
        show(replace(table, caption=", ".join(named)), console)

    show_named(network_tables.stages_table(architecture), console)
    show(network_tables.receptive_field_table(architecture), console)
    print()
    show_named(network_tables.memory_table(architecture, options.batch_size, info, device, threads), console)
    if device == "gpu":
        work = network_tables.work_table(architecture, options.batch_size, info)
        if work is None:
            print(f"{info.label} does not state the work of its kernels.")
        else:
            show_named(work)
            prediction = _predicted(info, options.batch_size, card, architecture)
            if prediction is not None:
                show_named(prediction)


def _predicted(info: BackendInfo, batch_size: int, card: Card, architecture: Architecture) -> Table | None:
    """The table of the predicted times; None, and a line that says what is missing for them, if there are none."""
    from bench.kernels import compiler, linker, predict

    try:
        compiler.check_compilers()
        if linker.disassembler() is None:
            raise UsageError(linker.DISASSEMBLER_HINT)
        print(f"compiling the kernels of {info.name} to predict their times", file=sys.stderr)
        step = predict.predict_version(info, batch_size, card, architecture)
    except (UsageError, compiler.CompileError, MemoryError) as error:
        print(f"no predicted times: {' '.join(str(error).split())}")
        return None
    return network_tables.prediction_table(step, info, batch_size)
