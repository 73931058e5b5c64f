"""Takes the training step of every version apart: verifies, measures the ceilings, times in turn, judges.

Each version is verified in one process and timed in another, so that the peak of its memory is that of training. The
n-th steps of all versions follow one another, in an order that is shuffled each time. Whole steps and watched steps of
a version alternate, so that what slows the machine down slows both. Afterwards a version has to show that it still
computes: it takes a step from poisoned outputs, and its losses agree with the others'.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import ceilings
from bench.machine.conditions import condition_warnings, conditions
from bench.machine.environment import describe_environment
from bench.measure.run import (
    CEILING_ATTEMPTS,
    Report,
    RunConfig,
    Worker,
    WorkerError,
    ask_ceilings,
    close_all,
    first_apart,
    shuffled,
    sigint_ignored,
    verify_rows,
)
from bench.records.layers import RESTS, SCHEMA, direction, planned_buffers, summarise_layers, summarise_row, suspicion
from bench.records.run import start_time
from common.architecture import Architecture, autoencoder
from common.operations import step_operations
from common.verify import FULL_STEP_TOLERANCE

MODULE = "bench.measure.layer_worker"
BATCHES = 4  # of pictures, taken in turn
NOTES = {
    "order": "whose step followed whose: a list for every round, shuffled anew each time",
    "step_s": "whole training steps with no clock inside; on a GPU the mean of ten queued together",
    "operations": "seconds in other steps, clocked inside; on a GPU between events of the stream",
    "stage_forward_rest": "what a version that puts a stage together itself does there outside the operations named",
    "flops": "of the result, a multiply and an add counted as two; least_bytes: every operand once",
    "planned": "buffers of the network and its workspace; an activation's memory later holds its gradient",
    "process_bytes": "largest resident set of the process that trains, compiler and libraries included",
    "pool_bytes": "held by CuPy's pool after the warm-up; device_bytes: added on the device, by NVML",
}


@dataclass
class LayerRow:
    """One version's part, as it goes into the file."""

    id: str
    backend: str
    label: str
    device: str
    layout: str
    math: str
    verified: bool = False
    checks: int = 0
    deterministic: bool | None = None
    reason: str = ""
    step_s: list[float] = field(default_factory=list)
    operations: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    unclean: int = 0
    """Watched steps in which the device waited for the host."""


def total_steps(config: RunConfig) -> int:
    """How often ``measure_layers`` reports if nothing fails; ``config.epochs`` is the number of rounds."""
    return 2 + len({info.name for info in config.backends}) + len(config.contestants) * (1 + config.epochs)


def measure_layers(config: RunConfig, images: np.ndarray, command_line: list[str], report: Report) -> dict[str, Any]:
    """Measure; returns the record.

    ``config.epochs`` is the number of rounds, ``images`` (samples, 3, H, W) uint8 are whole batches. Raises WorkerError
    if the ceilings cannot be measured. On Ctrl-C every process is ended.
    """
    architecture = autoencoder()
    rows = []
    for row_id, info in config.contestants.items():
        effective = info.effective_math(config.device, config.math)
        row = LayerRow(row_id, info.name, info.label, config.device, info.layout, effective)
        plans = planned_buffers(info, architecture, config.batch_size, config.device, config.threads)
        row.memory = {
            "planned": [{**asdict(plan), "bytes": plan.bytes} for plan in plans],
            "peak": {"process_bytes": None, "pool_bytes": None, "device_bytes": None},
        }
        rows.append(row)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "started": start_time(),
        "environment": describe_environment(config.device, config.threads, command_line),
        "config": {
            "batch_size": config.batch_size,
            "math": config.math,
            "device": config.device,
            "threads": config.threads,
            "rounds": config.epochs,
            "seed": config.seed,
        },
    }
    workers: dict[str, Worker] = {}
    late: list[str] = []
    try:
        verify_rows(config, rows, workers, report)
        report("measuring what the machine can do")
        limits = measured_ceilings(config)
        with tempfile.TemporaryDirectory(prefix="convbench-") as scratch:
            pictures = Path(scratch) / "images.npy"
            np.save(pictures, images)
            before = conditions(config.device)
            record["order"] = _time(config, rows, workers, pictures, report)
            after = conditions(config.device)
        close_all(workers)
        for row in rows:
            describe_work(row, architecture, config.batch_size)
        report("measuring what the machine can do")
        for _ in range(CEILING_ATTEMPTS):
            # A busy machine shows low ceilings: they are measured again before any row is called suspicious.
            try:
                limits = higher(limits, measured_ceilings(config))
            except WorkerError as error:  # what was measured before the steps stands
                late.append(f"after the steps, {error}")
                break
            if not any(above_ceilings(limits, row) for row in rows):
                break
    finally:
        with sigint_ignored():
            close_all(workers)
    record |= {
        "ceilings": limits[0],
        "other_ceilings": limits[1:],
        "conditions": {"before": before, "after": after},
        "warnings": [*late, *condition_warnings(before, after)],
        "rows": [{name: value for name, value in asdict(row).items() if name != "unclean"} for row in rows],
        "notes": NOTES,
    }
    judge(record)
    record["warnings"] += _warnings(record, rows)
    return record


def measured_ceilings(config: RunConfig) -> list[dict[str, Any]]:
    """What the machine can do, in the math asked for and in any other that a version uses; processes of their own."""
    maths = {info.effective_math(config.device, config.math): info for info in config.backends}
    asked_first = sorted(maths.items(), key=lambda item: item[0] != config.math)
    return [ask_ceilings(info, config) for _, info in asked_first]


def higher(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The faster of two measurements in each arithmetic, speed by speed."""
    return [ceilings.higher(one, other) for one, other in zip(first, second, strict=True)]


def _time(
    config: RunConfig, rows: list[LayerRow], workers: dict[str, Worker], pictures: Path, report: Report
) -> list[list[str]]:
    """Enter every row's times; returns the rows' ids as they were timed, a list for every round."""
    order: list[list[str]] = []
    for row in rows:
        if row.verified:
            report(f"{row.id}: compiling")
            workers[row.id] = Worker(config.contestants[row.id], config, pictures, MODULE)
            answer = _ask(row, workers, "start")
            if answer:
                row.memory["peak"] = answer["memory"]
    for number in range(config.epochs):
        order.append([])
        for row in shuffled([row for row in rows if row.id in workers]):
            report(f"{row.id}: round {number + 1} of {config.epochs}")
            answer = _ask(row, workers, "step")
            order[-1].append(row.id)
            if answer:
                enter_times(row, answer)
    for row in rows:
        if row.id in workers:
            answer = _ask(row, workers, "finish")
            if answer and answer["unwritten"]:
                row.reason = f"suspicious: outputs equal to the poison: {', '.join(answer['unwritten'])}"
    return order


def _ask(row: LayerRow, workers: dict[str, Worker], command: str) -> dict[str, Any] | None:
    """The answer; None, with the row's reason set and its process ended, if there is none to be used."""
    try:
        answer = workers[row.id].ask(command)
        bad = next((loss for loss in answer["losses"] if not math.isfinite(loss)), None)
        if bad is not None and command == "finish":  # the step that started from poison; its outputs are named
            return answer
        if bad is not None:
            raise WorkerError(f"suspicious: a loss is {bad}")
    except WorkerError as error:
        row.reason = str(error)
        workers.pop(row.id).close()
        return None
    row.losses += answer["losses"]
    return answer


def enter_times(row: LayerRow, answer: dict[str, Any]) -> None:
    """Add a round's times to the row."""
    row.step_s.append(answer["seconds"])
    row.unclean += not answer["clean"]
    known = {(entry["stage"], entry["operation"]): entry for entry in row.operations}
    for stage, name, seconds in answer["operations"]:
        if (stage, name) not in known:
            known[stage, name] = {"stage": stage, "operation": name, "flops": 0, "least_bytes": 0, "seconds": []}
            row.operations.append(known[stage, name])
        known[stage, name]["seconds"].append(seconds)


def describe_work(row: LayerRow, architecture: Architecture, batch_size: int) -> None:
    """Fill in FLOPs and bytes of every operation of the row.

    What a version does in a stage outside the operations named has their FLOPs, and of their bytes the most that any
    one of them needs: fused operations do not move again what they hold.
    """
    work = {(operation.stage, operation.name): operation for operation in step_operations(architecture, batch_size)}
    named = {(entry["stage"], entry["operation"]) for entry in row.operations}
    for entry in row.operations:
        stage, name = entry["stage"], entry["operation"]
        fused = [work[stage, name]] if (stage, name) in work else []
        if name in RESTS:
            fused = [
                operation
                for key, operation in work.items()
                if key not in named and operation.stage == stage and direction(*key) == direction(stage, name)
            ]
        entry["flops"] = sum(operation.flops for operation in fused)
        entry["least_bytes"] = max((operation.least_bytes for operation in fused), default=0)


def above_ceilings(limits: list[dict[str, Any]], row: LayerRow) -> str:
    """Why the row's times cannot be believed, if they cannot."""
    if row.reason or not row.step_s:
        return ""
    return suspicion(summarise_row({"ceilings": limits[0], "other_ceilings": limits[1:]}, asdict(row)))


def judge(record: dict[str, Any]) -> None:
    """Give a reason to every row that cannot be believed: above the ceilings, or with losses of its own."""
    for row in record["rows"]:
        if row["step_s"] and not row["reason"]:
            row["reason"] = suspicion(summarise_row(record, row))
    believed = [row for row in record["rows"] if row["step_s"] and not row["reason"]]
    for math_used in {row["math"] for row in believed}:
        alike = [row for row in believed if row["math"] == math_used]
        first = alike[0]
        for row in alike:
            place = first_apart(first["losses"], row["losses"], FULL_STEP_TOLERANCE[math_used])
            if place is not None:
                losses = (
                    f"{row['losses'][place]:.6g} at step {place + 1}, {first['id']} has {first['losses'][place]:.6g}"
                )
                row["reason"] = f"suspicious: loss {losses}"


def _warnings(record: dict[str, Any], rows: list[LayerRow]) -> list[str]:
    warnings = [
        f"{row.id}: in {row.unclean} of {len(row.step_s)} watched steps the GPU waited for the host, so that its "
        "operations' times may hold launches"
        for row in rows
        if row.unclean
    ]
    noisy = [summary.row["id"] for summary in summarise_layers(record) if summary.noisy]
    if noisy:
        warnings.append(f"noisy, whole steps further apart than a tenth of their median: {', '.join(noisy)}")
    return warnings
