"""Takes the training step of every version apart: verifies, measures the ceilings, times in turn, judges.

Each version is verified in one process and timed in another, so that the peak of its memory is that of training. The
n-th steps of all versions follow one another, in an order that is shuffled each time. Whole steps and clocked steps of
a version alternate, so that load slows both. Afterwards a version has to show that it still computes: it takes a step
from poisoned outputs, and its losses agree with the others'.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine.ceilings import Ceilings
from bench.machine.conditions import ConditionsAround, read_conditions
from bench.machine.environment import describe_environment
from bench.measure.run import CEILING_ATTEMPTS, first_difference, shuffled
from bench.measure.setup import Setup
from bench.measure.workers import OnProgress, WorkerError, Workers, images_file
from bench.records.documents import start_time
from bench.records.layers import (
    LayerRow,
    LayersRecord,
    LayersSettings,
    Memory,
    MemoryPeaks,
    OperationTimes,
    PlannedBuffer,
    planned_buffers,
    summarise_layers,
    summarise_row,
)
from common.architecture import Architecture, autoencoder
from common.checks import FULL_STEP_TOLERANCE
from common.operations import FORWARD_PASS, STAGE_METHODS, Operation
from versions.registry import BackendInfo

BATCHES = 4  # of pictures, taken in turn


def measure_layers(
    setup: Setup, images: np.ndarray, rounds: int, command_line: list[str], report: OnProgress
) -> LayersRecord:
    """Measure; returns the record. ``images`` (samples, 3, H, W) uint8 are whole batches.

    Raises WorkerError if the ceilings cannot be measured. On Ctrl-C every process is ended.
    """
    architecture, started = autoencoder(), start_time()
    environment = describe_environment(setup.device, setup.threads, command_line)
    rows = [_new_row(setup, row_id, architecture) for row_id in setup.by_row]
    unclean: dict[str, int] = {}
    warnings: list[str] = []
    with Workers(setup) as workers:
        workers.verify(rows, report)
        report("measuring what the machine can do")
        ceilings = _measure_ceilings(workers)
        with images_file(images) as path:
            before = read_conditions(setup.device)
            order = _time_rows(rows, workers, path, rounds, report, unclean)
            conditions = ConditionsAround(before, read_conditions(setup.device))
        workers.end_all()
        for row in rows:
            describe_work(row, setup.by_row[row.id], architecture, setup.batch_size)
        report("measuring what the machine can do")
        ceilings = _confirmed_ceilings(ceilings, rows, workers, warnings)
    record = LayersRecord(
        environment=environment,
        config=LayersSettings(
            batch_size=setup.batch_size,
            precision=setup.precision,
            device=setup.device,
            threads=setup.threads,
            rounds=rounds,
            seed=setup.seed,
        ),
        rows=rows,
        started=started,
        ceilings=ceilings[0],
        other_ceilings=ceilings[1:],
        conditions=conditions,
        warnings=[*warnings, *conditions.warnings()],
        order=order,
    )
    judge(record)
    record.warnings += _warnings(record, unclean)
    return record


def _new_row(setup: Setup, row_id: str, architecture: Architecture) -> LayerRow:
    plans = planned_buffers(setup.by_row[row_id], architecture, setup.batch_size, setup.device, setup.threads)
    planned = [PlannedBuffer(plan.name, list(plan.shape), plan.purpose, plan.bytes) for plan in plans]
    return LayerRow(**setup.row_fields(row_id), memory=Memory(planned, MemoryPeaks()))


def _measure_ceilings(workers: Workers) -> list[Ceilings]:
    """What the machine can do, in the arithmetic asked for and in any other that a version uses."""
    setup = workers.setup
    precisions = dict.fromkeys(setup.precision_of(info) for info in setup.infos)
    return [workers.measure_ceilings(p) for p in sorted(precisions, key=lambda p: p != setup.precision)]


def _confirmed_ceilings(
    ceilings: list[Ceilings], rows: list[LayerRow], workers: Workers, warnings: list[str]
) -> list[Ceilings]:
    """Measure the ceilings again, a few times while any row lies above them: a busy machine shows low ceilings."""
    for _ in range(CEILING_ATTEMPTS):
        try:
            ceilings = [one.higher(other) for one, other in zip(ceilings, _measure_ceilings(workers), strict=True)]
        except WorkerError as error:  # what was measured before the steps stands
            warnings.append(f"after the steps, {error}")
            break
        if not any(_above(ceilings, row) for row in rows):
            break
    return ceilings


def _above(ceilings: list[Ceilings], row: LayerRow) -> str:
    """Why the row's times cannot be believed; empty if they can."""
    if not row.finished:
        return ""
    return summarise_row(row, next(found for found in ceilings if found.precision == row.precision)).suspicion()


def _time_rows(
    rows: list[LayerRow], workers: Workers, images: Path, rounds: int, report: OnProgress, unclean: dict[str, int]
) -> list[list[str]]:
    """Enter every row's times; returns the rows' ids as they were timed, a list for every round.

    ``unclean`` counts, by row, the clocked steps in which the device waited for the host.
    """
    order: list[list[str]] = []
    for row in rows:
        if row.verified:
            report(f"{row.id}: compiling")
            workers.start(row, images)
            answer = _ask(row, workers, "start_steps")
            if answer:
                row.memory.peak = MemoryPeaks(**answer["memory"])
    for number in range(rounds):
        order.append([])
        for row in shuffled([row for row in rows if workers.running(row)]):
            report(f"{row.id}: round {number + 1} of {rounds}")
            answer = _ask(row, workers, "time_step")
            order[-1].append(row.id)
            if answer:
                enter_times(row, answer)
                unclean[row.id] = unclean.get(row.id, 0) + (not answer["clean"])
    for row in rows:
        if workers.running(row):
            answer = _ask(row, workers, "finish_steps")
            if answer and answer["unwritten"]:
                row.reason = f"suspicious: outputs equal to the poison: {', '.join(answer['unwritten'])}"
    return order


def _ask(row: LayerRow, workers: Workers, command: str) -> dict[str, Any] | None:
    """The answer; None, with the row's reason set and its process ended, if there is none to be used."""
    try:
        answer = workers.ask(row, command)
        bad = next((loss for loss in answer["losses"] if not math.isfinite(loss)), None)
        if bad is not None and command == "finish_steps":  # the step that started from poison; its outputs are named
            return answer
        if bad is not None:
            raise WorkerError(f"suspicious: a loss is {bad}")
    except WorkerError as error:
        workers.fail(row, str(error))
        return None
    row.losses += answer["losses"]
    return answer


def enter_times(row: LayerRow, answer: dict[str, Any]) -> None:
    """Add a round's times to the row."""
    row.step_s.append(answer["seconds"])
    known = {(times.stage, times.operation): times for times in row.operations}
    for stage, name, seconds in answer["operations"]:
        if (stage, name) in known:
            known[stage, name].seconds.append(seconds)
        else:
            row.operations.append(OperationTimes(stage, Operation(name), seconds=[seconds]))


def describe_work(row: LayerRow, info: BackendInfo, architecture: Architecture, batch_size: int) -> None:
    """Fill in FLOPs and bytes of every operation of the row.

    A version may fuse operations; their time then is that of the stage. It gets the sum of their FLOPs, and the bytes
    of the one that moves most. One that has whole stages only says what they do.
    """
    work = {(part.stage, part.operation): part for part in info.step_work(architecture, batch_size)}
    named = {(times.stage, times.operation) for times in row.operations}
    for times in row.operations:
        key = (times.stage, times.operation)
        parts = [work[key]] if key in work else []
        if not parts and times.operation in STAGE_METHODS.values():
            forward = times.operation in FORWARD_PASS
            parts = [
                part
                for (stage, operation), part in work.items()
                if (stage, operation) not in named and stage == times.stage and (operation in FORWARD_PASS) == forward
            ]
        times.flops = sum(part.flops for part in parts)
        times.least_bytes = max((part.least_bytes for part in parts), default=0)


def judge(record: LayersRecord) -> None:
    """Give a reason to every row that cannot be believed: above the ceilings, or with losses unlike the others'."""
    for row in record.rows:
        if row.finished:
            row.reason = summarise_row(row, record.ceilings_of(row)).suspicion()
    believed = [row for row in record.rows if row.finished]
    for precision in {row.precision for row in believed}:
        alike = [row for row in believed if row.precision == precision]
        first = alike[0]
        for row in alike:
            place = first_difference(first.losses, row.losses, FULL_STEP_TOLERANCE[precision])
            if place is not None:
                theirs = f"{first.id} has {first.losses[place]:.6g}"
                row.reason = f"suspicious: loss {row.losses[place]:.6g} at step {place + 1}, {theirs}"


def _warnings(record: LayersRecord, unclean: dict[str, int]) -> list[str]:
    warnings = [
        f"{row.id}: in {unclean[row.id]} of {len(row.step_s)} clocked steps the GPU waited for the host, so that its "
        "operations' times may hold launches"
        for row in record.rows
        if unclean.get(row.id)
    ]
    noisy = [summary.row.id for summary in summarise_layers(record) if summary.noisy]
    if noisy:
        warnings.append(f"noisy, whole steps further apart than a tenth of their median: {', '.join(noisy)}")
    return warnings
