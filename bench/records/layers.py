"""A training step taken apart: the results file of ``convbench layers``, and what is read off it.

A row is a version. It has whole steps, timed with no clock inside, and every operation of every stage, timed inside
other steps of the same training. What the operations' times fall short of the step by is the overhead: launches,
Python, waiting. It is a difference of two measurements and shown as it comes out, even where noise has made it
negative. Operations are set against the ceilings that were measured on the machine in the same run. A row that was not
verified has no times; a row with a ``reason`` cannot be believed and is never drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine.ceilings import SPEEDS, Ceilings
from bench.machine.environment import machine_slug
from bench.records.run import check_order, read_json, write_json
from bench.records.statistics import NOISY_SPREAD, spread
from common.architecture import Architecture, autoencoder
from common.backend import Device
from common.network import BufferPlan, flat_offsets, parameter_shapes, plan_activations
from common.operations import WHOLE_STEP, Operation, step_operations
from common.validation import all_texts, is_count, is_number, validating, want
from versions.registry import BackendInfo

SCHEMA = "convbench-layers/1"

BUDGET_BATCH = 64
BUDGET_MB = {
    "weights": 3,
    "weight gradients": 3,
    "activations": 150,
    "gradient buffers": 290,
    "other buffers": 100,
    "im2col workspace": 75,
}
"""The design document's ceilings at batch 64. It gives 625 as their sum, which is 621."""

DIRECTIONS = ("forward", "backward", "other")
RESTS = ("stage_forward_rest", "stage_backward_rest")
KNOWN = (*RESTS, *dict.fromkeys(operation.name for operation in step_operations(autoencoder(), 1)))
FORWARD = ("forward", "maxpool", "upsample", RESTS[0])


def figures(value: float) -> str:
    """A speed with three figures, or all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def direction(stage: str, operation: str) -> str:
    """``forward``, ``backward``, or ``other`` for what belongs to no stage."""
    if stage == WHOLE_STEP:
        return "other"
    return "forward" if operation in FORWARD else "backward"


@dataclass(frozen=True)
class Line:
    """One operation of one stage in a row."""

    operation: Operation
    seconds: float
    """Median of the steps that were watched."""
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
        return self.operation.stage

    @property
    def name(self) -> str:
        """The operation in words: ``backward filter``, ``rest of forward``."""
        name = self.operation.name
        return f"rest of {name.split('_')[1]}" if name in RESTS else name.replace("_", " ")

    @property
    def direction(self) -> str:
        """See ``direction``."""
        return direction(self.stage, self.operation.name)

    @property
    def noisy(self) -> bool:
        """Whether the samples lie further apart than a tenth of their median."""
        return self.spread > NOISY_SPREAD

    @property
    def gflop_per_s(self) -> float | None:
        """None for an operation that computes nothing."""
        return self.operation.flops / self.seconds / 1e9 if self.operation.flops and self.seconds > 0 else None

    @property
    def gb_per_s(self) -> float | None:
        """Of the least traffic that the operation can have; None where that is not known."""
        return (
            self.operation.least_bytes / self.seconds / 1e9 if self.operation.least_bytes and self.seconds > 0 else None
        )


@dataclass(frozen=True)
class LayerSummary:
    """What is read off a row that was verified and is believed."""

    row: dict[str, Any]
    ceilings: Ceilings
    lines: list[Line]
    """By stage, forward before backward; what belongs to no stage at the end."""
    step_s: float
    """Median of the whole steps, which were timed without clocks inside."""
    step_spread: float
    operations_s: float
    """Median of what the operations of a watched step take together; their own medians need not add up to it."""
    operations_spread: float

    @property
    def rows_s(self) -> float:
        """Sum of the operations' medians."""
        return sum(line.seconds for line in self.lines)

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
        return sum(line.operation.flops for line in self.lines)

    def seconds_by_direction(self) -> dict[tuple[str, str], float]:
        """Seconds under (stage, ``forward``, ``backward`` or ``other``), in order."""
        found: dict[tuple[str, str], float] = {}
        for line in self.lines:
            key = (line.stage, line.direction)
            found[key] = found.get(key, 0.0) + line.seconds
        return found


def summarise_layers(record: dict[str, Any]) -> list[LayerSummary]:
    """Summaries of the rows that were verified, timed and are believed, in order."""
    return [summarise_row(record, row) for row in record["rows"] if is_finished(row)]


def is_finished(row: dict[str, Any]) -> bool:
    """Verified, timed, and nothing went wrong."""
    return row["verified"] and not row["reason"] and bool(row["step_s"])


def summarise_row(record: dict[str, Any], row: dict[str, Any]) -> LayerSummary:
    """Summary of one row that has times."""
    ceilings = ceilings_of(record, row)
    step_s = median(row["step_s"])
    lines = [_line(entry, ceilings, step_s) for entry in row["operations"]]
    stages = list(dict.fromkeys(line.stage for line in sorted(lines, key=lambda line: line.direction != "forward")))
    lines.sort(key=lambda line: (line.direction == "other", stages.index(line.stage), DIRECTIONS.index(line.direction)))
    together = [sum(times) for times in zip(*(entry["seconds"] for entry in row["operations"]), strict=False)]
    return LayerSummary(row, ceilings, lines, step_s, spread(row["step_s"]), median(together), spread(together))


def ceilings_of(record: dict[str, Any], row: dict[str, Any]) -> Ceilings:
    """The ceilings in the row's arithmetic: where only some versions use TF32, both were measured."""
    measured = [record["ceilings"], *record["other_ceilings"]]
    return Ceilings(**next(found for found in measured if found["math"] == row["math"]))


def suspicion(summary: LayerSummary) -> str:
    """Why a row cannot be believed: an operation, or the whole step, above the measured ceilings; empty if none is."""
    for line in summary.lines:
        operation = line.operation
        if operation.name in RESTS:
            # Fused operations can keep in registers what would have crossed memory: only the arithmetic is certain.
            operation = Operation(operation.stage, operation.name, operation.flops, 0)
        elif line.seconds <= 0:
            return f"suspicious: {operation.id} took no time"
        if line.seconds > 0 and (why := summary.ceilings.suspicion(operation, line.seconds)):
            return f"{why}, in {operation.id}"
    why = summary.ceilings.suspicion(Operation(WHOLE_STEP, "whole", summary.flops, 0), summary.step_s)
    return f"{why}, over the whole step" if why else ""


def _line(entry: dict[str, Any], ceilings: Ceilings, step_s: float) -> Line:
    operation = Operation(entry["stage"], entry["operation"], entry["flops"], entry["least_bytes"])
    seconds = median(entry["seconds"])
    known = seconds > 0 and (operation.flops or operation.least_bytes)
    return Line(
        operation=operation,
        seconds=seconds,
        spread=spread(entry["seconds"]) if seconds > 0 else 0.0,
        fraction=ceilings.fraction(operation, seconds) if known else None,
        bound_by=ceilings.bound_by(operation) if known else "",
        share=seconds / step_s,
    )


# Memory -------------------------------------------------------------------------------------------------------------


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


def planned_by_purpose(row: dict[str, Any]) -> dict[str, int]:
    """Bytes planned under each purpose, in order."""
    found: dict[str, int] = {}
    for buffer in row["memory"]["planned"]:
        found[buffer["purpose"]] = found.get(buffer["purpose"], 0) + buffer["bytes"]
    return found


# Files --------------------------------------------------------------------------------------------------------------


def write_layers(record: dict[str, Any], runs: Path) -> Path:
    """Write the record under a name of its own; a file that exists is never touched."""
    stem = f"{record['started']}_{machine_slug(record['environment'])}_{record['environment']['commit']}_layers"
    return write_json(record, runs, stem)


def read_layers(path: Path) -> dict[str, Any]:
    """Read a file of ``convbench layers``; UsageError if it is not one, or lacks anything that is drawn from it."""
    record = read_json(path, SCHEMA)
    with validating(path):
        _check(record)
    return record


def _check(record: dict[str, Any]) -> None:
    environment, config = record["environment"], record["config"]
    for text in (record["started"], environment["cpu"], environment["commit"], config["math"], config["device"]):
        want(isinstance(text, str), "start, processor, commit, math and device must be texts")
    for count in (environment["threads"], config["threads"], config["batch_size"], config["rounds"]):
        want(is_count(count) and count >= 1, "threads, batch size and rounds must be counts")
    gpu = environment.get("gpu")
    want(gpu is None or isinstance(gpu["name"], str), "the GPU's name must be text")
    want(isinstance(record["conditions"], dict) and isinstance(record["notes"], dict), "conditions must be a mapping")
    want(all_texts(record["warnings"]), "warnings must be texts")
    want(isinstance(record["other_ceilings"], list), "other_ceilings must be a list")
    for ceilings in (record["ceilings"], *record["other_ceilings"]):
        for key in SPEEDS:
            want(is_number(ceilings[key]) and ceilings[key] > 0, f"{key} must be a speed")
        cache = ceilings["cache_bytes"]
        want(cache is None or is_count(cache), "cache_bytes must be a count or null")
        Ceilings(**ceilings)
    maths = {ceilings["math"] for ceilings in (record["ceilings"], *record["other_ceilings"])}
    want(isinstance(record["rows"], list) and bool(record["rows"]), "it has no rows")
    ids = [row["id"] for row in record["rows"]]
    want(len(set(ids)) == len(ids), "two rows have the same id")
    check_order(record.get("order", []), set(ids))
    for row in record["rows"]:
        _check_row(row, maths)


def _check_row(row: dict[str, Any], maths: set[str]) -> None:
    texts = [row[key] for key in ("id", "backend", "label", "device", "layout", "math", "reason")]
    want(all_texts(texts), "a row's names and reason must be texts")
    want(isinstance(row["verified"], bool), f"verified of {row['id']} must be true or false")
    want(is_count(row["checks"]), f"checks of {row['id']} must be a count")
    steps, operations = row["step_s"], row["operations"]
    want(isinstance(steps, list) and isinstance(operations, list), f"steps of {row['id']} must be lists")
    want(row["verified"] or not (steps or operations), f"{row['id']} has times but was not verified")
    want(all(is_number(value) and value > 0 for value in steps), f"{row['id']} has a time that is none")
    names = set()
    for entry in operations:
        where = (entry["stage"], entry["operation"])
        want(all_texts(where) and where not in names, f"operations of {row['id']} must have names of their own")
        names.add(where)
        want(where[1] in KNOWN, f"{row['id']} has an unknown operation {where[1]!r}: {', '.join(KNOWN)}")
        want(is_count(entry["flops"]) and is_count(entry["least_bytes"]), f"work of {where} must be counts")
        seconds = entry["seconds"]
        want(isinstance(seconds, list) and bool(seconds), f"{where} of {row['id']} has no times")
        want(all(is_number(value) and value >= 0 for value in seconds), f"{where} has a time that is none")
    if is_finished(row):
        want(bool(operations), f"{row['id']} has steps but no operations")
        want(row["math"] in maths, f"there are no ceilings for the math of {row['id']}")
    _check_memory(row["memory"], row["id"])


def _check_memory(memory: dict[str, Any], row: str) -> None:
    for buffer in memory["planned"]:
        want(all_texts((buffer["name"], buffer["purpose"])), f"buffers of {row} must have a name and a purpose")
        want(is_count(buffer["bytes"]) and all(map(is_count, buffer["shape"])), f"buffers of {row} must have sizes")
    for key in ("process_bytes", "pool_bytes", "device_bytes"):
        value = memory["peak"][key]
        whole = isinstance(value, int) and not isinstance(value, bool)  # below zero if another program gave memory back
        want(value is None or whole, f"{key} must be a count or null")
