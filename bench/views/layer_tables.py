"""The tables of a layers file: every operation of a step, the steps side by side, and the memory."""

from __future__ import annotations

from collections import Counter

from bench.machine.ceilings import Ceilings
from bench.records.layers import LayersRecord, LayerSummary, summarise_layers
from bench.records.statistics import NOISY_SPREAD
from bench.views.network_tables import BUDGET_BATCH, BUDGET_MB, DOCUMENT_BUDGET_MB
from bench.views.table import NOTHING, Cell, Group, Row, Table, columns, row
from bench.views.words import figure, fine_percent, label_of, megabytes, optional, percent, why_no_time
from common.operations import WHOLE_STEP

OPERATIONS_NOTES = [
    "All operations: the median of their sum, not the sum of their medians.",
    "Overhead: the whole step, timed with no clock inside, less the operations: launches, Python, waiting. Where it is"
    " below zero, noise is larger than it.",
    "Above 100 % of the memory's ceiling, a cache held the operands.",
]
WHOLE_NOTES = ["Whole: the version has no separate operations there. Its FLOPs are those of its own products."]
PEAKS = {"process_bytes": "process (RSS)", "pool_bytes": "CuPy's pool", "device_bytes": "device (NVML)"}
STEP_COLUMNS = ("whole step\nms", "spread", "operations\nms", "overhead\nms", "overhead", "GFLOP/s", "of the\nceiling")


def ceilings_line(ceilings: Ceilings) -> str:
    """The measured ceilings in one line of text."""
    return (
        f"ceilings measured ({ceilings.device}, {ceilings.precision}): GEMM {figure(ceilings.gemm_flop_per_s / 1e9)} "
        f"GFLOP/s, memory {figure(ceilings.memory_bytes_per_s / 1e9)} GB/s"
    )


def operations_table(summary: LayerSummary) -> Table:
    """Every operation of a version's step, then their sum, the overhead and the whole step; fits 80 characters."""
    # One unit for the whole table, so that its times can be compared at a glance.
    unit, scale, digits = ("ms", 1e3, 2) if summary.step_s >= 0.05 else ("µs", 1e6, 1)

    def time(value: float) -> str:
        return f"{scale * value:,.{digits}f}"

    groups: dict[str, list[Row]] = {}
    for line in summary.operations:
        cells = [
            line.name,
            time(line.seconds),
            _spread(line.spread),
            optional(line.gflop_per_s),
            optional(line.gb_per_s),
            NOTHING if line.fraction is None else fine_percent(line.fraction),
            line.bound_by or NOTHING,
            fine_percent(line.share),
        ]
        groups.setdefault(line.stage, []).append(row(*cells))
    blank = [NOTHING] * 4
    overhead = summary.overhead_s / summary.step_s
    noisy = Cell("noisy", tone="warning") if summary.overhead_noisy else NOTHING
    rate, fraction = _rate(summary)
    whole = [_spread(summary.step_spread), rate, NOTHING, fraction, "arithmetic", fine_percent(1)]
    operations = [_spread(summary.operations_spread), *blank, fine_percent(1 - overhead)]
    sums = [
        row("all operations", time(summary.operations_s), *operations),
        row("overhead", time(summary.overhead_s), noisy, *blank, fine_percent(overhead)),
        row("whole step", time(summary.step_s), *whole, strong=True),
    ]
    headers = [f"time\n{unit}", "spread", "GFLOP/s", "GB/s", "of the\nceiling", "bound\nby", "of the\nstep"]
    caption = f"Operations of {label_of(summary.row)}"
    shown = [Group(rows, "" if stage == WHOLE_STEP else stage) for stage, rows in groups.items()]
    whole = any(line.name.startswith("whole ") for line in summary.operations)
    notes = [*OPERATIONS_NOTES, *WHOLE_NOTES] if whole else OPERATIONS_NOTES
    return Table(caption, columns("operation", headers), [*shown, Group(sums)], notes, tight=True)


def steps_table(record: LayersRecord) -> Table:
    """The whole step, the operations and the overhead of every version, in milliseconds."""
    found = {summary.row.id: summary for summary in summarise_layers(record)}
    rows = []
    for layer_row in record.rows:
        cells = [Cell("no time", below=why_no_time(layer_row), tone="bad", span=len(STEP_COLUMNS))]
        if summary := found.get(layer_row.id):
            cells = [
                f"{1000 * summary.step_s:,.2f}",
                _spread(summary.step_spread),
                f"{1000 * summary.operations_s:,.2f}",
                f"{1000 * summary.overhead_s:,.2f}",
                fine_percent(summary.overhead_s / summary.step_s),
                *_rate(summary),
            ]
        rows.append(row(label_of(layer_row), *cells))
    notes = ["Overhead: the whole step less its operations; where it is below zero, noise is larger than it."]
    return Table("A training step of every version", columns("version", STEP_COLUMNS), [Group(rows)], notes)


def _rate(summary: LayerSummary) -> tuple[str, str]:
    """GFLOP/s of the whole step, and its share of the ceiling."""
    rate = summary.flops / summary.step_s
    return figure(rate / 1e9), fine_percent(rate / summary.ceilings.gemm_flop_per_s)


def _spread(share: float) -> str | Cell:
    return Cell(f"{percent(share)} noisy", tone="warning") if share > NOISY_SPREAD else percent(share)


def layer_memory_table(record: LayersRecord) -> Table:
    """Bytes planned for every purpose against the design document's budget, and the peaks; a column for each row."""
    memories = [layer_row.memory for layer_row in record.rows]
    plans = [Counter() for _ in memories]
    for plan, memory in zip(plans, memories, strict=True):
        for buffer in memory.planned:
            plan[buffer.purpose] += buffer.bytes
    budget, total, note = {}, NOTHING, f"is for batches of {BUDGET_BATCH} and is not set against other sizes."
    if record.config.batch_size == BUDGET_BATCH:
        budget, total = BUDGET_MB, f"{DOCUMENT_BUDGET_MB}"
        note = f"is {DOCUMENT_BUDGET_MB} MB; its parts add up to {sum(BUDGET_MB.values())} MB."
    purposes = dict.fromkeys([*BUDGET_MB, *(purpose for plan in plans for purpose in plan)])
    planned = [
        row(purpose, f"{budget.get(purpose, NOTHING)}", *(megabytes(plan[purpose]) for plan in plans))
        for purpose in purposes
    ]
    planned.append(row("together", total, *(megabytes(plan.total()) for plan in plans), strong=True))
    peaks = [
        row(name, NOTHING, *(megabytes(getattr(memory.peak, key)) for memory in memories))
        for key, name in PEAKS.items()
    ]
    notes = [
        "An activation's memory later holds its gradient, so the two have one sum. Planned is without the pictures.",
        "A process also holds Python, its libraries and the compiler.",
        f"The design document's budget {note}",
    ]
    names = ["budget", *(layer_row.id for layer_row in record.rows)]
    return Table("Memory, MB", columns("purpose", names), [Group(planned, "planned"), Group(peaks, "peak")], notes)
