"""What ``convbench layers`` prints: a step operation by operation; memory as planned, as budgeted and as measured."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from bench.records.layers import BUDGET_BATCH, BUDGET_MB, LayerSummary, figures, planned_by_purpose
from bench.records.statistics import NOISY_SPREAD
from bench.views.tables import DOCUMENT_BUDGET_MB

NOT_MEASURED = "not measured"
ROUNDING = 0.01  # of the step: a sum that is further off than this is told

# Purposes of the plan, what the table calls them, and what the design document's budget does.
BUDGETED = {
    "weights and biases": ("weights", ("weights",)),
    "their gradients": ("weight gradients", ("weight gradients",)),
    "activation, gradient": ("activations, gradients", ("activations", "gradient buffers")),
    "batch of pictures": ("other buffers", ("other buffers",)),
    "workspace": ("workspace", ("im2col workspace",)),
}
PEAKS = {
    "process_bytes": "process (RSS)",
    "pool_bytes": "CuPy's pool",
    "device_bytes": "device (NVML)",
}


def ceilings_line(ceilings: dict[str, Any]) -> str:
    """The measured ceilings in one line of text."""
    memory = max(ceilings["copy_bytes_per_s"], ceilings["read_bytes_per_s"])
    where = f"{ceilings['device']}, {ceilings['math']}"
    return f"ceilings measured ({where}): GEMM {figures(ceilings['gemm_flop_per_s'] / 1e9)} GFLOP/s, memory " + (
        f"{figures(memory / 1e9)} GB/s"
    )


def layers_table(summary: LayerSummary) -> Table:
    """A line an operation, then what they add up to, the overhead, and the whole step; fits 100 columns."""
    table = Table(
        title=summary.row["label"], title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("stage", no_wrap=True)
    table.add_column("operation", no_wrap=True)
    # One unit for the whole table, so that its times can be compared at a glance.
    unit, scale, digits = ("ms", 1e3, 2) if summary.step_s >= 0.05 else ("µs", 1e6, 1)

    def time(seconds: float) -> str:
        return f"{scale * seconds:,.{digits}f}"

    for name in (f"time\n{unit}", "spread", "GFLOP/s", "GB/s", "of the\nceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    table.add_column("of the\nstep", justify="right", no_wrap=True)
    previous = None
    for line in summary.lines:
        if previous not in (None, line.stage):
            table.add_section()
        table.add_row(
            "" if line.stage == previous else line.stage,
            line.name,
            time(line.seconds),
            _spread(line.spread, line.noisy),
            "-" if line.gflop_per_s is None else figures(line.gflop_per_s),
            "-" if line.gb_per_s is None else figures(line.gb_per_s),
            "-" if line.fraction is None else _percent(line.fraction),
            line.bound_by or "-",
            _percent(line.share),
        )
        previous = line.stage
    table.add_section()
    empty = ["-"] * 3
    spread = _spread(summary.operations_spread, summary.operations_spread > NOISY_SPREAD)
    table.add_row("all", "operations", time(summary.operations_s), spread, *empty, "-", _percent(_share(summary)))
    overhead = summary.overhead_s
    spread = Text("noisy", style="yellow") if summary.overhead_noisy else "-"
    table.add_row("", "overhead", time(overhead), spread, *empty, "-", _percent(overhead / summary.step_s))
    rate = figures(summary.flops / summary.step_s / 1e9)
    fraction = _percent(summary.flops / summary.step_s / summary.ceilings.gemm_flop_per_s)
    spread = _spread(summary.step_spread, summary.noisy)
    table.add_row(
        "", "whole step", time(summary.step_s), spread, rate, "-", fraction, "arithmetic", "100.0 %", style="bold"
    )
    table.caption = (
        "overhead: the whole step, timed with no clock inside, less the operations: launches, Python, waiting."
    )
    if any(line.fraction is not None and line.fraction > 1 for line in summary.lines):
        table.caption += "\nAbove 100 %: a cache held the operands, and the ceiling is the memory's."
    if abs(summary.rows_s - summary.operations_s) > ROUNDING * summary.step_s:
        together = f"{time(summary.rows_s)} {unit}"
        table.caption += (
            f"\nThe operations' line is the median of their sum; noise makes their medians add up to {together}."
        )
    if overhead < 0:
        table.caption += "\nIt is below zero: noise, or the clocks' own cost, is larger than it."
    table.caption_justify = "left"
    return table


def layer_memory_table(record: dict[str, Any]) -> Table:
    """Bytes planned for every purpose against the design document's budget, and the peaks; a column a version."""
    batch = record["config"]["batch_size"]
    table = Table(title="memory, MB", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("purpose")
    table.add_column("budget", justify="right", no_wrap=True)
    for row in record["rows"]:
        table.add_column(row["id"], justify="right")
    planned = [planned_by_purpose(row) for row in record["rows"]]
    at_batch = batch == BUDGET_BATCH
    for purpose, (name, parts) in BUDGETED.items():
        budget = f"{sum(BUDGET_MB[part] for part in parts):,}" if at_batch else "-"
        table.add_row(f"planned: {name}", budget, *(_mb(sums.get(purpose, 0)) for sums in planned))
    totals = [_mb(sum(sums.values())) for sums in planned]
    table.add_row("planned: together", str(DOCUMENT_BUDGET_MB) if at_batch else "-", *totals, style="bold")
    table.add_section()
    for key, name in PEAKS.items():
        table.add_row(f"peak: {name}", "-", *(_mb(row["memory"]["peak"][key]) for row in record["rows"]))
    added_up = sum(BUDGET_MB.values())
    table.caption = (
        "An activation's memory later holds its gradient, so the two have one sum. Planned is without the pictures.\n"
        "A process holds Python, its libraries and the compiler too.\n"
    ) + (
        f"The budget is the design document's, which gives {DOCUMENT_BUDGET_MB}; its parts add up to {added_up}."
        if at_batch
        else f"The design document's budget is for batch {BUDGET_BATCH}."
    )
    table.caption_justify = "left"
    return table


def _share(summary: LayerSummary) -> float:
    return summary.operations_s / summary.step_s


def _percent(share: float) -> str:
    return f"{100 * share:,.1f} %"


def _spread(share: float, noisy: bool) -> Text:
    return Text(f"{100 * share:,.0f} %{' noisy' if noisy else ''}", style="yellow" if noisy else "")


def _mb(size: int | None) -> str:
    return NOT_MEASURED if size is None else f"{size / 1e6:,.1f}"
