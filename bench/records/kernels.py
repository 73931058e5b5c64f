"""The file of ``convbench kernels --out``: the resources that every GPU kernel needs, as the compilers report them.

A row is a kernel with one set of argument types, compiled for one target. No GPU takes part, and nothing is timed.
"""

from __future__ import annotations

from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from bench.machine.environment import Environment
from bench.model import CHECKED, AtLeastOne, Count, Share
from bench.records.documents import read_document, write_document
from common.operations import WHOLE_STEP, Operation

SCHEMA = "convbench-kernels/3"
OLD_SCHEMAS = ("convbench-kernels/2", "convbench-kernels/1")
OLD_NAMES = {"max-pool": "maxpool", "max-pool backward": "maxpool_backward", "SGD": "sgd"}
"""Operations that the first schema spelled in another way; the others had spaces instead of underscores."""

MemoryName = Annotated[str, Field(pattern=r"^(LD|ST)[A-Z]?\.(8|16|32|64|128)$")]
StageName = Annotated[str, Field(pattern=f"^(conv[0-9]{{1,3}}|{WHOLE_STEP})$")]


@dataclass(config=CHECKED, frozen=True)
class LoopCounts:
    """Instructions in one turn of a loop, in all of its branches, and the floats that the loads read."""

    fma: Count = 0
    shared_loads: Count = 0
    shared_floats: Count = 0
    global_loads: Count = 0
    global_floats: Count = 0

    def __add__(self, other: LoopCounts) -> LoopCounts:
        """Add field by field."""
        return LoopCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(config=CHECKED, frozen=True)
class CodeCounts:
    """A part of the machine code, in all of its branches: a loop without the loops inside it, or what is in no loop."""

    instructions: Count = 0
    ffma: Count = 0
    """Multiply-adds in float32; a packed instruction has two."""
    memory: dict[MemoryName, Count] = field(default_factory=dict)
    """Loads and stores by name and bits a thread: ``LDG.128`` global loads, ``STS.32`` stores to shared memory."""
    loads_together: Count = 0
    """The most global loads on their way when the code first needs the value of one of them."""
    parent: Count | None = None
    """The loop around it, by its place in ``MachineCode.loops``; None if there is none."""

    @property
    def ffma_share(self) -> float:
        """Multiply-adds an instruction."""
        return self.ffma / self.instructions if self.instructions else 0.0

    def count(self, name: str) -> int:
        """Loads or stores of all widths whose name is ``LDG``, ``LDS``, ``STG`` or ``STS``."""
        return sum(number for key, number in self.memory.items() if key.partition(".")[0] == name)


@dataclass(config=CHECKED, frozen=True)
class MachineCode:
    """The instructions of a linked kernel. Subroutines, such as those for large divisors, are not among them."""

    straight: CodeCounts
    """What is in no loop."""
    loops: list[CodeCounts] = field(default_factory=list)
    """In the order of the code, each behind the loop around it."""

    @model_validator(mode="after")
    def _check(self) -> MachineCode:
        for place, loop in enumerate(self.loops):
            if loop.parent is not None and loop.parent >= place:
                raise ValueError(f"loop {place} lies in loop {loop.parent}, which does not stand before it")
        return self

    @property
    def hot(self) -> int | None:
        """The place of the innermost loop with the most FFMA or, if none has any, with the most global loads."""
        around = {loop.parent for loop in self.loops}
        innermost = [place for place in range(len(self.loops)) if place not in around]
        for weight in (lambda loop: loop.ffma, lambda loop: loop.count("LDG")):
            best = max(innermost, key=lambda place: weight(self.loops[place]), default=None)
            if best is not None and weight(self.loops[best]):
                return best
        return None

    @property
    def hot_loop(self) -> CodeCounts | None:
        """The loop at ``hot``."""
        return None if self.hot is None else self.loops[self.hot]


@dataclass(config=CHECKED, frozen=True)
class KernelResources:
    """What one kernel needs on one target, as the compilers report it."""

    registers: Count
    """32-bit registers per thread."""
    stated_registers: Count | None
    """The bound that the kernel declares, and that the compiler must keep."""
    shared_bytes: Count
    """Of a block."""
    stack_bytes: Count
    """Local memory of a thread."""
    spill_bytes: Count
    """Stored and loaded by a thread because registers ran out."""
    uses_float64: bool
    loop: LoopCounts | None
    """One turn of the inner loop in the PTX; None if no loop has a multiply-add."""
    occupancy: list[Share] = field(default_factory=list)
    """Warps that can run at once, as a share of the most, for each block size in ``threads``."""
    stated_ffma: Share | None = None
    """The least FFMA share of the hot loop that the kernel declares; None if it declares none."""
    machine: MachineCode | None = None
    """The machine code; None for a target that is not linked as for a real run, and without a disassembler."""


@dataclass(config=CHECKED)
class KernelRow:
    """A kernel with one set of argument types, compiled for one target."""

    name: str
    """How its module reaches it: ``conv2d_forward_kernel``, or ``KERNELS[wide]``. Kernels that a function builds for
    several shapes share a name; the operations tell them apart."""
    versions: Annotated[list[str], Field(min_length=1)]
    operations: list[tuple[StageName, Operation]]
    """In the order of the step; the stage is ``WHOLE_STEP`` where the operation belongs to none."""
    threads: Annotated[list[AtLeastOne], Field(min_length=1)]
    """Block sizes, in threads."""
    blocks: Annotated[list[AtLeastOne], Field(min_length=1)]
    """Grid sizes, in blocks."""
    target: str
    """``sm_90a``."""
    resources: KernelResources | None
    """None if a compiler refused the kernel."""


@dataclass(config=CHECKED)
class KernelsSettings:
    """The settings of the command."""

    batch_size: AtLeastOne
    targets: Annotated[list[str], Field(min_length=1)]


@dataclass(config=CHECKED)
class KernelsRecord:
    """The content of a file."""

    environment: Environment
    config: KernelsSettings
    rows: Annotated[list[KernelRow], Field(min_length=1)]
    started: str
    faults: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    """What the fields mean, in older files; it is in ``results/README.md``."""
    schema: Literal["convbench-kernels/3", "convbench-kernels/2", "convbench-kernels/1"] = SCHEMA

    @model_validator(mode="after")
    def _check(self) -> KernelsRecord:
        for row in self.rows:
            if row.target not in self.config.targets:
                raise ValueError(f"{row.name} was compiled for {row.target}, which is not among the targets")
        return self


def write_kernels(record: KernelsRecord, runs: Path) -> Path:
    """Write the record under a name of its own; returns the file."""
    targets = "-".join(record.config.targets)
    return write_document(record, runs, f"{record.started}_{record.environment.commit}_kernels_{targets}")


def read_kernels(path: Path) -> KernelsRecord:
    """Read a file of ``convbench kernels --out``; UsageError if it is not one, or breaks a rule."""
    return read_document(path, KernelsRecord, SCHEMA, *OLD_SCHEMAS, upgrade=_upgrade)


def _upgrade(document: dict[str, Any]) -> None:
    """Turn a file of the first schema into the second: resources in one object, operations with underscores.

    The second only lacks what has a default in the third: ``stated_ffma`` and ``machine``.
    """
    names = {field.name for field in fields(KernelResources)}
    for row in document["rows"]:
        if not isinstance(row["refused"], bool):
            raise ValueError("refused is neither true nor false")
        figures = {name: row.pop(name) for name in names & row.keys()}
        row["resources"] = None if row.pop("refused") else figures
        row["operations"] = [
            [stage or WHOLE_STEP, OLD_NAMES.get(name, name).replace("fused ", "stage_").replace(" ", "_")]
            for stage, name in row["operations"]
        ]
