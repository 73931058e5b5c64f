"""The tables of a layers file: every operation of a step, the steps side by side, and the memory."""

from __future__ import annotations

from bench.machine.ceilings import Ceilings
from bench.records.layers import LayersRecord, LayerSummary, OperationSummary, summarise_layers
from bench.records.statistics import NOISY_SPREAD
from bench.views.network_tables import BUDGET_BATCH, BUDGET_MB, DOCUMENT_BUDGET_MB
from bench.views.table import NOTHING, Cell, Group, Row, Table, columns, row
from bench.views.words import figure, fine_percent, label_of, megabytes, optional, percent, why_no_time
from common.operations import WHOLE_STEP

ROUNDING = 0.01  # of the step; a larger difference between two sums is stated

# Purposes of the plan, the table's name for each, and the matching parts of the design document's budget.
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
STEP_COLUMNS = ("whole step\nms", "spread", "operations\nms", "overhead\nms", "overhead", "GFLOP/s", "of the\nceiling")


def ceilings_line(ceilings: Ceilings) -> str:
    """The measured ceilings in one line of text."""
    return (
        f"ceilings measured ({ceilings.device}, {ceilings.precision}): GEMM {figure(ceilings.gemm_flop_per_s / 1e9)} "
        f"GFLOP/s, memory {figure(ceilings.memory_bytes_per_s / 1e9)} GB/s"
    )


def operations_table(summary: LayerSummary) -> Table:
    """Every operation of a version's step, then their sum, the overhead and the whole step; fits 100 characters."""
    # One unit for the whole table, so that its times can be compared at a glance.
    unit, scale, digits = ("ms", 1e3, 2) if summary.step_s >= 0.05 else ("µs", 1e6, 1)

    def time(value: float) -> str:
        return f"{scale * value:,.{digits}f}"

    groups: dict[str, list[Row]] = {}
    for line in summary.operations:
        name = line.name if line.stage == WHOLE_STEP else f"{line.stage} {line.name}"
        groups.setdefault(line.stage, []).append(
            row(
                name,
                time(line.seconds),
                _spread(line.spread, noisy=line.noisy),
                optional(line.gflop_per_s),
                optional(line.gb_per_s),
                NOTHING if line.fraction is None else fine_percent(line.fraction),
                line.bound_by or NOTHING,
                fine_percent(line.share),
            )
        )
    blank = [NOTHING] * 4
    share = summary.overhead_s / summary.step_s
    spread = _spread(summary.operations_spread, noisy=summary.operations_spread > NOISY_SPREAD)
    noisy = Cell("noisy", tone="warning") if summary.overhead_noisy else NOTHING
    sums = [
        row("all operations", time(summary.operations_s), spread, *blank, fine_percent(1 - share)),
        row("overhead", time(summary.overhead_s), noisy, *blank, fine_percent(share)),
        row("whole step", time(summary.step_s), *_whole_step(summary), strong=True),
    ]
    headers = [f"time\n{unit}", "spread", "GFLOP/s", "GB/s", "of the\nceiling", "bound\nby", "of the\nstep"]
    caption = f"Operations of {label_of(summary.row)}"
    together = f"{time(summary.medians_s)} {unit}"
    shown = [*map(Group, groups.values()), Group(sums)]
    return Table(caption, columns("operation", headers), shown, _operations_notes(summary, together))


def _whole_step(summary: LayerSummary) -> list[str | Cell]:
    rate = summary.flops / summary.step_s
    fraction = fine_percent(rate / summary.ceilings.gemm_flop_per_s)
    spread = _spread(summary.step_spread, noisy=summary.noisy)
    return [spread, figure(rate / 1e9), NOTHING, fraction, "arithmetic", fine_percent(1)]


def _operations_notes(summary: LayerSummary, together: str) -> list[str]:
    notes = ["Overhead: the whole step, timed with no clock inside, less the operations: launches, Python, waiting."]
    if _above_ceiling(summary.operations):
        notes.append("Above 100 %: a cache held the operands, and the ceiling is the memory's.")
    if abs(summary.medians_s - summary.operations_s) > ROUNDING * summary.step_s:
        notes.append(f"All operations: the median of their sum; because of noise, their medians add up to {together}.")
    if summary.overhead_s < 0:
        notes.append("The overhead is below zero: noise, or the cost of the clocks, is larger than it.")
    return notes


def _above_ceiling(operations: list[OperationSummary]) -> bool:
    return any(line.fraction is not None and line.fraction > 1 for line in operations)


def steps_table(record: LayersRecord) -> Table:
    """The whole step, the operations and the overhead of every version, in milliseconds."""
    found = {summary.row.id: summary for summary in summarise_layers(record)}
    rows = []
    for layer_row in record.rows:
        summary = found.get(layer_row.id)
        if summary is None:
            why = Cell("no time", below=why_no_time(layer_row), tone="bad", span=len(STEP_COLUMNS))
            rows.append(row(label_of(layer_row), why))
            continue
        rate = summary.flops / summary.step_s
        figures = [
            f"{1000 * summary.step_s:,.2f}",
            _spread(summary.step_spread, noisy=summary.noisy),
            f"{1000 * summary.operations_s:,.2f}",
            f"{1000 * summary.overhead_s:,.2f}",
            fine_percent(summary.overhead_s / summary.step_s),
            figure(rate / 1e9),
            fine_percent(rate / summary.ceilings.gemm_flop_per_s),
        ]
        rows.append(row(label_of(layer_row), *figures))
    notes = ["Overhead: the whole step less its operations; where it is below zero, noise is larger than it."]
    return Table("A training step of every version", columns("version", STEP_COLUMNS), [Group(rows)], notes)


def layer_memory_table(record: LayersRecord) -> Table:
    """Bytes planned for every purpose against the design document's budget, and the peaks; a column for each row."""
    at_batch = record.config.batch_size == BUDGET_BATCH
    plans = [row.memory.planned_by_purpose() for row in record.rows]
    planned = []
    for purpose in dict.fromkeys([*BUDGETED, *(purpose for plan in plans for purpose in plan)]):
        name, parts = BUDGETED.get(purpose, (purpose, ()))
        budget = f"{sum(BUDGET_MB[part] for part in parts):,}" if parts and at_batch else NOTHING
        planned.append(row(name, budget, *(megabytes(plan.get(purpose, 0)) for plan in plans)))
    sums = [megabytes(sum(plan.values())) for plan in plans]
    planned.append(row("together", str(DOCUMENT_BUDGET_MB) if at_batch else NOTHING, *sums, strong=True))
    peaks = [
        row(name, NOTHING, *(megabytes(getattr(layer_row.memory.peak, key)) for layer_row in record.rows))
        for key, name in PEAKS.items()
    ]
    budget = (
        f"The budget is the design document's, which gives {DOCUMENT_BUDGET_MB} MB; its parts add up to "
        f"{sum(BUDGET_MB.values())} MB."
        if at_batch
        else f"The design document's budget is for batches of {BUDGET_BATCH} and is not set against other sizes."
    )
    notes = [
        "An activation's memory later holds its gradient, so the two have one sum. Planned is without the pictures.",
        "A process also holds Python, its libraries and the compiler.",
        budget,
    ]
    names = ["budget", *(layer_row.id for layer_row in record.rows)]
    return Table("Memory, MB", columns("purpose", names), [Group(planned, "planned"), Group(peaks, "peak")], notes)


def _spread(share: float, *, noisy: bool) -> Cell:
    return Cell(f"{percent(share)} noisy", tone="warning") if noisy else Cell(percent(share))
