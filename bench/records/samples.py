"""What two files must have in common to be compared, read from each kind of file that holds single samples.

``read_measured`` takes a results file of ``convbench run``, one of ``convbench layers``, or a file of pytest-benchmark,
of this suite's benchmarks or any other, and returns its rows under names that are the same in both files: a version, an
operation of a version, or a benchmark. Beside the samples stand the settings that decide whether two figures may be
set against one another at all, in the groups that ``convbench compare --allow`` names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.records import layers
from bench.records.run import (
    OLD_SCHEMA,
    SCHEMA,
    Row,
    is_pytest_benchmark,
    named_schema,
    read_json_object,
    read_record,
)
from common.errors import UsageError
from common.validation import is_number, validating, want

RUN, LAYERS, PYTEST_BENCHMARK = "convbench run", "convbench layers", "pytest-benchmark"
GROUPS = ("machine", "gpu", "threads", "data", "math")
MEMORY = "memory in bytes"
COMMIT_DIGITS = 10

Settings = dict[str, dict[str, Any]]
"""Under each of ``GROUPS``, values by name; None where a file does not say."""


@dataclass(frozen=True)
class Timed:
    """One row: samples in seconds, or the reason why there are none that count."""

    samples: tuple[float, ...]
    settings: Settings
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """A file's rows, and what they were measured with."""

    path: Path
    kind: str
    """``convbench run``, ``convbench layers`` or ``pytest-benchmark``."""
    rows: dict[str, Timed]
    settings: Settings
    software: dict[str, Any]
    """Versions of Python and libraries, commit: what one may want to compare, and should know of."""
    remarks: list[str] = field(default_factory=list)


def read_measured(path: Path) -> Measured:
    """Read a file with samples; UsageError if it is none, or has no samples but only what was made of them."""
    document = read_json_object(path)
    if is_pytest_benchmark(document):
        return _of_pytest_benchmark(path, document)
    schema = named_schema(path, document)
    if schema in (SCHEMA, OLD_SCHEMA):
        return _of_run(path)
    if schema == layers.SCHEMA:
        return _of_layers(path)
    raise UsageError(f"{path} has schema {schema!r}: compare takes files of {RUN}, {LAYERS} and {PYTEST_BENCHMARK}")


# convbench's own ----------------------------------------------------------------------------------------------------


def _of_run(path: Path) -> Measured:
    record = read_record(path)
    data = {key: record.config.get(key) for key in ("data", "samples", "batch_size", "learning_rate", "seed")}
    settings = {**_of_machine(record.environment), "data": data, "math": {"--math": record.config.get("math")}}
    rows = {row.id: _run_row(row, record.environment) for row in record.rows}
    remarks = [*(["it was interrupted"] if record.interrupted else []), *record.warnings]
    return Measured(path, RUN, rows, settings, _software(record.environment), remarks)


def _run_row(row: Row, environment: dict[str, Any]) -> Timed:
    settings = _of_row(row.device, row.math, environment)
    if row.finished:
        return Timed(tuple(row.epoch_s), settings)
    return Timed((), settings, row.reason or ("no epochs" if row.verified else "not verified"))


def _of_layers(path: Path) -> Measured:
    record = layers.read_layers(path)
    environment, config = record["environment"], record["config"]
    data = {key: config.get(key) for key in ("batch_size", "seed")}
    rows = {}
    for row in record["rows"]:
        settings = _of_row(row["device"], row["math"], environment)
        reason = row["reason"] or ("" if row["verified"] else "not verified") or ("" if row["step_s"] else "no steps")
        named = {f"{entry['stage']} {entry['operation']}": entry["seconds"] for entry in row["operations"]}
        for name, samples in {"whole step": row["step_s"], **named}.items():
            rows[f"{row['id']} {name}"] = _timed(samples, settings, reason)
    settings = {**_of_machine(environment), "data": data, "math": {"--math": config["math"]}}
    return Measured(path, LAYERS, rows, settings, _software(environment), record["warnings"])


def _of_machine(environment: dict[str, Any]) -> Settings:
    machine = {"cpu": "cpu", "cores": "cores", MEMORY: "memory_bytes", "system": "system"}
    return {
        "machine": {name: environment.get(key) for name, key in machine.items()},
        "threads": {"threads": environment.get("threads")},
    }


def _of_row(device: str | None, math: str | None, environment: dict[str, Any]) -> Settings:
    """Device and arithmetic can differ from row to row; a GPU counts only where it was used."""
    gpu = (environment.get("gpu") or {}) if device == "gpu" else {}
    return {
        "gpu": {"device": device, "GPU": gpu.get("name"), "driver": gpu.get("driver")},
        "math": {"math": math},
    }


def _software(environment: dict[str, Any]) -> dict[str, Any]:
    libraries = environment.get("libraries")
    return {
        "commit": _commit(environment.get("commit"), environment.get("dirty")),
        "Python": environment.get("python"),
        **(libraries if isinstance(libraries, dict) else {}),
        "NUMBA_OPT": environment.get("numba_opt"),
    }


def _commit(commit: Any, dirty: Any) -> str | None:
    return f"{str(commit)[:COMMIT_DIGITS]}{' with changes' if dirty else ''}" if commit else None


def _timed(samples: list[float], settings: Settings, reason: str = "") -> Timed:
    """A row with samples that a ratio can be made of, or with the reason why it has none."""
    if not reason and min(samples) <= 0:
        reason = "it was too short for the clock: a sample is 0 s"
    return Timed((), settings, reason) if reason else Timed(tuple(samples), settings)


# pytest-benchmark's -------------------------------------------------------------------------------------------------


def _of_pytest_benchmark(path: Path, document: dict[str, Any]) -> Measured:
    """A file as ``--benchmark-json`` or ``--benchmark-save`` leaves it.

    Machine and settings are this suite's own where its benchmarks wrote them, otherwise what pytest-benchmark found.
    """
    with validating(path, "file of pytest-benchmark"):
        machine, benchmarks = document["machine_info"], document["benchmarks"]
        commit = document.get("commit_info") or {}
        want(isinstance(benchmarks, list) and bool(benchmarks), "it has no benchmarks")
        without = [entry["fullname"] for entry in benchmarks if "data" not in entry["stats"]]
        if without:
            raise UsageError(
                f"{path} has no single samples of {without[0]}, only what was made of them: save it with "
                "--benchmark-save-data, or write it with --benchmark-json"
            )
        ours = machine.get("convbench")
        processor = machine.get("cpu") or {}
        environment = ours or {
            "cpu": processor.get("brand_raw"),
            "cores": processor.get("count"),
            "system": f"{machine.get('system')} {machine.get('machine')}",
            "python": machine.get("python_version"),
        }
        rows = {entry["fullname"]: _benchmark_row(entry, environment) for entry in benchmarks}
        want(len(rows) == len(benchmarks), "two benchmarks have the same name")
        environment = {**environment, "commit": commit.get("id"), "dirty": commit.get("dirty")}
        settings = {"machine": _of_machine(environment)["machine"]}
        return Measured(path, PYTEST_BENCHMARK, rows, settings, _software(environment))


def _benchmark_row(entry: dict[str, Any], environment: dict[str, Any]) -> Timed:
    name, samples, about = entry["fullname"], entry["stats"]["data"], entry.get("extra_info") or {}
    want(isinstance(name, str), "a benchmark's name must be text")
    want(isinstance(samples, list) and bool(samples), f"{name} has no samples")
    numbers = all(is_number(value) and value >= 0 for value in samples)
    want(numbers, f"{name} has a time that is none")
    settings = {
        **_of_row(about.get("device"), about.get("math"), environment),
        "threads": {"threads": about.get("threads")},
        "data": {key: about.get(key) for key in ("network", "batch_size", "epoch_pictures")},
    }
    reason = about.get("suspicious") or ("not verified" if about.get("verified") is False else "")
    return _timed(samples, settings, str(reason))
