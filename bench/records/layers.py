"""The results file of ``convbench layers``: the operations of a training step, and the figures computed from it.

A row has whole steps, timed with no clock inside, and every operation of every stage, timed inside other steps. The
whole step less its operations is the overhead: launches, Python, waiting. It is shown as it is, even where noise makes
it negative. A row that was not verified has no times; a row with a ``reason`` is never drawn.
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
from bench.model import CHECKED, AtLeastOne, Count, NotNegative, Positive, Whole
from bench.records.documents import read_document, write_document
from bench.records.rows import Measurement, VersionRow
from bench.records.statistics import NOISY_SPREAD, spread
from common.architecture import Architecture
from common.backend import Device
from common.network import flat_offsets, parameter_shapes, plan_activations
from common.operations import FORWARD_PASS, STAGE_METHODS, WHOLE_STEP, Operation, OperationWork
from common.plans import BufferPlan
from versions.registry import BackendInfo

SCHEMA = "convbench-layers/1"


OLD_NAMES = {
    "stage_forward_rest": Operation.STAGE_FORWARD,
    "stage_backward_rest": Operation.STAGE_BACKWARD,
}


def _renamed(name: Any) -> Any:
    """The operation's present name; earlier files say ``stage_forward_rest``."""
    return OLD_NAMES.get(name, name) if isinstance(name, str) else name


@dataclass(config=CHECKED)
class LayersSettings:
    """The settings of the command."""

    batch_size: AtLeastOne
    precision: Annotated[str, Field(alias="math")]
    device: str
    threads: AtLeastOne
    rounds: AtLeastOne
    seed: Count


@dataclass(config=CHECKED)
class OperationTimes:
    """One operation of one stage, in the steps with clocks inside."""

    stage: str
    operation: Annotated[Operation, BeforeValidator(_renamed)]
    flops: Count = 0
    least_bytes: Count = 0
    seconds: Annotated[list[NotNegative], Field(min_length=1)] = field(default_factory=list)


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
    """Largest resident set of the process that trains, compiler and libraries included."""
    pool_bytes: Whole | None = None
    """Held by CuPy's pool after the warm-up."""
    device_bytes: Whole | None = None
    """Added on the device, by NVML; below zero if another program freed memory."""


@dataclass(config=CHECKED)
class Memory:
    """The buffers that a version plans, and the peaks. The memory of an activation later holds its gradient."""

    planned: list[PlannedBuffer]
    peak: MemoryPeaks


@dataclass(config=CHECKED, kw_only=True)
class LayerRow(VersionRow):
    """One version's step; times in seconds."""

    memory: Memory
    step_s: list[Positive] = field(default_factory=list)
    """On a GPU each is the mean of several steps, queued together."""
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
        samples = [times.seconds for times in self.operations]
        if self.finished and any(len(seconds) != len(samples[0]) for seconds in samples):
            raise ValueError(f"the operations of {self.id} do not have one time a round each")
        if self.finished and not all(sum(turn) > 0 for turn in zip(*samples, strict=True)):
            raise ValueError(f"the operations of {self.id} take no time in a round")
        return self


@dataclass(config=CHECKED)
class LayersRecord(Measurement):
    """A whole file."""

    config: LayersSettings
    rows: list[LayerRow]
    ceilings: Ceilings = field()
    other_ceilings: list[Ceilings] = field(default_factory=list)
    schema: Literal["convbench-layers/1"] = SCHEMA

    @model_validator(mode="after")
    def _check_ceilings(self) -> LayersRecord:
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
    """Write the record under a name of its own; returns the file."""
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
        *plan_activations(architecture, batch_size, info.layout, info.stage_plan),
        *(BufferPlan(name, shape, "workspace") for name, shape in workspace.items()),
    ]


@dataclasses.dataclass(frozen=True)
class OperationSummary:
    """The figures of one operation of one stage; None, or an empty text, where there is nothing to compute."""

    stage: str
    operation: Operation
    name: str
    """In words; ``rest of forward`` is what a fused stage does outside the operations named, ``whole forward`` a stage
    that has none."""
    direction: str
    """``forward``, ``backward``, or ``other`` for what belongs to no stage."""
    work: OperationWork
    seconds: float
    """Median of the steps with clocks inside."""
    spread: float
    share: float
    """Of the whole step."""
    gflop_per_s: float | None
    gb_per_s: float | None
    """Of the least traffic that the operation can have."""
    fraction: float | None
    """Share of the ceiling that was reached."""
    bound_by: str


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """The figures of a row that has times."""

    row: LayerRow
    ceilings: Ceilings
    operations: list[OperationSummary]
    """By stage, forward before backward; what belongs to no stage at the end."""
    step_s: float
    """Median of the whole steps, which were timed without clocks inside."""
    step_spread: float
    operations_s: float
    """Median of the sum of all operations; their own medians need not add up to it."""
    operations_spread: float

    @property
    def overhead_s(self) -> float:
        """Whole step minus operations; below zero where noise is larger than it."""
        return self.step_s - self.operations_s

    @property
    def noisy(self) -> bool:
        """Whether the spread of the whole steps is above a tenth of their median."""
        return self.step_spread > NOISY_SPREAD

    @property
    def overhead_noisy(self) -> bool:
        """Whether the whole steps or the operations are noisy."""
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
        """Why the times are implausible: an operation, or the step, is above the ceilings; empty if none is."""
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
    """Summaries of the finished rows, in order."""
    return [summarise_row(row, record.ceilings_of(row)) for row in record.rows if row.finished]


def summarise_row(row: LayerRow, ceilings: Ceilings) -> LayerSummary:
    """Summary of one row that has times."""
    step_s = median(row.step_s)
    lines = [_summarise_operation(times, row, ceilings, step_s) for times in row.operations]
    lines.sort(key=lambda line: (line.direction == "other", line.stage, line.direction == "backward"))
    sums = [sum(seconds) for seconds in zip(*(times.seconds for times in row.operations), strict=False)]
    return LayerSummary(row, ceilings, lines, step_s, spread(row.step_s), median(sums), spread(sums))


def _direction(times: OperationTimes) -> str:
    if times.stage == WHOLE_STEP:
        return "other"
    return "forward" if times.operation in FORWARD_PASS else "backward"


def _summarise_operation(times: OperationTimes, row: LayerRow, ceilings: Ceilings, step_s: float) -> OperationSummary:
    work = OperationWork(times.stage, times.operation, times.flops, times.least_bytes)
    seconds = median(times.seconds)
    known = seconds > 0 and (work.flops or work.least_bytes)
    beside = [other for other in row.operations if (other.stage, _direction(other)) == (times.stage, _direction(times))]
    return OperationSummary(
        stage=times.stage,
        operation=times.operation,
        name=times.operation.words.replace("stage ", "rest of " if len(beside) > 1 else "whole "),
        direction=_direction(times),
        work=work,
        seconds=seconds,
        spread=spread(times.seconds) if seconds > 0 else 0.0,
        share=seconds / step_s,
        gflop_per_s=work.flops / seconds / 1e9 if known and work.flops else None,
        gb_per_s=work.least_bytes / seconds / 1e9 if known and work.least_bytes else None,
        fraction=ceilings.fraction(work, seconds) if known else None,
        bound_by=ceilings.bound_by(work) if known else "",
    )
