"""Results files: what a run leaves behind, and the only thing that tables and charts are made from.

One JSON file a run, never overwritten. A row that was not verified has no times; a row with a ``reason`` did not
finish and is never compared or drawn. Speedups are not stored: they follow from the rows, against the one baseline, on
the same device, in the same run and with the same arithmetic.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.environment import machine_slug
from common.errors import UsageError

SCHEMA = "convbench-run/1"
NOISY_SPREAD = 0.10


@dataclass
class Row:
    """One version's part of a run; times in seconds."""

    backend: str
    label: str
    device: str
    layout: str
    math: str
    verified: bool = False
    reason: str = ""
    first_epoch_s: float | None = None
    epoch_s: list[float] = field(default_factory=list)
    images_per_s: float | None = None
    loss: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    deterministic: bool | None = None
    checks: int = 0

    @property
    def finished(self) -> bool:
        """Verified, timed, and nothing went wrong."""
        return self.verified and not self.reason and bool(self.epoch_s)


@dataclass
class RunRecord:
    """A whole run."""

    environment: dict[str, Any]
    config: dict[str, Any]
    rows: list[Row]
    started: str
    interrupted: bool = False
    notes: dict[str, str] = field(
        default_factory=lambda: {
            "first_epoch_s": "the warm-up epoch, compilation included; kept apart from epoch_s",
            "epoch_s": "every timed epoch: shuffle, gather and all steps, synchronised at both ends",
            "loss": "mean squared error of each epoch, the warm-up epoch first",
            "peak_bytes": "CPU: largest resident set of the version's process; GPU: device memory it added",
        }
    )


@dataclass(frozen=True)
class Summary:
    """What is read off a finished row: medians, spread, and the speedup if there is something to compare with."""

    row: Row
    median_s: float
    spread: float
    baseline_noisy: bool = False
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None

    @property
    def noisy(self) -> bool:
        """Whether the samples lie further apart than a tenth of their median."""
        return self.spread > NOISY_SPREAD


def summarise(rows: list[Row], baseline: str) -> list[Summary]:
    """Summaries of the finished rows, in order.

    The speedup is the ratio of medians; its range is that of the ratios epoch by epoch, since the n-th epochs of all
    versions ran next to each other. A row on another device or in other arithmetic than the baseline's has none.
    """
    base = next((row for row in rows if row.backend == baseline and row.finished), None)
    summaries = []
    for row in rows:
        if not row.finished:
            continue
        middle = median(row.epoch_s)
        spread = (max(row.epoch_s) - min(row.epoch_s)) / middle
        if base is None or (row.device, row.math) != (base.device, base.math):
            summaries.append(Summary(row, middle, spread))
            continue
        base_noisy = (max(base.epoch_s) - min(base.epoch_s)) / median(base.epoch_s) > NOISY_SPREAD
        ratios = [before / after for before, after in zip(base.epoch_s, row.epoch_s, strict=False)]
        speedup = median(base.epoch_s) / middle
        summaries.append(Summary(row, middle, spread, base_noisy, speedup, min(ratios), max(ratios)))
    return summaries


def start_time() -> str:
    """Now, in UTC, to the second, as files are named and records dated."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")


def prepare_folder(out: Path) -> Path:
    """Make ``out/runs`` and prove that it can be written to; UsageError otherwise."""
    runs = out / "runs"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        probe = runs / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"cannot write results to {runs}: {error.strerror or error}") from error
    return runs


def write_record(record: RunRecord, runs: Path) -> Path:
    """Write the record under a name of its own; a file that exists is never touched."""
    text = json.dumps({"schema": SCHEMA, **asdict(record)}, indent=1, allow_nan=False) + "\n"
    stem = f"{record.started}_{machine_slug(record.environment)}_{record.environment['commit']}"
    for suffix in ("", *(f"-{i}" for i in range(2, 100))):
        path = runs / f"{stem}{suffix}.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            continue
        return path
    raise UsageError(f"{runs} already holds a hundred results named {stem}")


def read_record(path: Path) -> RunRecord:
    """Read a results file back; UsageError if it is not one, or of another schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not a results file: no JSON ({error.msg} at line {error.lineno})") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise UsageError(f"{path} is not a results file: it names no schema")
    if data["schema"] != SCHEMA:
        raise UsageError(f"{path} has schema {data['schema']!r}; this version reads {SCHEMA!r}")
    try:
        fields = {name: value for name, value in data.items() if name not in ("schema", "rows")}
        record = RunRecord(rows=[Row(**row) for row in data["rows"]], **fields)
        for row in record.rows:
            _check_row(row)
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is not a valid results file: {error}") from error
    return record


def _check_row(row: Row) -> None:
    if not all(isinstance(value, str) for value in (row.backend, row.label, row.device, row.layout, row.math)):
        raise ValueError("a row's backend, label, device, layout and math must be text")
    if not isinstance(row.epoch_s, list) or not all(isinstance(s, int | float) and s > 0 for s in row.epoch_s):
        raise ValueError(f"epoch_s of {row.backend} must be a list of positive seconds")
    if row.epoch_s and not row.verified:
        raise ValueError(f"{row.backend} has times but was not verified")
