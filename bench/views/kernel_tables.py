"""The tables of a kernels file: registers, memory, occupancy and inner loop of every kernel, and what launches it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bench.records.kernels import KernelResources, KernelRow, KernelsRecord, LoopCounts
from bench.views.table import NOTHING, Cell, Column, Group, Row, Table, columns, row
from bench.views.words import span
from common.operations import WHOLE_STEP, Operation
from versions.registry import REGISTRY

MAIN_TARGET = "sm_90"
"""The target that is shown in full, where there are several."""
NAME_WIDTH = 34  # characters of a kernel's name on a terminal; the figures need the others of the 132
LABELS = {info.name: info.label for info in REGISTRY}


def kernel_tables(record: KernelsRecord) -> list[Table]:
    """One target in full, and if there are several, registers and occupancy for each; fits 132 characters."""
    targets = record.config.targets
    main = MAIN_TARGET if MAIN_TARGET in targets else targets[-1]
    tables = [_full_table(record, main)]
    if len(targets) > 1:
        tables.append(_targets_table(record))
    return tables


def kernel_summary(record: KernelsRecord) -> str:
    """How many kernels were compiled, for which targets, and whether any spills or was refused."""
    kernels = len({_key(line) for line in record.rows})
    spilling = {_key(line) for line in record.rows if line.resources and _memory_fault(line.resources)}
    spills = f"{len(spilling)} of them spill or keep arrays in memory" if spilling else "none spills"
    refused = sum(line.resources is None for line in record.rows)
    refusals = f" Refused compilations: {refused}." if refused else ""
    return (
        f"{kernels} kernels, at batch {record.config.batch_size}, were compiled for "
        f"{', '.join(record.config.targets)}: {spills}.{refusals}"
    )


def condensed(operations: Iterable[tuple[str, Operation]]) -> str:
    """Say (stage, operation) pairs in few words: ``forward conv1-4, backward data conv5``."""
    stages: dict[Operation, list[str]] = {}
    for stage, operation in operations:
        stages.setdefault(operation, []).append("" if stage == WHOLE_STEP else stage)
    return ", ".join(f"{operation.words} {_runs(names)}".strip() for operation, names in stages.items())


def _runs(names: Iterable[str]) -> str:
    """conv1, conv2, conv3 and conv5 as ``conv1-3,5``."""
    numbered: dict[str, list[list[int]]] = {}
    for name in sorted(filter(None, names), key=_natural):
        prefix, number = _natural(name)
        runs = numbered.setdefault(prefix, [])
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(prefix + ",".join(map(_run, runs)) for prefix, runs in numbered.items())


def _natural(name: str) -> tuple[str, int]:
    """The letters and the number of a name; -2, which no run goes on from, if it has no number."""
    prefix, digits = re.fullmatch(r"(.*?)(\d*)", name).groups()
    return prefix, int(digits or -2)


def _run(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    if last < 0:
        return ""
    return str(first) if first == last else f"{first}-{last}"


# One target in full ---------------------------------------------------------------------------------------------------


def _full_table(record: KernelsRecord, target: str) -> Table:
    headers = ["threads\na block", "blocks", "registers\na thread", "stated", "spill\nbytes", "stack\nbytes"]
    headers += ["occupancy", "shared\nbytes", "FMA", "shared\nloads", "global\nloads", "floats\nan FMA"]
    shown = [Column("kernel, and what launches it", text=True, fold=NAME_WIDTH), *columns("", headers)[1:]]
    of_target = [line for line in record.rows if line.target == target]
    notes = [
        "Stated: the largest number of registers that the kernel may use. Occupancy: the warps that can run at once, as"
        " a share of the most; computed. Shared bytes: the shared memory of a block.",
        "FMA and loads: instructions in one turn of the inner loop, in PTX; in parentheses the floats that they load."
        " Floats an FMA: those of both kinds of load.",
    ]
    caption = f"GPU kernels at batch {record.config.batch_size}, compiled for {target}"
    return Table(caption, shown, _groups([(line, _full_row(line)) for line in of_target]), notes, tight=True)


def _full_row(line: KernelRow) -> Row:
    resources = line.resources
    precision = " (double precision)" if resources and resources.uses_float64 else ""
    name = Cell(line.name + precision, below=condensed(line.operations), tone="bad" if precision else "")
    size = [span(line.threads), span(line.blocks)]
    if resources is None:
        return row(name, *size, Cell("refused", below="by the compiler", tone="bad", span=10))
    stated = resources.stated_registers
    over = stated is not None and resources.registers > stated
    return row(
        name,
        *size,
        Cell(f"{resources.registers}", tone="bad" if over else ""),
        Cell("none", tone="bad") if stated is None else f"{stated}",
        *(Cell(f"{size:,}", tone="bad" if size else "") for size in (resources.spill_bytes, resources.stack_bytes)),
        _occupancy(resources),
        f"{resources.shared_bytes:,}",
        *_loop_cells(resources.loop),
    )


def _loop_cells(loop: LoopCounts | None) -> list[str]:
    if loop is None:
        return [NOTHING] * 4
    loads = [(loop.shared_loads, loop.shared_floats), (loop.global_loads, loop.global_floats)]
    floats = (loop.shared_floats + loop.global_floats) / loop.fma if loop.fma else None
    return [
        f"{loop.fma}",
        *(f"{count} ({floats})" if count else NOTHING for count, floats in loads),
        NOTHING if floats is None else f"{floats:.2f}",
    ]


# All targets ----------------------------------------------------------------------------------------------------------


def _targets_table(record: KernelsRecord) -> Table:
    targets = record.config.targets
    found: dict[tuple, dict[str, KernelRow]] = {}
    for line in record.rows:
        found.setdefault(_key(line), {})[line.target] = line
    kernels = []
    for by_target in found.values():
        first = next(iter(by_target.values()))
        kernels.append((first, row(first.name, *(_target_cell(by_target.get(target)) for target in targets))))
    return Table("Registers and occupancy for every target", columns("kernel", targets), _groups(kernels))


def _target_cell(line: KernelRow | None) -> Cell:
    """Registers and occupancy, or what is wrong."""
    if line is None:
        return Cell(NOTHING)
    if line.resources is None:
        return Cell("refused", tone="bad")
    fault = _memory_fault(line.resources) or ("double" if line.resources.uses_float64 else "")
    return Cell(f"{line.resources.registers}, {fault or _occupancy(line.resources)}", tone="bad" if fault else "")


def _memory_fault(resources: KernelResources) -> str:
    """``spills 24`` or ``stack 16``; empty if all values stay in registers."""
    if resources.spill_bytes:
        return f"spills {resources.spill_bytes:,}"
    return f"stack {resources.stack_bytes:,}" if resources.stack_bytes else ""


def _occupancy(resources: KernelResources) -> str:
    return span([round(100 * share) for share in resources.occupancy], " %") if resources.occupancy else NOTHING


def _key(line: KernelRow) -> tuple:
    """What tells a kernel from the others of a file, whatever the target."""
    return (line.name, *map(tuple, (line.versions, line.operations, line.threads, line.blocks)))


def _groups(kernels: list[tuple[KernelRow, Row]]) -> list[Group]:
    """The rows under the versions that launch them; shared kernels come last."""
    groups: dict[str, list[Row]] = {}
    for line, drawn in sorted(kernels, key=lambda pair: (len(pair[0].versions) > 1, pair[0].versions)):
        first, *others = line.versions
        heading = f"shared by {', '.join(line.versions)}" if others else LABELS.get(first, first)
        groups.setdefault(heading, []).append(drawn)
    return [Group(rows, heading) for heading, rows in groups.items()]
