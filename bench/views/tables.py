"""What the commands print, as rich tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bench.machine.devices import DeviceStatus
from bench.records.layers import planned_buffers
from bench.records.run import RunRecord, Summary, summarise
from common.architecture import Architecture, receptive_fields
from common.backend import Device
from common.network import flat_offsets, parameter_shapes
from common.work import CEILING_BYTES_PER_S, CEILING_FLOP_PER_S, elementwise_work
from versions.registry import BASELINE, REGISTRY, BackendInfo, find

if TYPE_CHECKING:  # only the command that compiles kernels needs it
    from bench.kernels.launches import CompiledKernel, KernelUse

DOCUMENT_FIELDS = "The network's design document differs: it gives 3, 6, 10, 14, 14, 14, 18, 18, 22 in this order."
DOCUMENT_BUDGET_MB = 625

LONGEST_LABEL = 10


def results_table(record: RunRecord) -> Table:
    """One line a version: verified or not, times, speedup; fits 80 columns."""
    config = record.config
    summaries = {summary.row.id: summary for summary in summarise(record.rows, BASELINE)}
    base = next((summary.row.id for summary in summaries.values() if summary.is_baseline), BASELINE)
    title = f"{config['samples']:,} pictures an epoch, batch {config['batch_size']}, on the {record.rows[0].device}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("version", no_wrap=True)
    table.add_column("checks\npassed", no_wrap=True)
    columns = ("1st,\ncompile", "median\nepoch", "spread", "images\nper s", f"over\n{base}", "final\nloss")
    for name in (*columns, "peak\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    if any(summary.interval and not summary.is_baseline for summary in summaries.values()):
        table.caption = f"over {base}: ratio of medians, and its 95 % interval"
        table.caption_justify = "left"
    for row in record.rows:
        label = f"{row.id} {'TF32' if row.math == 'tf32' else row.layout}"
        if len(label) > LONGEST_LABEL:  # on several lines, or it would squeeze the figures
            label = label.replace("-", "-\n")
            if len(label.splitlines()[-1]) > LONGEST_LABEL:
                label = label.replace(" ", "\n")
        verified = f"{row.checks}" if row.verified else "NO"
        summary = summaries.get(row.id)
        if summary is None:
            table.add_row(label, verified, Text("no time", style="bold red"), *["-"] * 6)
            continue
        table.add_row(
            label,
            verified,
            f"{row.first_epoch_s:.1f} s",
            _seconds(summary.median_s),
            f"{100 * summary.spread:.0f} %{chr(10) + 'noisy' if summary.noisy else ''}",
            f"{row.images_per_s:,.0f}",
            _speedup(summary),
            f"{row.loss[-1]:.5f}",
            f"{row.peak_bytes / 1e6:,.0f}",
        )
    return table


def _seconds(value: float) -> str:
    return f"{value:.4g} s" if value >= 0.1 else f"{1000 * value:.4g} ms"


def _speedup(summary: Summary) -> str:
    if summary.speedup is None:
        return "-"
    if summary.is_baseline:
        return "1"
    interval = summary.interval
    return f"{summary.speedup:.3g}" + (f"\n{interval[0]:.3g}-{interval[1]:.3g}" if interval else "")


def versions_table(statuses: list[DeviceStatus]) -> Table:
    """Every version, and on each device whether it can run here."""
    table = Table(box=box.SIMPLE)
    for name in ("version", "idea", "layout", "cpu", "gpu"):
        table.add_column(name)
    cells = ["yes" if status.available else "no" for status in statuses]
    for info in REGISTRY:
        table.add_row(info.name, info.idea, info.layout, *cells)
    return table


def stages_table(architecture: Architecture) -> Table:
    """Shapes, parameters and FLOPs of every stage."""
    table = Table(title="stages, one picture (C x H x W)", title_justify="left", box=box.SIMPLE)
    for name in ("stage", "then", "in", "out"):
        table.add_column(name)
    for name in ("parameters", "forward\nMFLOP", "training\nMFLOP"):
        table.add_column(name, justify="right")
    for i, stage in enumerate(architecture.stages):
        then = {"maxpool": "ReLU, pool", "upsample": "ReLU, up", None: "nothing"}[stage.resample]
        table.add_row(
            stage.name,
            then,
            f"{stage.in_channels}x{stage.height}x{stage.width}",
            f"{stage.out_channels}x{stage.out_height}x{stage.out_width}",
            f"{stage.parameter_count:,}",
            f"{stage.flops / 1e6:,.1f}",
            f"{(2 if i == 0 else 3) * stage.flops / 1e6:,.1f}",
        )
    table.add_section()
    totals = (architecture.parameter_count, architecture.forward_flops / 1e6, architecture.training_flops / 1e6)
    table.add_row("total", "", "", "", f"{totals[0]:,}", f"{totals[1]:,.1f}", f"{totals[2]:,.1f}")
    return table


def receptive_field_table(architecture: Architecture) -> Table:
    """Exact receptive fields, computed."""
    table = Table(title="receptive field, pixels", title_justify="left", box=box.SIMPLE)
    fields = receptive_fields(architecture)
    table.add_column("layer")
    table.add_column("largest", justify="right")
    table.add_column("by position", justify="right")
    for name, sizes in fields:
        by_position = " or ".join(str(size) for size in sorted(sizes)) if len(sizes) > 1 else ""
        table.add_row(name, str(max(sizes)), by_position)
    return table


def memory_table(architecture: Architecture, batch_size: int, info: BackendInfo, device: Device, threads: int) -> Table:
    """Every buffer that a version allocates for training, in the version's layout."""
    title = f"memory of {info.label} on the {device}, batch {batch_size}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in ("buffer", "shape", "purpose"):
        table.add_column(name)
    table.add_column("MB", justify="right")
    plans = planned_buffers(info, architecture, batch_size, device, threads)
    for plan in plans:
        table.add_row(plan.name, " x ".join(map(str, plan.shape)), plan.purpose, f"{plan.bytes / 1e6:,.2f}")
    total = sum(plan.bytes for plan in plans)
    table.add_section()
    table.add_row("total", "", "without pictures", f"{total / 1e6:,.2f}")
    if batch_size == 64:
        table.caption = f"The design document's budget at batch 64 is {DOCUMENT_BUDGET_MB} MB."
        table.caption_justify = "left"
    return table


def work_table(architecture: Architecture, batch_size: int, info: BackendInfo) -> Table | None:
    """What every GPU kernel of a training step has to do and how fast it can be at best; None if that is not stated."""
    work = info.gpu_work(architecture, batch_size)
    if work is None:
        return None
    _, parameters = flat_offsets(parameter_shapes(architecture, info.layout))
    shared = elementwise_work(architecture, batch_size, info.layout, parameters)
    title = f"GPU kernels of {info.label} in a training step, batch {batch_size}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("stage", "operation", "kernel"):
        table.add_column(name, no_wrap=True)
    for name in ("MFLOP", "least\nMB", "asked\nMB", "asked /\nleast", "bound\nµs", "bound by", "shared\n/ FMA"):
        table.add_column(name, justify="right", no_wrap=True)
    for part in (work, shared):
        for row in part:
            asked = row.asked_bytes
            table.add_row(
                row.stage,
                row.operation,
                Text(row.kernel),
                f"{row.flops / 1e6:,.1f}",
                f"{row.least_bytes / 1e6:,.2f}",
                "cuBLAS's" if asked is None else f"{asked / 1e6:,.2f}",
                "" if asked is None else f"{asked / row.least_bytes:,.1f}",
                f"{row.bound_s * 1e6:,.1f}",
                row.bound_by,
                "" if row.shared_loads_per_fma is None else f"{row.shared_loads_per_fma:.3f}",
            )
        table.add_section()
    rows = work + shared
    flops, bound_s = sum(row.flops for row in rows), sum(row.bound_s for row in rows)
    least = sum(row.least_bytes for row in rows)
    table.add_row("step", "", "", f"{flops / 1e6:,.1f}", f"{least / 1e6:,.2f}", "", "", f"{bound_s * 1e6:,.1f}")
    table.caption = (
        f"bound: no card with {CEILING_FLOP_PER_S / 1e12:g} TFLOP/s in float32 and {CEILING_BYTES_PER_S / 1e12:g} TB/s "
        "can be faster; computed, not measured.\n"
        "least: every operand crosses global memory once. asked: what the threads load and store; caches answer the "
        "rest.\nshared / FMA: floats read from shared memory for one multiply-add."
    )
    table.caption_justify = "left"
    return table


LOOP_TARGET = "sm_90"  # the one whose inner loops are shown, where several targets are


def kernels_table(
    uses: list[KernelUse], compiled: Mapping[tuple[int, str], CompiledKernel], targets: list[str]
) -> Table:
    """Registers, occupancy, memory and inner loop of every kernel, and what launches it; fits 132 columns.

    ``compiled`` has what came of ``uses[i]`` for a target under (i, target); what is missing did not compile. One
    target is shown in full, several with registers and occupancy for each.
    """
    from bench.kernels.launches import condensed

    single = len(targets) == 1
    loop_target = LOOP_TARGET if LOOP_TARGET in targets else targets[-1]
    title = f"GPU kernels at batch 64, compiled for {', '.join(targets)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("kernel\n  launched by", max_width=35)
    figures = ["block", "grid"] if single else ["block"]
    figures += ["regs", "stated", "spill\nbytes", "stack\nbytes", "occu-\npancy"] if single else ["regs\nstated"]
    figures += [] if single else [*(f"{target}\nregs occ" for target in targets), "spill\nbytes"]
    figures += ["shared\nbytes", "loop\nFMA", "shared\nloads", "global\nloads", "floats\n/ FMA"]
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    heading = None
    for i in sorted(range(len(uses)), key=lambda i: (len(uses[i].versions) > 1, uses[i].versions)):
        use = uses[i]
        if use.versions != heading:
            table.add_section()
            shared = len(use.versions) > 1
            label = f"shared by {', '.join(use.versions)}" if shared else find(use.versions[0]).label
            table.add_row(Text(label, style="bold"))
            heading = use.versions
        launched_by = Padding(Text(condensed(use.operations), style="dim"), (0, 0, 0, 2))
        cells = [Group(Text(use.name, overflow="fold"), launched_by), _span(use.threads)]
        main = compiled.get((i, loop_target))
        if single:
            cells.append(_span(use.blocks))
            cells += _build_cells(main) if main else [Text("refused", style="bold red"), *["-"] * 4]
        else:
            cells.append(_bound(main) if main else "-")
            of_targets = [compiled.get((i, target)) for target in targets]
            cells += [_target_cell(kernel) for kernel in of_targets]
            spilled = max((kernel.spill_bytes for kernel in of_targets if kernel), default=0)
            cells.append(Text(f"{spilled:,}", style="bold red" if spilled else ""))
        table.add_row(*cells, *(_loop_cells(main) if main else ["-"] * 5))
    of = "" if single else f" on {loop_target}"
    table.caption = (
        "block: threads, grid: blocks. regs: 32-bit registers a thread, under the bound stated. occ: warps at once.\n"
        f"spill: the most on any target. shared bytes: of a block. loop: one turn of the inner loop{of}, in PTX.\n"
        "loads: instructions (floats they load), in that loop. floats / FMA: of both kinds of load."
    )
    table.caption_justify = "left"
    return table


def _span(values: tuple[int, ...]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,}-{values[-1]:,}"


def _bound(kernel: CompiledKernel) -> Text | str:
    return Text("none", style="bold red") if kernel.stated_registers is None else str(kernel.stated_registers)


def _share(occupancy: tuple[float, ...]) -> str:
    shares = sorted({round(100 * share) for share in occupancy})
    return f"{_span(tuple(shares))}%" if shares else "-"


def _target_cell(kernel: CompiledKernel | None) -> Text:
    """Registers and occupancy, or in red what is wrong."""
    if kernel is None:
        return Text("refused", style="bold red")
    for what, size in (("spill", kernel.spill_bytes), ("stack", kernel.stack_bytes)):
        if size:
            return Text(f"{kernel.registers} {what} {size}", style="bold red")
    if kernel.uses_float64:
        return Text(f"{kernel.registers} double", style="bold red")
    return Text(f"{kernel.registers} {_share(kernel.occupancy):>4}")


def _build_cells(kernel: CompiledKernel) -> list[Text | str]:
    """Registers, bound, spills, stack and occupancy."""
    sizes = [Text(str(size), style="bold red" if size else "") for size in (kernel.spill_bytes, kernel.stack_bytes)]
    return [str(kernel.registers), _bound(kernel), *sizes, _share(kernel.occupancy)]


def _loop_cells(kernel: CompiledKernel) -> list[str]:
    """Shared memory, and the inner loop."""
    loop = kernel.loop
    shared = f"{kernel.shared_bytes:,}"
    if loop is None:
        return [shared, *["-"] * 4]
    loads = [
        f"{count} ({floats})" if count else "-"
        for count, floats in ((loop.shared_loads, loop.shared_floats), (loop.global_loads, loop.global_floats))
    ]
    return [shared, str(loop.fma), *loads, f"{(loop.shared_floats + loop.global_floats) / loop.fma:.2f}"]
