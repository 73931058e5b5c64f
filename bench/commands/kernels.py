"""``convbench kernels``: every GPU kernel, compiled without a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bench.commands.console import progress, show
from bench.commands.options import Backends, find_backends
from bench.records.documents import prepare_folder
from bench.records.kernels import write_kernels
from bench.views.kernel_tables import kernel_tables


@dataclass(frozen=True, kw_only=True)
class KernelsOptions:
    """The options of ``convbench kernels``."""

    backend: Backends = None
    target: Annotated[str, typer.Option(help="sm_75, sm_80, sm_90a, sm_100 or all.", metavar="TARGET")] = "all"
    out: Annotated[Path | None, typer.Option(help="Folder for runs/: also write a file.")] = None


def kernels_command(options: KernelsOptions) -> None:
    """Compile every GPU kernel without a GPU: registers, spills, occupancy and loops of each.

    For sm_90a each kernel is linked as a launch on an H100 or H200 does it, and its machine code is read.

    Exit code 1 if a kernel breaks a rule, is refused by a compiler, or is never launched.

    \b
    Examples:
      convbench kernels                                all versions and targets
      convbench kernels --backend v2 --target sm_90a   V2 for one target
      convbench kernels --out results                  also a file in results/runs
    """
    from bench.kernels import compiler, launches, linker
    from bench.kernels.targets import LINKED, find_targets, target_name

    infos = find_backends(options.backend)
    targets = find_targets(options.target)
    compiler.check_compilers()
    runs = prepare_folder(options.out) if options.out else None
    uses = launches.kernel_uses(infos)
    quiet = not sys.stderr.isatty()
    if quiet:
        print(f"compiling {len(uses)} kernels for {', '.join(map(target_name, targets))}", file=sys.stderr)
    with progress(disable=quiet) as bar:
        task = bar.add_task("compiling", total=len(uses) * len(targets))

        def report(kernel: str) -> None:
            bar.update(task, description=f"compiling {escape(kernel)}", advance=1)

        faults = launches.uncovered_kernels(infos)
        record = compiler.compile_record(uses, targets, faults, ["convbench", *sys.argv[1:]], report)
    for table in kernel_tables(record):
        show(table)
    if LINKED in targets and linker.disassembler() is None:
        print(linker.DISASSEMBLER_HINT, file=sys.stderr)
    if runs:
        print(f"results: {write_kernels(record, runs)}")
    for fault in record.faults:
        print(f"fault: {fault}", file=sys.stderr)
    if record.faults:
        raise typer.Exit(1)
