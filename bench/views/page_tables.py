"""The report's tables: plain data that the template turns into HTML, with every figure already in words.

A row begins with its header. What a file does not have is said to be not measured; nothing is left blank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.records.layers import BUDGET_BATCH, BUDGET_MB, LayerSummary, is_finished, planned_by_purpose
from bench.records.run import RunRecord, summarise
from bench.views.charts import row_label
from bench.views.layer_charts import layer_label
from bench.views.layer_tables import BUDGETED, PEAKS
from bench.views.page_words import MATH_WORDS, percent, ratio, reason
from bench.views.tables import DOCUMENT_BUDGET_MB, LOOP_TARGET
from versions.registry import BASELINE

NOT_MEASURED = "not measured"
NOTHING = "–"  # noqa: RUF001  where there is nothing to measure


@dataclass(frozen=True)
class Cell:
    """One cell, ``number`` if it is set to the right, ``bad`` if it is a fault, over ``span`` columns."""

    text: str
    number: bool = True
    bad: bool = False
    span: int = 1
    below: str = ""
    """A second, smaller line."""


@dataclass(frozen=True)
class TableRow:
    """A header and its cells; ``below`` is the header's second, smaller line."""

    header: str
    cells: list[Cell]
    below: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Group:
    """Rows that belong together, under a heading where there is one."""

    rows: list[TableRow]
    heading: str = ""


@dataclass(frozen=True)
class Table:
    """A caption, the columns' headers (the rows' own first) and groups of rows."""

    caption: str
    columns: list[str]
    groups: list[Group]
    words: bool = False
    """Whether its cells are texts rather than figures."""
    notes: list[str] = field(default_factory=list)


def _unit(name: str, unit: str) -> str:
    """A column's header with its unit, which stays beside the last word."""
    return f"{name},\u00a0{unit}"


def _cells(values: Iterable[str | Cell], *, number: bool = True) -> list[Cell]:
    return [value if isinstance(value, Cell) else Cell(value, number=number) for value in values]


# A run --------------------------------------------------------------------------------------------------------------


def results_table(record: RunRecord) -> Table:
    """Every row of a run, also those that have no time."""
    summaries = {summary.row.id: summary for summary in summarise(record.rows, BASELINE)}
    base = next((row_label(summary.row) for summary in summaries.values() if summary.is_baseline), None)
    columns = ["version", "checks passed", _unit("first epoch", "s"), _unit("median epoch", "s"), "spread"]
    columns += ["pictures a\u00a0second", "speedup", "final loss", _unit("peak", "MB"), "same bits twice"]
    rows = []
    for row in record.rows:
        checks = Cell(f"{row.checks}") if row.verified else Cell("no", bad=True)
        same = ("yes" if row.deterministic else "no") if isinstance(row.deterministic, bool) else "not tested"
        summary = summaries.get(row.id)
        if summary is None:
            why = Cell(f"no time: {reason(row)}", number=False, bad=True, span=len(columns) - 3)
            rows.append(TableRow(row_label(row), [checks, why, Cell(same)]))
            continue
        noisy = "noisy" if summary.noisy else ""
        figures = [
            f"{row.first_epoch_s:,.3g}" if row.first_epoch_s < 1000 else f"{row.first_epoch_s:,.0f}",
            _figures(summary.median_s),
            Cell(percent(summary.spread), below=noisy),
            _figures(row.images_per_s),
            _speedup(summary),
            f"{row.loss[-1]:.5g}",
            f"{row.peak_bytes / 1e6:,.0f}",
        ]
        strong = summary.median_s == min(other.median_s for other in summaries.values())
        rows.append(TableRow(row_label(row), [checks, *_cells(figures), Cell(same)], strong=strong))
    maths = list(dict.fromkeys(MATH_WORDS.get(row.math, row.math) for row in record.rows))
    notes = [f"All in {maths[0]}."] if len(maths) == 1 else []
    notes += ["First epoch: the warm-up in a fresh process, compilation included; it is in no other figure."]
    notes.append("Spread: range of the epochs as a share of their median; noisy above a tenth.")
    if base is not None:
        notes.append(f"Speedup: the median epoch of {base} over the row's; below it, the 95 % interval of the ratio.")
    notes.append("Peak: on a CPU the largest resident set of the process, on a GPU the device memory that it added.")
    return Table("Every row of the run", columns, [Group(rows)], notes=notes)


def _speedup(summary: Any) -> Cell:
    if summary.speedup is None:
        return Cell("not compared", below="other arithmetic" if summary.baseline is None else "")
    if summary.is_baseline:
        return Cell("1", below="baseline")
    interval = summary.interval
    below = f"{ratio(interval[0])} to {ratio(interval[1])}" if interval else "too few epochs"
    return Cell(ratio(summary.speedup), below=below)


def _figures(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# Layers -------------------------------------------------------------------------------------------------------------


def steps_table(record: dict[str, Any], summaries: list[LayerSummary]) -> Table:
    """A version a row: whole step, operations, overhead."""
    columns = ["version", _unit("whole step", "ms"), "spread", _unit("operations", "ms"), _unit("overhead", "ms")]
    columns += ["overhead", "GFLOP/s"]
    columns += ["of the ceiling"]
    found = {summary.row["id"]: summary for summary in summaries}
    rows = []
    for row in record["rows"]:
        summary = found.get(row["id"])
        if summary is None:
            why = row["reason"].rstrip(".") or ("it was not verified" if not row["verified"] else "no step was timed")
            cell = Cell(f"no time: {why}", number=False, bad=True, span=len(columns) - 1)
            rows.append(TableRow(layer_label(row), [cell]))
            continue
        rate = summary.flops / summary.step_s
        figures = [
            _ms(summary.step_s),
            Cell(percent(summary.step_spread), below="noisy" if summary.noisy else ""),
            _ms(summary.operations_s),
            _ms(summary.overhead_s),
            _per_cent(summary.overhead_s / summary.step_s),
            _figures(rate / 1e9),
            _per_cent(rate / summary.ceilings.gemm_flop_per_s),
        ]
        rows.append(TableRow(layer_label(row), _cells(figures)))
    notes = [
        "Overhead is the whole step, timed with no clock inside, less the operations: launches, Python, waiting."
        " Below zero, noise is larger than it."
    ]
    return Table("A training step of every version", columns, [Group(rows)], notes=notes)


def operations_table(summary: LayerSummary) -> Table:
    """Every operation of a version's step, the overhead and the whole."""
    # One unit for the whole table, so that its times can be compared at a glance.
    unit, scale, digits = ("ms", 1e3, 2) if summary.step_s >= 0.05 else ("µs", 1e6, 1)

    def time(value: float) -> str:
        return f"{scale * value:,.{digits}f}"

    columns = ["operation", f"time, {unit}", "spread", "GFLOP/s", "GB/s", "of the ceiling", "bound by", "of the step"]
    groups: dict[str, list[TableRow]] = {}
    for line in summary.lines:
        figures = [
            time(line.seconds),
            Cell(percent(line.spread), below="noisy" if line.noisy else ""),
            NOTHING if line.gflop_per_s is None else _figures(line.gflop_per_s),
            NOTHING if line.gb_per_s is None else _figures(line.gb_per_s),
            NOTHING if line.fraction is None else _per_cent(line.fraction),
            line.bound_by or NOTHING,
            _per_cent(line.share),
        ]
        stage = "" if line.direction == "other" else line.stage
        groups.setdefault(line.stage, []).append(TableRow(f"{stage} {line.name}".strip(), _cells(figures)))
    blank = [NOTHING] * 5
    share = summary.overhead_s / summary.step_s
    rate = summary.flops / summary.step_s
    fraction = _per_cent(rate / summary.ceilings.gemm_flop_per_s)
    whole = [time(summary.step_s), percent(summary.step_spread), _figures(rate / 1e9), NOTHING, fraction, "arithmetic"]
    sums = [
        TableRow("all operations", _cells([time(summary.operations_s), *blank, _per_cent(1 - share)])),
        TableRow("overhead", _cells([time(summary.overhead_s), *blank, _per_cent(share)])),
        TableRow("whole step", _cells([*whole, "100 %"]), strong=True),
    ]
    caption = f"Operations of {layer_label(summary.row)}"
    return Table(caption, columns, [*map(Group, groups.values()), Group(sums)])


def memory_table(record: dict[str, Any]) -> Table:
    """Bytes planned for every purpose against the design document's budget, and the peaks."""
    at_batch = record["config"]["batch_size"] == BUDGET_BATCH
    rows = record["rows"]
    planned = [planned_by_purpose(row) for row in rows]
    purposes = dict.fromkeys([*BUDGETED, *(purpose for sums in planned for purpose in sums)])
    lines = []
    for purpose in purposes:
        name, parts = BUDGETED.get(purpose, (purpose, ()))
        budget = f"{sum(BUDGET_MB[part] for part in parts):,}" if parts and at_batch else NOTHING
        figures = [budget, *(_mb(sums.get(purpose, 0)) for sums in planned)]
        lines.append(TableRow(name, _cells(figures)))
    whole = [f"{DOCUMENT_BUDGET_MB}" if at_batch else NOTHING, *(_mb(sum(sums.values())) for sums in planned)]
    lines.append(TableRow("together", _cells(whole), strong=True))
    peaks = [
        TableRow(name, _cells([NOTHING, *(_mb(row["memory"]["peak"][key]) for row in rows)]))
        for key, name in PEAKS.items()
    ]
    notes = [
        "An activation's memory later holds its gradient, so the two have one sum. A process holds Python, its"
        " libraries and the compiler too; pictures come on top of what is planned."
    ]
    if at_batch:
        added_up = sum(BUDGET_MB.values())
        notes.append(
            f"The budget is the design document's for batch {BUDGET_BATCH}: it gives {DOCUMENT_BUDGET_MB} as the sum of"
            f" parts that add up to {added_up}."
        )
    else:
        notes.append(
            f"The design document's budget is for batches of {BUDGET_BATCH} and is not set against other sizes."
        )
    columns = ["purpose", "budget", *(layer_label(row) for row in rows)]
    return Table("Memory, MB", columns, [Group(lines, "planned"), Group(peaks, "peak, measured")], notes=notes)


def buffers_table(row: dict[str, Any]) -> Table:
    """Every buffer that a version plans."""
    lines = [
        TableRow(buffer["name"], [Cell(_shape(buffer["shape"])), Cell(buffer["purpose"], number=False),
                                  Cell(f"{buffer['bytes'] / 1e6:,.2f}")])
        for buffer in row["memory"]["planned"]
    ]  # fmt: skip
    columns = ["buffer", "shape", "purpose", "MB"]
    return Table(f"Buffers of {layer_label(row)}", columns, [Group(lines)])


def finished_layers(record: dict[str, Any]) -> bool:
    """Whether any row has times to draw."""
    return any(is_finished(row) for row in record["rows"])


def _ms(value: float) -> str:
    return f"{1000 * value:,.2f}" if abs(value) >= 0.01 else f"{1000 * value:,.3f}"


def _per_cent(share: float) -> str:
    return f"{100 * share:,.1f} %"


def _mb(size: int | None) -> str:
    return NOT_MEASURED if size is None else f"{size / 1e6:,.1f}"


def _shape(shape: Iterable[int]) -> str:
    return " x ".join(f"{side:,}" for side in shape)


# Kernels ------------------------------------------------------------------------------------------------------------


def kernel_tables(record: dict[str, Any]) -> list[Table]:
    """One target in full, and where there are several, registers and occupancy for each."""
    targets = record["config"]["targets"]
    main = LOOP_TARGET if LOOP_TARGET in targets else targets[-1]
    tables = [_full_table(record, main)]
    if len(targets) > 1:
        tables.append(_targets_table(record, targets))
    return tables


def kernel_sentence(record: dict[str, Any]) -> str:
    """How many kernels there are, and whether any breaks a rule."""
    rows = record["rows"]
    kernels = len({_kernel_key(row) for row in rows})
    targets = ", ".join(record["config"]["targets"])
    built = [row for row in rows if not row["refused"]]
    spilling = len({_kernel_key(row) for row in built if row["spill_bytes"] or row["stack_bytes"]})
    most = max((row["registers"] for row in built), default=0)
    spills = f"{spilling} of them spill or keep arrays in memory" if spilling else "none spills"
    refused = len(rows) - len(built)
    refusals = f" {refused} compilations were refused." if refused else ""
    return (
        f"{kernels} kernels, at batch {record['config']['batch_size']}, were compiled for {targets}: {spills}, and the"
        f" largest takes {most} registers a thread.{refusals} Nothing here is a speed."
    )


def _full_table(record: dict[str, Any], target: str) -> Table:
    from bench.kernels.launches import condensed

    columns = ["kernel", "threads", "blocks", "registers", "stated", "spill, bytes", "stack, bytes", "occupancy"]
    columns += ["shared, bytes", "FMA", "shared loads", "global loads", "floats a FMA"]
    groups: dict[str, list[TableRow]] = {}
    for row in sorted(record["rows"], key=lambda row: (len(row["versions"]) > 1, row["versions"])):
        if row["target"] != target:
            continue
        where = [(" ".join(stage.split()), " ".join(operation.split())) for stage, operation in row["operations"]]
        size = [_span(row["threads"]), _span(row["blocks"])]
        if row["refused"]:
            cells = [*size, Cell("refused by the compiler", number=False, bad=True, span=len(columns) - 3)]
        else:
            stated = row["stated_registers"]
            over = stated is not None and row["registers"] > stated
            cells = [
                *size,
                Cell(f"{row['registers']}", bad=over),
                Cell("none", bad=True) if stated is None else f"{stated}",
                *(Cell(f"{row[key]:,}", bad=row[key] > 0) for key in ("spill_bytes", "stack_bytes")),
                _occupancy(row),
                f"{row['shared_bytes']:,}",
                *_loop_cells(row["loop"]),
            ]
        header = row["name"] + (" (double precision)" if row.get("uses_float64") else "")
        groups.setdefault(_owners(row), []).append(TableRow(header, _cells(cells), below=condensed(where)))
    notes = [
        "Registers and spills are a thread's, shared memory a block's. Stated: the bound that the kernel declares."
        " Occupancy: warps that can run at once, as a share of the most. FMA, loads and the floats they load (in"
        " parentheses) are those of one turn of the inner loop, in PTX."
    ]
    return Table(
        f"Kernels as compiled for {target}", columns, [Group(rows, name) for name, rows in groups.items()], notes=notes
    )


def _targets_table(record: dict[str, Any], targets: list[str]) -> Table:
    found: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in sorted(record["rows"], key=lambda row: (len(row["versions"]) > 1, row["versions"])):
        found.setdefault(_kernel_key(row), {})[row["target"]] = row
    groups: dict[str, list[TableRow]] = {}
    for of_targets in found.values():
        first = next(iter(of_targets.values()))
        cells = [_target_cell(of_targets.get(target)) for target in targets]
        groups.setdefault(_owners(first), []).append(TableRow(first["name"], cells))
    return Table(
        "Registers and occupancy for every target",
        ["kernel", *targets],
        [Group(rows, name) for name, rows in groups.items()],
    )


def _target_cell(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell(NOTHING)
    if row["refused"]:
        return Cell("refused", bad=True)
    bad = next((f"{name} {row[key]:,}" for key, name in (("spill_bytes", "spills"), ("stack_bytes", "stack"))
                if row[key]), "")  # fmt: skip
    return Cell(f"{row['registers']}", below=bad or _occupancy(row), bad=bool(bad))


def _kernel_key(row: dict[str, Any]) -> tuple:
    return (row["name"], tuple(row["versions"]), tuple(map(tuple, row["operations"])))


def _owners(row: dict[str, Any]) -> str:
    versions = row["versions"]
    return versions[0] if len(versions) == 1 else f"shared by {', '.join(versions)}"


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _occupancy(row: dict[str, Any]) -> str:
    shares = [round(100 * share) for share in row["occupancy"]]
    return f"{_span(shares)} %" if shares else NOTHING


def _loop_cells(loop: Mapping[str, int] | None) -> list[str]:
    if loop is None:
        return [NOTHING] * 4
    loads = [
        f"{loop[f'{kind}_loads']} ({loop[f'{kind}_floats']})" if loop[f"{kind}_loads"] else NOTHING
        for kind in ("shared", "global")
    ]
    return [f"{loop['fma']}", *loads, f"{(loop['shared_floats'] + loop['global_floats']) / loop['fma']:.2f}"]


# What a figure was measured on and with ------------------------------------------------------------------------------

WORDS = {
    "cpu": "processor",
    "memory_bytes": "memory",
    "cuda": "CUDA",
    "python": "Python",
    "gpu": "GPU",
    "numba_opt": "LLVM level for Numba",
    "dirty": "code differs from the commit",
    "cpu_busy_share": "share of the cores that were busy",
    "cpu_mhz": "processor's clock, MHz",
    "load_1_min": "load average over a minute",
    "samples": "pictures an epoch",
    "batch_size": "batch size",
    "math": "arithmetic asked for",
    "gemm_flop_per_s": "matrix product",
    "copy_bytes_per_s": "copy",
    "read_bytes_per_s": "read",
    "cache_bytes": "last cache",
    "sm_clock_mhz": "multiprocessors' clock, MHz",
    "memory_clock_mhz": "memory clock, MHz",
    "temperature_c": "temperature, °C",
    "power_w": "power, W",
    "used_bytes": "memory in use",
}
DEEPEST = 3


def side_by_side(caption: str, named: Mapping[str, Mapping[str, Any]], absent: str = "not recorded") -> Table:
    """Mappings as columns, their keys as rows, mappings within them under headings of their own."""
    flat = {name: _flattened(mapping) for name, mapping in named.items()}
    keys = dict.fromkeys(key for column in flat.values() for key in column)
    headings: dict[str, list[TableRow]] = {}
    for key in keys:
        heading = ", ".join(_word(part) for part in key[:-1])
        cells = [Cell(column.get(key, absent), number=False) for column in flat.values()]
        headings.setdefault(heading, []).append(TableRow(_word(key[-1]), cells))
    groups = [Group(rows, heading) for heading, rows in headings.items()]
    used = any(key not in column for column in flat.values() for key in keys)
    notes = [f"{NOTHING}: not something that the command is told."] if used and absent == NOTHING else []
    return Table(caption, ["", *named], groups, words=True, notes=notes)


def _flattened(mapping: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for key, value in mapping.items():
        here = (*path, str(key))
        if isinstance(value, Mapping) and value and len(here) < DEEPEST:
            found |= _flattened(value, here)
        else:
            found[here] = _value(here[-1], value)
    return found


def _word(key: str) -> str:
    return WORDS.get(key, key.replace("_", " "))


def _value(key: str, value: Any) -> str:
    """A recorded value in words; the unit is in the key's name."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if key.endswith("_flop_per_s"):
            return f"{value / 1e9:,.4g} GFLOP/s"
        if key.endswith("_bytes_per_s"):
            return f"{value / 1e9:,.4g} GB/s"
        if key.endswith("_bytes"):
            return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
        if key.endswith("_share"):
            return f"{100 * value:,.0f} %"
        return f"{value}" if key == "seed" else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
