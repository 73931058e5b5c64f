"""The samples of a results file, as ``convbench compare`` needs them.

A row is a version in a file of ``convbench run``, an operation of a version in one of ``convbench layers``, or a
benchmark in one of pytest-benchmark, by this suite or any other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from bench.model import NotNegative, from_json
from bench.records import layers, run
from bench.records.documents import PYTEST_BENCHMARK, read_object
from common.errors import UsageError

RUN, LAYERS = "convbench run", "convbench layers"
COMMIT_DIGITS = 10
OWN_SETTINGS = ("network", "batch_size", "epoch_pictures", "threads", "math")
"""What this suite's benchmarks write about themselves; another suite may use other names for anything."""


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """One row: samples in seconds, or the reason why it has none."""

    samples: Sequence[float]
    settings: dict[str, Any]
    """Machine, device, data and arithmetic, by name; a value that the file does not state is missing or empty."""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """The rows of a file, and the software that they were measured with."""

    kind: str
    """``convbench run``, ``convbench layers`` or ``pytest-benchmark``."""
    rows: dict[str, SampleRow]
    software: dict[str, Any]
    """Commit and versions of Python and libraries."""
    warnings: list[str] = field(default_factory=list)


def read_samples(path: Path) -> SampleFile:
    """Read a file with samples; UsageError if it is of another kind, is not valid, or holds only summaries."""
    schema, document = read_object(path)
    if schema == PYTEST_BENCHMARK:
        return _from_pytest_benchmark(path, document)
    if schema in (run.SCHEMA, run.OLD_SCHEMA):
        return _from_record(RUN, run.read_run(path))
    if schema == layers.SCHEMA:
        return _from_record(LAYERS, layers.read_layers(path))
    raise UsageError(f"{path} has schema {schema!r}: compare takes files of {RUN}, {LAYERS} and {PYTEST_BENCHMARK}")


def _from_record(kind: str, record: run.RunRecord | layers.LayersRecord) -> SampleFile:
    environment, config = asdict(record.environment), record.config
    asked = {**asdict(config), **environment, "--math": config.precision}
    rows = {}
    for row in record.rows:
        reason = "" if row.finished else row.reason or ("no samples" if row.verified else "not verified")
        if isinstance(row, run.RunRow):
            samples = {row.id: row.epoch_s}
        else:
            samples = {f"{row.id} {times.stage} {times.operation}": times.seconds for times in row.operations}
            samples[f"{row.id} whole step"] = row.step_s
        settings = {**asked, **_gpu_settings(row.device, environment["gpu"]), "math": row.precision}
        rows |= {name: _sample_row(seconds, settings, reason) for name, seconds in samples.items()}
    software = _software(environment, environment["commit"], environment["dirty"])
    interrupted = ["it was interrupted"] if kind == RUN and record.interrupted else []
    return SampleFile(kind, rows, software, [*interrupted, *record.warnings])


def _sample_row(samples: Sequence[float], settings: dict[str, Any], reason: str) -> SampleRow:
    """A row whose samples can form a ratio, or a row with the reason why they cannot."""
    if not reason and min(samples) <= 0:
        reason = "it was too short for the clock: a sample is 0 s"
    return SampleRow(() if reason else samples, settings, reason)


def _gpu_settings(device: Any, gpu: dict[str, Any] | None) -> dict[str, Any]:
    """The GPU counts only for a row that used it."""
    used = gpu if device == "gpu" and gpu else {}
    return {"device": device, "GPU": used.get("name"), "driver": used.get("driver")}


def _software(environment: dict[str, Any], commit: Any, dirty: Any) -> dict[str, Any]:
    changed = " with changes" if dirty else ""
    return {
        "commit": f"{str(commit)[:COMMIT_DIGITS]}{changed}" if commit else None,
        "Python": environment["python"],
        **environment["libraries"],
        "NUMBA_OPT": environment["numba_opt"],
    }


# pytest-benchmark's files ---------------------------------------------------------------------------------------------

LENIENT = ConfigDict(extra="ignore", allow_inf_nan=False)
"""For files that another program writes: only the fields that are used here are checked."""


@dataclass(config=LENIENT)
class SuiteEnvironment:
    """The part of ``Environment`` that this suite's benchmarks write."""

    cpu: str | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    system: str | None = None
    python: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    numba_opt: str | None = None
    gpu: dict[str, Any] | None = None


@dataclass(config=LENIENT)
class MachineInfo:
    """The machine: as this suite describes it, and as pytest-benchmark does for any suite."""

    convbench: SuiteEnvironment | None = None
    system: str | None = None
    machine: str | None = None
    python_version: str | None = None
    cpu: dict[str, Any] = field(default_factory=dict)


@dataclass(config=LENIENT)
class BenchmarkStats:
    """The samples in seconds; None in a file that was saved without them."""

    data: Annotated[list[NotNegative], Field(min_length=1)] | None = None


@dataclass(config=LENIENT)
class Benchmark:
    """One benchmark; in ``extra_info`` a suite may write anything."""

    fullname: str
    stats: BenchmarkStats
    extra_info: dict[str, Any] | None = None


@dataclass(config=LENIENT)
class BenchmarkFile:
    """A file as ``--benchmark-json`` or ``--benchmark-save`` writes it."""

    machine_info: MachineInfo
    benchmarks: Annotated[list[Benchmark], Field(min_length=1)]
    commit_info: dict[str, Any] | None = None


def _from_pytest_benchmark(path: Path, document: dict[str, Any]) -> SampleFile:
    found = from_json(BenchmarkFile, json.dumps(document), path, "file of pytest-benchmark")
    machine, commit, rows = found.machine_info, found.commit_info or {}, {}
    environment = asdict(machine.convbench or SuiteEnvironment())
    if machine.convbench is None:
        environment |= {"cpu": machine.cpu.get("brand_raw"), "cores": machine.cpu.get("count")}
        environment |= {"system": f"{machine.system} {machine.machine}", "python": machine.python_version}
    for benchmark in found.benchmarks:
        name, about = benchmark.fullname, benchmark.extra_info or {}
        if benchmark.stats.data is None:
            raise UsageError(
                f"{path} has no single samples of {name}, only statistics: save it with --benchmark-save-data, or "
                "write it with --benchmark-json"
            )
        if name in rows:
            raise UsageError(f"{path} is not a valid file of pytest-benchmark: two benchmarks are called {name}")
        own = {key: about[key] for key in OWN_SETTINGS if key in about}
        settings = {**own, **environment, **_gpu_settings(about.get("device"), environment["gpu"])}
        reason = about.get("suspicious") or ("not verified" if about.get("verified") is False else "")
        rows[name] = _sample_row(benchmark.stats.data, settings, str(reason))
    return SampleFile(PYTEST_BENCHMARK, rows, _software(environment, commit.get("id"), commit.get("dirty")))
