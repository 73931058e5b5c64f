"""The results file of ``convbench run``, and the figures computed from it.

A row that was not verified has no times. A row with a ``reason`` did not finish and is never compared or drawn.
Speedups are not stored: ``summarise`` computes them. Files of the first schema had no peers, ceilings or pictures.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from bench.model import CHECKED, AtLeastOne, Count, Positive, Whole
from bench.records.documents import read_document, write_document
from bench.records.rows import Measurement, VersionRow
from bench.records.statistics import NOISY_SPREAD, ratio_interval, spread

SCHEMA = "convbench-run/2"
OLD_SCHEMA = "convbench-run/1"


@dataclass(config=CHECKED)
class RunSettings:
    """The settings of the command; times do not compare between files that differ here."""

    data: str
    samples: AtLeastOne
    """Pictures an epoch."""
    batch_size: AtLeastOne
    data_description: str = ""
    epochs: AtLeastOne = 1
    learning_rate: Positive | None = None
    seed: Count | None = None
    precision: Annotated[str, Field(alias="math")] = "fp32"
    width: Positive = 1.0
    """The network's inner filters, as a multiple of those of width 1; files without it are of width 1."""


@dataclass(config=CHECKED)
class RunRow(VersionRow):
    """One version's part of a run; times in seconds."""

    first_epoch_s: Positive | None = None
    """The warm-up epoch, compilation included."""
    epoch_s: list[Positive] = field(default_factory=list)
    images_per_s: Positive | None = None
    loss: list[float] = field(default_factory=list)
    """Of each epoch, the warm-up epoch first."""
    peak_bytes: Whole | None = None
    peer: bool = False
    """Whether this is another library, not one of the suite's versions."""
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
        needed = ("first_epoch_s", "images_per_s", "peak_bytes", "loss")
        lacking = [name for name in needed if getattr(self, name) in (None, [])]
        if self.finished and lacking:
            raise ValueError(f"{self.id} is finished but lacks {', '.join(lacking)}")
        return self


@dataclass(config=CHECKED)
class RunRecord(Measurement):
    """A whole run."""

    config: RunSettings
    rows: list[RunRow]
    interrupted: bool = False
    originals_png: str | None = None
    schema: Literal["convbench-run/2", "convbench-run/1"] = SCHEMA


def write_run(record: RunRecord, runs: Path) -> Path:
    """Write the record under a name of its own; returns the file."""
    stem = f"{record.started}_{record.environment.machine_slug}_{record.environment.commit}"
    return write_document(record, runs, stem)


def read_run(path: Path) -> RunRecord:
    """Read a file of ``convbench run``; UsageError if it is not one, or breaks a rule."""
    return read_document(path, RunRecord, SCHEMA, OLD_SCHEMA)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The figures of a finished row, and its speedup if there is a row to compare with."""

    row: RunRow
    median_s: float
    spread: float
    baseline: RunRow | None = None
    speedup: float | None = None
    interval: tuple[float, float] | None = None
    """95 % confidence interval of the speedup; None with too few epochs."""

    @property
    def noisy(self) -> bool:
        """Whether the spread is above a tenth of the median."""
        return self.spread > NOISY_SPREAD

    @property
    def baseline_noisy(self) -> bool:
        """Whether the baseline's spread is."""
        return self.baseline is not None and spread(self.baseline.epoch_s) > NOISY_SPREAD

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
    versions = [row for row in finished if not row.peer]
    base = next((row for row in finished if row.backend == baseline), versions[0] if versions else None)
    summaries = []
    for row in finished:
        compared = {}
        if base is not None and (row.device, row.precision) == (base.device, base.precision):
            interval = (1.0, 1.0) if row is base else ratio_interval(base.epoch_s, row.epoch_s, paired=True)
            speedup = median(base.epoch_s) / median(row.epoch_s)
            compared = {"baseline": base, "speedup": speedup, "interval": interval}
        summaries.append(Summary(row, median(row.epoch_s), spread(row.epoch_s), **compared))
    return summaries
