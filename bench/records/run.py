"""Results files: what a run leaves behind, and the only thing that tables and charts are made from.

One JSON file a run, never overwritten. A row that was not verified has no times; a row with a ``reason`` did not
finish and is never compared or drawn. Speedups are not stored: they follow from the rows, against the one baseline, on
the same device, in the same run and with the same arithmetic. Files of the first schema, which had no peers, intervals'
worth of epochs, ceilings or pictures, are still read.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.machine.ceilings import SPEEDS
from bench.machine.environment import machine_slug
from bench.records.files import create_file
from bench.records.statistics import NOISY_SPREAD, ratio_interval, spread
from common.errors import UsageError
from common.validation import is_number, validating, want

SCHEMA = "convbench-run/2"
OLD_SCHEMA = "convbench-run/1"


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
    id: str = ""
    """Unique in its file: the backend's name, and for a second row of the same backend ``v4#2``."""
    peer: bool = False
    """Whether this is not one of the suite's versions but something to measure them against."""
    reconstruction_png: str | None = None
    """The pictures of ``originals_png`` after the last epoch, as base64."""

    def __post_init__(self) -> None:
        """A row is called by its backend's name unless told otherwise."""
        self.id = self.id or self.backend

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
    ceilings: dict[str, Any] | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    originals_png: str | None = None
    order: list[list[str]] = field(default_factory=list)
    """Ids of the rows as they were timed, a list for each round of timed epochs; empty in older files."""
    notes: dict[str, str] = field(
        default_factory=lambda: {
            "first_epoch_s": "the warm-up epoch, compilation included; kept apart from epoch_s",
            "epoch_s": "every timed epoch: shuffle, gather and all steps, synchronised at both ends",
            "order": "whose epoch followed whose: a list for every timed epoch, shuffled anew each time",
            "loss": "mean squared error of each epoch, the warm-up epoch first",
            "peak_bytes": "CPU: largest resident set of its process; GPU: device memory added by its first epoch",
        }
    )


@dataclass(frozen=True)
class Summary:
    """What is read off a finished row: medians, spread, and the speedup if there is something to compare with."""

    row: Row
    median_s: float
    spread: float
    baseline: Row | None = None
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


def summarise(rows: list[Row], baseline: str) -> list[Summary]:
    """Summaries of the finished rows, in order.

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
        if base is None or (row.device, row.math) != (base.device, base.math):
            summaries.append(Summary(row, middle, apart))
            continue
        interval = (1.0, 1.0) if row is base else ratio_interval(base.epoch_s, row.epoch_s, paired=True)
        summaries.append(Summary(row, middle, apart, base, base_noisy, median(base.epoch_s) / middle, interval))
    return summaries


def start_time() -> str:
    """Now, in UTC, to the second, as files are named and records dated."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")


def prepare_folder(out: Path) -> Path:
    """Make ``out/runs`` and ``out/charts`` and prove that they can be written to; UsageError otherwise.

    Returns the folder for results files. What was made on the way to a failure is removed again.
    """
    made: list[Path] = []
    for folder in (out / "runs", out / "charts"):
        try:
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    path.mkdir()
                    made.append(path)
            probe = folder / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            for path in reversed(made):
                path.rmdir()
            raise UsageError(f"cannot write results to {folder}: {error.strerror or error}") from error
    return out / "runs"


def write_record(record: RunRecord, runs: Path) -> Path:
    """Write the record under a name of its own; a file that exists is never touched."""
    stem = f"{record.started}_{machine_slug(record.environment)}_{record.environment['commit']}"
    return write_json({"schema": SCHEMA, **asdict(record)}, runs, stem)


def write_json(document: dict[str, Any], folder: Path, stem: str) -> Path:
    """Write ``stem.json``, or ``stem-2.json`` and so on where that is taken; whole or not at all.

    Raises UsageError if the folder cannot be written to.
    """
    data = (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
    try:
        for suffix in ("", *(f"-{i}" for i in range(2, 100))):
            path = folder / f"{stem}{suffix}.json"
            try:
                create_file(path, data)
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}") from error
    raise UsageError(f"{folder} already holds a hundred results named {stem}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; UsageError if it does not."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a results file: no JSON ({error})") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} is not a results file: it names no schema")
    return data


def _whole(text: str) -> int | float:
    """A whole number; one beyond 64 bits, which to NumPy would be an object and no number, as a float."""
    return int(text) if len(text) <= 18 else float(text)


def read_json(path: Path, *schemas: str) -> dict[str, Any]:
    """Read a file that names its schema, one of ``schemas``; UsageError if it is not one."""
    data = read_json_object(path)
    schema = named_schema(path, data)
    if schema not in schemas:
        known = " and ".join(repr(known) for known in schemas)
        raise UsageError(f"{path} has schema {schema!r}; this reads {known}")
    return data


def named_schema(path: Path, data: dict[str, Any]) -> Any:
    """The schema that the content of a file names; UsageError if it names none."""
    if "schema" not in data:
        raise UsageError(f"{path} is not a results file: it names no schema")
    return data["schema"]


def is_pytest_benchmark(data: dict[str, Any]) -> bool:
    """Whether this is the content of a file that pytest-benchmark saved."""
    return "schema" not in data and "benchmarks" in data


def read_record(path: Path) -> RunRecord:
    """Read a run's results file back; UsageError if it is not one, or of another schema."""
    data = read_json(path, SCHEMA, OLD_SCHEMA)
    with validating(path):
        fields = {name: value for name, value in data.items() if name not in ("schema", "rows")}
        record = RunRecord(rows=[Row(**row) for row in data["rows"]], **fields)
        _check(record)
    return record


def check_order(order: Any, ids: set[str]) -> None:
    """Raise unless ``order`` is a list of lists that name rows, none of them twice."""
    want(isinstance(order, list) and all(isinstance(turn, list) for turn in order), "the order must be a list of lists")
    for turn in order:
        want(len({*turn}) == len(turn) and {*turn} <= ids, "the order must name rows, each once a turn")


def _check(record: RunRecord) -> None:
    """Raise unless everything that tables and charts read is there and of its kind."""
    for mapping, texts, counts in (
        (record.environment, ("cpu", "commit"), ("threads",)),
        (record.config, ("data",), ("samples", "batch_size")),
    ):
        for key in texts:
            want(isinstance(mapping[key], str), f"{key} must be text")
        for key in counts:
            want(is_number(mapping[key]) and mapping[key] >= 1, f"{key} must be a count")
    gpu = record.environment.get("gpu")
    want(gpu is None or isinstance(gpu["name"], str), "the GPU's name must be text")
    want(bool(record.rows), "it has no rows")
    want(len({row.id for row in record.rows}) == len(record.rows), "two rows have the same id")
    want(all(isinstance(text, str) for text in record.warnings), "warnings must be texts")
    want(isinstance(record.conditions, dict), "conditions must be a mapping")
    check_order(record.order, {row.id for row in record.rows})
    if record.ceilings is not None:
        for key in SPEEDS:
            want(is_number(record.ceilings[key]) and record.ceilings[key] > 0, f"{key} must be a speed")
    pictures = [record.originals_png, *(row.reconstruction_png for row in record.rows)]
    want(all(text is None or isinstance(text, str) for text in pictures), "pictures must be texts in base64")
    for row in record.rows:
        texts = (row.id, row.backend, row.label, row.device, row.layout, row.math, row.reason)
        want(all(isinstance(text, str) for text in texts), "a row's names and reason must be text")
        for flag in (row.verified, row.peer):
            want(isinstance(flag, bool), f"verified and peer of {row.id} must be true or false")
        times = row.epoch_s if row.first_epoch_s is None else [row.first_epoch_s, *row.epoch_s]
        want(all(is_number(value) and value > 0 for value in times), f"{row.backend} has a time that is none")
        want(row.verified or not times, f"{row.backend} has times but was not verified")
        want(all(is_number(value) for value in row.loss), f"losses of {row.backend} must be numbers")
        if row.finished:
            numbers = (row.first_epoch_s, row.images_per_s, row.peak_bytes)
            want(all(is_number(value) for value in numbers), f"{row.backend} is finished but lacks a figure")
            want(bool(row.loss), f"{row.backend} is finished but has no loss")
