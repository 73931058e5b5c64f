"""The results file of ``convbench layers``: a training step taken apart, and what is read off it.

A row is a version. It has whole steps, timed with no clock inside, and every operation of every stage, timed inside
other steps of the same training. The whole step less its operations is the overhead: launches, Python, waiting. It is a
difference of two measurements and is shown as it comes out, even where noise makes it negative. A row that was not
verified has no times; a row with a ``reason`` is not believed and is never drawn.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from bench.machine.ceilings import Ceilings
from bench.machine.conditions import ConditionsAround
from bench.machine.environment import Environment
from bench.model import CHECKED, AtLeastOne, Count, NotNegative, Positive, Whole
from bench.records.documents import read_document, write_document
from bench.records.rows import VersionRow, check_rows
from bench.records.statistics import NOISY_SPREAD, spread
from common.architecture import Architecture
from common.backend import Device
from common.network import BufferPlan, flat_offsets, parameter_shapes, plan_activations
from common.operations import FORWARD_PASS, STAGE_METHODS, WHOLE_STEP, Operation, OperationWork
from versions.registry import BackendInfo

SCHEMA = "convbench-layers/1"
NOTES = {
    "order": "whose step followed whose: a list for every round, shuffled anew each time",
    "step_s": "whole training steps with no clock inside; on a GPU the mean of ten queued together",
    "operations": "seconds in other steps, clocked inside; on a GPU between events of the stream",
    "stage_forward": "what a version that overrides the stage does there outside the operations named",
    "flops": "of the result, a multiply and an add counted as two; least_bytes: every operand once",
    "planned": "buffers of the network and its workspace; an activation's memory later holds its gradient",
    "process_bytes": "largest resident set of the process that trains, compiler and libraries included",
    "pool_bytes": "held by CuPy's pool after the warm-up; device_bytes: added on the device, by NVML",
}
DIRECTIONS = ("forward", "backward", "other")


def _today(name: Any) -> Any:
    """The operation as it is spelled now; earlier files say ``stage_forward_rest``."""
    return name.removesuffix("_rest") if isinstance(name, str) else name


@dataclass(config=CHECKED)
class LayersSettings:
    """What was asked for."""

    batch_size: AtLeastOne
    precision: Annotated[str, Field(alias="math")]
    device: str
    threads: AtLeastOne
    rounds: AtLeastOne
    seed: Count


@dataclass(config=CHECKED)
class OperationTimes:
    """One operation of one stage, in the steps that were clocked inside."""

    stage: str
    operation: Annotated[Operation, BeforeValidator(_today)]
    flops: Count = 0
    least_bytes: Count = 0
    seconds: Annotated[list[NotNegative], Field(min_length=1)] = field(default_factory=list)

    @property
    def work(self) -> OperationWork:
        """What the operation has to do."""
        return OperationWork(self.stage, self.operation, self.flops, self.least_bytes)


@dataclass(config=CHECKED)
class PlannedBuffer:
    """A buffer of the network or of a version's workspace."""

    name: str
    shape: list[Count]
    purpose: str
    bytes: Count


@dataclass(config=CHECKED)
class MemoryPeaks:
    """Measured peaks; None where not measured."""

    process_bytes: Whole | None = None
    pool_bytes: Whole | None = None
    device_bytes: Whole | None = None
    """Below zero if another program gave memory back."""


@dataclass(config=CHECKED)
class Memory:
    """What a version was planned to need, and what it took."""

    planned: list[PlannedBuffer]
    peak: MemoryPeaks

    def planned_by_purpose(self) -> dict[str, int]:
        """Bytes planned under each purpose, in order."""
        found: dict[str, int] = {}
        for buffer in self.planned:
            found[buffer.purpose] = found.get(buffer.purpose, 0) + buffer.bytes
        return found


@dataclass(config=CHECKED, kw_only=True)
class LayerRow(VersionRow):
    """One version's step, taken apart; times in seconds."""

    memory: Memory
    step_s: list[Positive] = field(default_factory=list)
    operations: list[OperationTimes] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Verified, timed, and nothing went wrong."""
        return self.verified and not self.reason and bool(self.step_s)

    @model_validator(mode="after")
    def _check(self) -> LayerRow:
        if not self.verified and (self.step_s or self.operations):
            raise ValueError(f"{self.id} has times but was not verified")
        names = [(times.stage, times.operation) for times in self.operations]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.id} has an operation twice")
        if self.finished and not self.operations:
            raise ValueError(f"{self.id} has steps but no operations")
        return self


@dataclass(config=CHECKED)
class LayersRecord:
    """A whole file."""

    environment: Environment
    config: LayersSettings
    rows: list[LayerRow]
    started: str
    ceilings: Ceilings
    """In the arithmetic that was asked for."""
    conditions: ConditionsAround | None = None
    other_ceilings: list[Ceilings] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    order: list[list[str]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=lambda: dict(NOTES))
    schema: Literal["convbench-layers/1"] = SCHEMA

    @model_validator(mode="after")
    def _check(self) -> LayersRecord:
        check_rows(self.rows, self.order)
        for row in self.rows:
            if row.finished:
                self.ceilings_of(row)
        return self

    def ceilings_of(self, row: LayerRow) -> Ceilings:
        """The ceilings in the row's arithmetic; ValueError if they were not measured."""
        for found in (self.ceilings, *self.other_ceilings):
            if found.precision == row.precision:
                return found
        raise ValueError(f"there are no ceilings for the math of {row.id}")


def write_layers(record: LayersRecord, runs: Path) -> Path:
    """Write the record under a name of its own; a file that exists is never touched."""
    stem = f"{record.started}_{record.environment.machine_slug}_{record.environment.commit}_layers"
    return write_document(record, runs, stem)


def read_layers(path: Path) -> LayersRecord:
    """Read a file of ``convbench layers``; UsageError if it is not one, or breaks a rule."""
    return read_document(path, LayersRecord, SCHEMA)


def planned_buffers(
    info: BackendInfo, architecture: Architecture, batch_size: int, device: Device, threads: int
) -> list[BufferPlan]:
    """Every buffer that a version allocates for training, in its layout; pictures and losses come on top."""
    _, length = flat_offsets(parameter_shapes(architecture, info.layout))
    workspace = info.workspace(architecture, batch_size, device, threads)
    return [
        BufferPlan("parameters", (length,), "weights and biases"),
        BufferPlan("gradients", (length,), "their gradients"),
        *plan_activations(architecture, batch_size, info.layout),
        *(BufferPlan(name, shape, "workspace") for name, shape in workspace.items()),
    ]


# What is read off a row -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OperationSummary:
    """One operation of one stage in a row."""

    work: OperationWork
    seconds: float
    """Median of the clocked steps."""
    spread: float
    """Range of the samples as a share of the median; 0 where the median is 0."""
    fraction: float | None
    """Share of the ceiling that was reached; None where no work is known of."""
    bound_by: str
    share: float
    """Of the whole step."""

    @property
    def stage(self) -> str:
        """``conv1`` to ``conv5``, or ``step``."""
        return self.work.stage

    @property
    def operation(self) -> Operation:
        """Which operation."""
        return Operation(self.work.operation)

    @property
    def name(self) -> str:
        """The operation in words; ``rest of forward`` is what a fused stage does outside the operations named."""
        fused = {method: f"rest of {method.removeprefix('stage_')}" for method in STAGE_METHODS.values()}
        return fused.get(self.operation, self.operation.words)

    @property
    def direction(self) -> str:
        """``forward``, ``backward``, or ``other`` for what belongs to no stage."""
        if self.stage == WHOLE_STEP:
            return "other"
        return "forward" if self.operation in FORWARD_PASS else "backward"

    @property
    def noisy(self) -> bool:
        """Whether the samples lie further apart than a tenth of their median."""
        return self.spread > NOISY_SPREAD

    @property
    def gflop_per_s(self) -> float | None:
        """None for an operation that computes nothing."""
        return self.work.flops / self.seconds / 1e9 if self.work.flops and self.seconds > 0 else None

    @property
    def gb_per_s(self) -> float | None:
        """Of the least traffic that the operation can have; None where that is not known."""
        return self.work.least_bytes / self.seconds / 1e9 if self.work.least_bytes and self.seconds > 0 else None


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """What is read off a row that has times."""

    row: LayerRow
    ceilings: Ceilings
    operations: list[OperationSummary]
    """By stage, forward before backward; what belongs to no stage at the end."""
    step_s: float
    """Median of the whole steps, which were timed without clocks inside."""
    step_spread: float
    operations_s: float
    """Median of what the operations of a clocked step take together; their own medians need not add up to it."""
    operations_spread: float

    @property
    def medians_s(self) -> float:
        """Sum of the operations' medians."""
        return sum(line.seconds for line in self.operations)

    @property
    def overhead_s(self) -> float:
        """Whole step minus operations; below zero where noise is larger than it."""
        return self.step_s - self.operations_s

    @property
    def noisy(self) -> bool:
        """Whether the whole steps lie further apart than a tenth of their median."""
        return self.step_spread > NOISY_SPREAD

    @property
    def overhead_noisy(self) -> bool:
        """Whether either of the two that it is the difference of is."""
        return self.noisy or self.operations_spread > NOISY_SPREAD

    @property
    def flops(self) -> int:
        """Of all operations."""
        return sum(line.work.flops for line in self.operations)

    def seconds_by_direction(self) -> dict[tuple[str, str], float]:
        """Seconds under (stage, ``forward``, ``backward`` or ``other``), in order."""
        found: dict[tuple[str, str], float] = {}
        for line in self.operations:
            key = (line.stage, line.direction)
            found[key] = found.get(key, 0.0) + line.seconds
        return found

    def suspicion(self) -> str:
        """Why the row cannot be believed: an operation, or the step, above the measured ceilings; empty if none is."""
        for line in self.operations:
            work = line.work
            if line.operation in STAGE_METHODS.values():
                # Fused operations can keep in registers what would have crossed memory: only the arithmetic is certain.
                work = dataclasses.replace(work, least_bytes=0)
            elif line.seconds <= 0:
                return f"suspicious: {work.id} took no time"
            if line.seconds > 0 and (why := self.ceilings.suspicion(work, line.seconds)):
                return f"{why}, in {work.id}"
        why = self.ceilings.suspicion(OperationWork(WHOLE_STEP, "whole", self.flops, 0), self.step_s)
        return f"{why}, over the whole step" if why else ""


def summarise_layers(record: LayersRecord) -> list[LayerSummary]:
    """Summaries of the rows that were verified, timed and are believed, in order."""
    return [summarise_row(row, record.ceilings_of(row)) for row in record.rows if row.finished]


def summarise_row(row: LayerRow, ceilings: Ceilings) -> LayerSummary:
    """Summary of one row that has times."""
    step_s = median(row.step_s)
    lines = [_summarise_operation(times, ceilings, step_s) for times in row.operations]
    stages = list(dict.fromkeys(line.stage for line in sorted(lines, key=lambda line: line.direction != "forward")))
    lines.sort(key=lambda line: (line.direction == "other", stages.index(line.stage), DIRECTIONS.index(line.direction)))
    together = [sum(seconds) for seconds in zip(*(times.seconds for times in row.operations), strict=False)]
    return LayerSummary(row, ceilings, lines, step_s, spread(row.step_s), median(together), spread(together))


def _summarise_operation(times: OperationTimes, ceilings: Ceilings, step_s: float) -> OperationSummary:
    work, seconds = times.work, median(times.seconds)
    known = seconds > 0 and (work.flops or work.least_bytes)
    return OperationSummary(
        work=work,
        seconds=seconds,
        spread=spread(times.seconds) if seconds > 0 else 0.0,
        fraction=ceilings.fraction(work, seconds) if known else None,
        bound_by=ceilings.bound_by(work) if known else "",
        share=seconds / step_s,
    )
