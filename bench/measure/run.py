"""A run: verify every version, warm each up, then time their epochs in turn.

Each version is verified in one process and timed in another, so that the first epoch it is timed in compiles from
nothing. The n-th epochs of all versions follow one another, so that a machine that slows down slows all of them, in an
order that is shuffled each time, so that load that comes and goes favours none. A version that is named twice has two
rows: they differ by noise alone. The machine's ceilings are measured before the first epoch and after the last; a row
that claims more is not believed.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import numpy as np

from bench.machine.conditions import ConditionsAround, read_conditions
from bench.machine.environment import describe_environment
from bench.measure.peers import Peer
from bench.measure.setup import Setup
from bench.measure.workers import OnProgress, WorkerError, Workers, images_file
from bench.records.documents import start_time
from bench.records.run import RunRecord, RunRow, RunSettings
from bench.records.statistics import NOISY_SPREAD, spread
from bench.views.pictures import SHOWN, strip_png
from common.dataset import Dataset

CEILING_ATTEMPTS = 5
LOSS_TOLERANCE = {"fp32": 1e-3, "tf32": 5e-2}
"""How far, relatively, the mean losses of an epoch may lie apart."""

RowT = TypeVar("RowT")


def run(
    setup: Setup,
    data: Dataset,
    epochs: int,
    command_line: list[str],
    report: OnProgress,
    *,
    time_limit_s: float | None = None,
    verified: Sequence[RunRow] | None = None,
) -> RunRecord:
    """Verify and time; returns the record, marked ``interrupted`` with what there is if Ctrl-C ended it.

    No further round of epochs begins after ``time_limit_s`` seconds; one always runs. ``verified`` are the rows of the
    setup after an earlier verification of this network and batch size, which then is not repeated; one with a reason is
    not timed.
    """
    record = RunRecord(
        environment=describe_environment(setup.device, setup.threads, command_line),
        config=RunSettings(
            data=data.source,
            data_description=data.description,
            samples=len(data.images),
            batch_size=setup.batch_size,
            epochs=epochs,
            learning_rate=setup.learning_rate,
            seed=setup.seed,
            precision=setup.precision,
            width=setup.width,
        ),
        rows=new_rows(setup) if verified is None else copy.deepcopy(list(verified)),
        started=start_time(),
        originals_png=strip_png(data.images[: min(SHOWN, setup.batch_size)]),
    )
    ends = perf_counter() + time_limit_s if time_limit_s else math.inf
    with Workers(setup) as workers:
        try:
            if verified is None:
                workers.verify(record.rows, report)
            _measure(record, data.images, workers, report, ends)
        except KeyboardInterrupt:
            record.interrupted = True
            for row in record.rows:
                if not row.reason and len(row.epoch_s) < epochs:
                    row.reason = f"interrupted after {len(row.epoch_s)} of {epochs} epochs"
    if record.conditions:
        record.warnings += record.conditions.warnings()
    for row in record.rows:
        if row.epoch_s:
            row.images_per_s = len(data.images) / float(np.median(row.epoch_s))
    noisy = [row.id for row in record.rows if row.finished and spread(row.epoch_s) > NOISY_SPREAD]
    if noisy:
        record.warnings.append(f"noisy, epochs further apart than a tenth of their median: {', '.join(noisy)}")
    return record


def new_rows(setup: Setup) -> list[RunRow]:
    """A row without results for each version and peer."""
    return [RunRow(**setup.row_fields(row_id), peer=isinstance(info, Peer)) for row_id, info in setup.by_row.items()]


def _measure(record: RunRecord, images: np.ndarray, workers: Workers, report: OnProgress, ends: float) -> None:
    """What follows the verification and needs worker processes, in order."""
    try:
        _measure_ceilings(record, workers, report)
    except WorkerError as error:
        record.warnings.append(str(error))
    with images_file(images) as path:
        _time_rows(record, workers, path, report, ends)
    for row in record.rows:
        if workers.running(row):
            with contextlib.suppress(WorkerError):  # its times stand; only the pictures are missing
                row.reconstruction_png = workers.ask(row, "pictures")["png"]
    workers.end_all()
    judge_speeds(record, workers, report)


def _measure_ceilings(record: RunRecord, workers: Workers, report: OnProgress) -> None:
    """Measure the ceilings again, and keep the higher value of each speed."""
    report("measuring what the machine can do")
    found = workers.measure_ceilings(record.config.precision)
    record.ceilings = found.higher(record.ceilings) if record.ceilings else found


def _time_rows(record: RunRecord, workers: Workers, images: Path, report: OnProgress, ends: float) -> None:
    rows, epochs, device = record.rows, record.config.epochs, workers.setup.device
    for row in rows:
        if row.verified and not row.reason:
            report(f"{row.id}: first epoch, compiling")
            workers.start(row, images)
            time_epoch(row, workers, first=True)
            check_first_loss(row, rows, workers)
    before = read_conditions(device)
    for epoch in range(epochs):
        if epoch and perf_counter() > ends:
            record.warnings.append(f"time was up: {epoch} of {epochs} epochs")
            break
        record.order.append([])
        for row in shuffled([row for row in rows if workers.running(row)]):
            report(f"{row.id}: epoch {epoch + 1} of {epochs}")
            time_epoch(row, workers)
            record.order[-1].append(row.id)
    record.conditions = ConditionsAround(before, read_conditions(device))
    compare_losses(rows)


def time_epoch(row: RunRow, workers: Workers, *, first: bool = False) -> None:
    """Time one epoch of a row; a row whose loss is not a number, or whose process failed, gets a reason."""
    try:
        answer = workers.ask(row, "epoch")
        if math.isnan(answer["loss"]) and first:
            raise WorkerError(
                "suspicious: the first epoch's loss is NaN, as all memory was before it; "
                "if a smaller learning rate does not help, a value was left unwritten"
            )
        if not math.isfinite(answer["loss"]):
            raise WorkerError(f"the loss is {answer['loss']}: take a smaller learning rate")
    except WorkerError as error:
        workers.fail(row, str(error))
        return
    if first:
        row.first_epoch_s = answer["seconds"]
    else:
        row.epoch_s.append(answer["seconds"])
    row.loss.append(answer["loss"])
    row.peak_bytes = answer["peak_bytes"]


def shuffled(rows: list[RowT]) -> list[RowT]:
    """The rows in an order drawn anew at every call, from the system's entropy.

    Either order of two rows is then as likely, on which ``statistics.ratio_interval`` rests. In a fixed order, a
    periodic load could always meet the same row.
    """
    return random.SystemRandom().sample(rows, len(rows))


# Which rows are believed ----------------------------------------------------------------------------------------------


def judge_speeds(record: RunRecord, workers: Workers, report: OnProgress) -> None:
    """Take out rows that are faster, over a whole epoch, than the machine's largest products.

    A row is held to the products that it really computes: a fast algorithm has fewer.

    Other work on the machine can have lowered the ceilings. So they are measured again, up to ``CEILING_ATTEMPTS``
    times while any row lies above them, before a row is called suspicious.
    """
    setup, samples = workers.setup, record.config.samples
    flops = {row_id: samples * info.training_flops(setup.architecture) for row_id, info in setup.by_row.items()}
    rates = {row.id: flops[row.id] / float(np.median(row.epoch_s)) for row in record.rows if row.finished}
    for _ in range(CEILING_ATTEMPTS):
        try:
            _measure_ceilings(record, workers, report)
        except WorkerError as error:
            record.warnings.append(f"no row was held to the ceilings: {error}")
            return
        reasons = {row_id: record.ceilings.too_fast(rate) for row_id, rate in rates.items()}
        if not any(reasons.values()):
            return
    for row in record.rows:
        row.reason = reasons.get(row.id) or row.reason


def compare_losses(rows: list[RunRow]) -> None:
    """Take out every row whose losses, epoch by epoch, are not those of the others in the same arithmetic.

    The others are held to the first finished row. That row was verified; a version that leaves work out from its second
    epoch on would be fast, and its loss finite.
    """
    for precision in {row.precision for row in rows}:
        finished = [row for row in rows if row.finished and row.precision == precision]
        for row in finished[1:]:
            first = finished[0]
            if (epoch := first_difference(first.loss, row.loss, LOSS_TOLERANCE[precision])) is not None:
                row.reason = (
                    f"suspicious: loss {row.loss[epoch]:.6g} in epoch {epoch}, {first.id} has {first.loss[epoch]:.6g}"
                )


def check_first_loss(row: RunRow, rows: list[RunRow], workers: Workers) -> None:
    """End a peer whose first epoch, which is not timed, did not compute what the versions' did."""
    ours = next((other.loss[0] for other in rows if not other.peer and other.loss and not other.reason), None)
    if not row.peer or ours is None or not workers.running(row):
        return
    if first_difference([ours], row.loss, LOSS_TOLERANCE[row.precision]) is not None:
        row.verified, row.first_epoch_s = False, None
        workers.fail(
            row, f"failed verification: a first epoch with loss {row.loss[0]:.6g}, the versions' is {ours:.6g}"
        )


def first_difference(ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> int | None:
    """Where two courses of losses first lie further apart than the tolerance, relatively, or are no numbers."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if not abs(b - a) <= tolerance * abs(a):
            return place
    return None
