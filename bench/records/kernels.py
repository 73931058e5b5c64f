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

SCHEMA = "convbench-kernels/2"
OLD_SCHEMA = "convbench-kernels/1"
OLD_NAMES = {"max-pool": "maxpool", "max-pool backward": "maxpool_backward", "SGD": "sgd"}
"""Operations that the first schema spelled in another way; the others had spaces instead of underscores."""

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
class KernelResources:
    """What one kernel needs on one target, as the compilers report it."""

    registers: Count
    """32-bit registers per thread."""
    stated_registers: Count | None
    """The bound that the kernel declares, and that ptxas must keep."""
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


@dataclass(config=CHECKED)
class KernelRow:
    """A kernel with one set of argument types, compiled for one target."""

    name: str
    """How its module reaches it: ``conv2d_forward_kernel``, or ``KERNELS[wide]``."""
    versions: Annotated[list[str], Field(min_length=1)]
    operations: list[tuple[StageName, Operation]]
    """In the order of the step; the stage is ``WHOLE_STEP`` where the operation belongs to none."""
    threads: Annotated[list[AtLeastOne], Field(min_length=1)]
    """Block sizes, in threads."""
    blocks: Annotated[list[AtLeastOne], Field(min_length=1)]
    """Grid sizes, in blocks."""
    target: str
    """``sm_90``."""
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
    schema: Literal["convbench-kernels/2", "convbench-kernels/1"] = SCHEMA

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
    return read_document(path, KernelsRecord, SCHEMA, OLD_SCHEMA, upgrade=_upgrade)


def _upgrade(document: dict[str, Any]) -> None:
    """Turn a file of the first schema into the second: resources in one object, operations with underscores."""
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
