"""The results file of ``convbench run``, and what is read off it.

A row that was not verified has no times; a row with a ``reason`` did not finish and is never compared or drawn.
Speedups are not stored. They follow from the rows: against the one baseline, on the same device, in the same run and in
the same arithmetic. Files of the first schema had no peers, ceilings or pictures, and can still be read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from bench.machine.ceilings import Ceilings
from bench.machine.conditions import ConditionsAround
from bench.machine.environment import Environment
from bench.model import CHECKED, AtLeastOne, Count, Positive, Whole
from bench.records.documents import read_document, write_document
from bench.records.rows import VersionRow, check_rows
from bench.records.statistics import NOISY_SPREAD, ratio_interval, spread

SCHEMA = "convbench-run/2"
OLD_SCHEMA = "convbench-run/1"
NOTES = {
    "first_epoch_s": "the warm-up epoch, compilation included; kept apart from epoch_s",
    "epoch_s": "every timed epoch: shuffle, gather and all steps, synchronised at both ends",
    "order": "whose epoch followed whose: a list for every timed epoch, shuffled anew each time",
    "loss": "mean squared error of each epoch, the warm-up epoch first",
    "peak_bytes": "CPU: largest resident set of its process; GPU: device memory added by its first epoch",
}


@dataclass(config=CHECKED)
class RunSettings:
    """What was asked for; times do not compare between files that differ here."""

    data: str
    samples: AtLeastOne
    """Pictures an epoch."""
    batch_size: AtLeastOne
    data_description: str = ""
    epochs: AtLeastOne = 1
    learning_rate: Positive | None = None
    seed: Count | None = None
    precision: Annotated[str, Field(alias="math")] = "fp32"


@dataclass(config=CHECKED)
class RunRow(VersionRow):
    """One version's part of a run; times in seconds."""

    first_epoch_s: Positive | None = None
    epoch_s: list[Positive] = field(default_factory=list)
    images_per_s: Positive | None = None
    loss: list[float] = field(default_factory=list)
    peak_bytes: Whole | None = None
    peer: bool = False
    """Whether this is not one of the suite's versions but something to measure them against."""
    reconstruction_png: str | None = None
    """The pictures of ``originals_png`` after the last epoch, as base64."""

    @property
    def finished(self) -> bool:
        """Verified, timed, and nothing went wrong."""
        return self.verified and not self.reason and bool(self.epoch_s)

    @model_validator(mode="after")
    def _check(self) -> RunRow:
        if not self.verified and (self.epoch_s or self.first_epoch_s is not None):
            raise ValueError(f"{self.id} has times but was not verified")
        if self.finished:
            lacking = [name for name in ("first_epoch_s", "images_per_s", "peak_bytes") if getattr(self, name) is None]
            lacking += [] if self.loss else ["loss"]
            if lacking:
                raise ValueError(f"{self.id} is finished but lacks {', '.join(lacking)}")
        return self


@dataclass(config=CHECKED)
class RunRecord:
    """A whole run."""

    environment: Environment
    config: RunSettings
    rows: list[RunRow]
    started: str
    interrupted: bool = False
    ceilings: Ceilings | None = None
    conditions: ConditionsAround | None = None
    warnings: list[str] = field(default_factory=list)
    originals_png: str | None = None
    order: list[list[str]] = field(default_factory=list)
    """Ids of the rows as they were timed, a list for each round of timed epochs; empty in older files."""
    notes: dict[str, str] = field(default_factory=lambda: dict(NOTES))
    schema: Literal["convbench-run/2", "convbench-run/1"] = SCHEMA

    @model_validator(mode="after")
    def _check(self) -> RunRecord:
        check_rows(self.rows, self.order)
        return self


def write_run(record: RunRecord, runs: Path) -> Path:
    """Write the record under a name of its own; a file that exists is never touched."""
    stem = f"{record.started}_{record.environment.machine_slug}_{record.environment.commit}"
    return write_document(record, runs, stem)


def read_run(path: Path) -> RunRecord:
    """Read a run's results file back; UsageError if it is not one, or of another schema."""
    return read_document(path, RunRecord, SCHEMA, OLD_SCHEMA)


# What is read off a run -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is read off a finished row: medians, spread, and the speedup if there is something to compare with."""

    row: RunRow
    median_s: float
    spread: float
    baseline: RunRow | None = None
    baseline_noisy: bool = False
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    """In which the speedup lies with 95 % confidence; None with too few epochs for one."""

    @property
    def noisy(self) -> bool:
        """Whether the samples lie further apart than a tenth of their median."""
        return self.spread > NOISY_SPREAD

    @property
    def is_baseline(self) -> bool:
        """Whether the others are measured against this row."""
        return self.row is self.baseline


def summarise(rows: list[RunRow], baseline: str) -> list[Summary]:
    """Summarise the finished rows, in order.

    The baseline is the finished row of that backend, or else the first finished row of a version. The speedup is the
    ratio of medians; its interval takes epochs in pairs, since the n-th epochs of all rows ran next to each other. A
    row on another device or in other arithmetic than the baseline's has none.
    """
    finished = [row for row in rows if row.finished]
    base = next((row for row in finished if row.backend == baseline), None)
    base = base or next((row for row in finished if not row.peer), None)
    base_noisy = base is not None and spread(base.epoch_s) > NOISY_SPREAD
    summaries = []
    for row in finished:
        middle, apart = median(row.epoch_s), spread(row.epoch_s)
        if base is None or (row.device, row.precision) != (base.device, base.precision):
            summaries.append(Summary(row, middle, apart))
            continue
        interval = (1.0, 1.0) if row is base else ratio_interval(base.epoch_s, row.epoch_s, paired=True)
        summaries.append(Summary(row, middle, apart, base, base_noisy, median(base.epoch_s) / middle, interval))
    return summaries
