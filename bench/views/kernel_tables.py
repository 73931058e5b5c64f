"""The tables of a kernels file: registers, memory, occupancy and loops of every kernel, and what launches it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby

from bench.records.kernels import CodeCounts, KernelResources, KernelRow, KernelsRecord, LoopCounts, MachineCode
from bench.views.table import NOTHING, Cell, Group, Row, Table, columns, row
from bench.views.words import kernel_name, percent, span
from common.operations import WHOLE_STEP, Operation
from versions.registry import REGISTRY

MAIN_TARGETS = ("sm_90a", "sm_90")
"""The target that is shown in full, where there are several: the first of these."""
NAME_WIDTH = 25  # characters of a kernel's name on a terminal; the figures need the others of the 80
LABELS = {info.name: info.label for info in REGISTRY}


def kernel_tables(record: KernelsRecord) -> list[Table]:
    """Resources and loops for one target; if there are several, registers for each. All fit 80 characters."""
    targets = record.config.targets
    main = next((target for target in MAIN_TARGETS if target in targets), targets[-1])
    tables = [_resources_table(record, main), _loops_table(record, main)]
    if any(line.target == main and line.resources and line.resources.machine for line in record.rows):
        tables.append(_machine_table(record, main))
    return [*tables, _targets_table(record)] if len(targets) > 1 else tables


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
        stages.setdefault(operation, []).append(stage)
    return ", ".join(f"{operation.words} {_stages_in_words(names)}".strip() for operation, names in stages.items())


def _stages_in_words(names: Iterable[str]) -> str:
    """conv1, conv2, conv3 and conv5 as ``conv1-3,5``; nothing for the whole step."""
    numbers = sorted({int(name.removeprefix("conv")) for name in names if name != WHOLE_STEP})
    # Numbers that follow one another have the same distance to their places.
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"conv{','.join(texts)}" if texts else ""


def _resources_table(record: KernelsRecord, target: str) -> Table:
    headers = ["threads", "blocks", "regis-\nters", "stated", "spill\nbytes", "stack\nbytes", "occu-\npancy"]
    shown = columns("kernel, and what launches it", headers, NAME_WIDTH)
    groups = _groups((line, _resources_row(line)) for line in record.rows if line.target == target)
    notes = [
        "Threads: of a block. Registers: of a thread. Stated: the most that the kernel may use. Occupancy: the warps"
        " that can run at once, as a share of the most; computed."
    ]
    caption = f"GPU kernels at batch {record.config.batch_size}, compiled for {target}"
    return Table(caption, shown, groups, notes, tight=True)


def _resources_row(line: KernelRow) -> Row:
    resources = line.resources
    precision = " (double precision)" if resources and resources.uses_float64 else ""
    name = Cell(kernel_name(line.name) + precision, below=condensed(line.operations), tone="bad" if precision else "")
    size = [span(line.threads), span(line.blocks)]
    if resources is None:
        return row(name, *size, Cell("refused", below="by the compiler", tone="bad", span=5))
    stated = resources.stated_registers
    over = stated is not None and resources.registers > stated
    return row(
        name,
        *size,
        Cell(f"{resources.registers}", tone="bad" if over else ""),
        Cell("none", tone="bad") if stated is None else f"{stated}",
        *(Cell(f"{size:,}", tone="bad" if size else "") for size in (resources.spill_bytes, resources.stack_bytes)),
        _occupancy(resources),
    )


def _loops_table(record: KernelsRecord, target: str) -> Table:
    headers = ["shared\nbytes", "FMA", "shared\nloads", "global\nloads", "floats\nan FMA"]
    shown = columns("kernel", headers, NAME_WIDTH)
    name_of = _namer(record)
    rows = (
        (line, row(name_of(line), f"{line.resources.shared_bytes:,}", *_loop_cells(line.resources.loop)))
        for line in record.rows
        if line.target == target and line.resources and (line.resources.loop or line.resources.shared_bytes)
    )
    notes = [
        "Shared bytes: the shared memory of a block. FMA and loads: instructions in one turn of the inner loop, in PTX;"
        " in parentheses the floats that they load. Floats an FMA: those of both kinds of load."
    ]
    return Table(f"Shared memory and inner loops, compiled for {target}", shown, _groups(rows), notes)


def _loop_cells(loop: LoopCounts | None) -> list[str]:
    if loop is None:
        return [NOTHING] * 4
    loads = [(loop.shared_loads, loop.shared_floats), (loop.global_loads, loop.global_floats)]
    return [
        f"{loop.fma}",
        *(f"{count} ({floats})" if count else NOTHING for count, floats in loads),
        f"{(loop.shared_floats + loop.global_floats) / loop.fma:.2f}" if loop.fma else NOTHING,
    ]


def _machine_table(record: KernelsRecord, target: str) -> Table:
    headers = ["FFMA\nof all", "share", "stated", "global\nloads", "shared\nloads", "stores", "loads\ntogether"]
    shown = columns("kernel", headers, NAME_WIDTH)
    name_of = _namer(record)
    rows = (
        (line, row(name_of(line), *_machine_cells(line.resources, line.resources.machine)))
        for line in record.rows
        if line.target == target and line.resources and line.resources.machine
    )
    notes = [
        "FFMA: multiply-adds in the hot loop, the innermost loop with the most of them, and their share of its"
        " instructions. Stated: the least share that the kernel declares. Loads and stores: 6x128 is six of 128 bits"
        " a thread. Loads together: global loads on their way when a value is first needed, in each loop that has"
        " any, or else in the straight code; 1 means that each load waits for its own store."
    ]
    return Table(f"Machine code, linked as for a launch on {target}", shown, _groups(rows), notes, tight=True)


def _machine_cells(resources: KernelResources, machine: MachineCode) -> list[str | Cell]:
    least, hot = resources.stated_ffma, machine.hot_loop
    share = hot.ffma_share if hot else 0.0
    low = least is not None and share < least
    together = [f"{loop.loads_together}" for loop in machine.loops if loop.count("LDG")]
    return [
        f"{hot.ffma} of {hot.instructions}" if hot else NOTHING,
        Cell(percent(share) if hot else NOTHING, tone="bad" if low else ""),
        NOTHING if least is None else percent(least),
        *(_widths(hot, *names) for names in (("LDG",), ("LDS",), ("STG", "STS"))),
        ", ".join(together) or (f"{machine.straight.loads_together}" if machine.straight.count("LDG") else NOTHING),
    ]


def _widths(loop: CodeCounts | None, *names: str) -> str:
    """Loads or stores by width, the widest first and each on a line: ``6x128``."""
    counts: Counter[int] = Counter()
    for key, number in loop.memory.items() if loop else ():
        name, _, bits = key.partition(".")
        counts[int(bits)] += number if name in names else 0
    return "\n".join(f"{counts[bits]}x{bits}" for bits in sorted(+counts, reverse=True)) or NOTHING


def _targets_table(record: KernelsRecord) -> Table:
    targets = record.config.targets
    name_of = _namer(record)
    found: dict[tuple, dict[str, KernelRow]] = {}
    for line in record.rows:
        found.setdefault(_key(line), {})[line.target] = line
    kernels = []
    for by_target in found.values():
        first, *_ = by_target.values()
        kernels.append((first, row(name_of(first), *(_target_cell(by_target.get(target)) for target in targets))))
    return Table("Registers and occupancy for every target", columns("kernel", targets, NAME_WIDTH), _groups(kernels))


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


def _namer(record: KernelsRecord) -> Callable[[KernelRow], Cell]:
    """What names a row: the kernel and, where kernels of a version share the name, also what launches it."""
    kernels = {_key(line): (line.name, *line.versions) for line in record.rows}
    times = Counter(kernels.values())

    def name_of(line: KernelRow) -> Cell:
        shared = times[(line.name, *line.versions)] > 1
        return Cell(kernel_name(line.name), below=condensed(line.operations) if shared else "")

    return name_of


def _key(line: KernelRow) -> tuple:
    """What tells a kernel from the others of a file, whatever the target."""
    return (line.name, *map(tuple, (line.versions, line.operations, line.threads, line.blocks)))


def _groups(kernels: Iterable[tuple[KernelRow, Row]]) -> list[Group]:
    """The rows under the versions that launch them; shared kernels come last."""
    groups: dict[str, list[Row]] = {}
    for line, drawn in sorted(kernels, key=lambda pair: (len(pair[0].versions) > 1, pair[0].versions)):
        first, *others = line.versions
        heading = f"shared by {', '.join(line.versions)}" if others else LABELS.get(first, first)
        groups.setdefault(heading, []).append(drawn)
    return [Group(rows, heading) for heading, rows in groups.items()]
