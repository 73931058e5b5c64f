"""The samples of a results file, as ``convbench compare`` needs them.

``read_samples`` reads a file of ``convbench run``, of ``convbench layers`` or of pytest-benchmark, by this suite or any
other. A row is a version, an operation of a version, or a benchmark; it has the same name in both files of a
comparison. Each row also has the settings that decide whether two times may be compared at all, in the groups that
``convbench compare --allow`` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from bench.machine.environment import Environment
from bench.model import NotNegative, from_json
from bench.records import layers, run
from bench.records.documents import read_bytes, read_object, schema_of
from common.errors import UsageError

RUN, LAYERS, PYTEST_BENCHMARK = "convbench run", "convbench layers", "pytest-benchmark"
GROUPS = ("machine", "gpu", "threads", "data", "math")
MEMORY = "memory in bytes"
COMMIT_DIGITS = 10

Settings = dict[str, dict[str, Any]]
"""For each of ``GROUPS``, values by name; a value that the file does not state is None or empty."""


@dataclasses.dataclass(frozen=True)
class SampleRow:
    """One row: samples in seconds, or the reason why it has none."""

    samples: Sequence[float]
    settings: Settings
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class SampleFile:
    """The rows of a file, and the conditions that they were measured under."""

    path: Path
    kind: str
    """``convbench run``, ``convbench layers`` or ``pytest-benchmark``."""
    rows: dict[str, SampleRow]
    settings: Settings
    software: dict[str, Any]
    """Commit and versions of Python and libraries. They may differ; a comparison reports it."""
    warnings: list[str] = field(default_factory=list)


def read_samples(path: Path) -> SampleFile:
    """Read a file with samples; UsageError if it is of another kind, is not valid, or holds only summaries."""
    data = read_bytes(path)
    if is_pytest_benchmark(read_object(path, data)):
        return _from_pytest_benchmark(path, data)
    schema = schema_of(path, data)
    if schema in (run.SCHEMA, run.OLD_SCHEMA):
        return _from_run(path)
    if schema == layers.SCHEMA:
        return _from_layers(path)
    raise UsageError(f"{path} has schema {schema!r}: compare takes files of {RUN}, {LAYERS} and {PYTEST_BENCHMARK}")


def is_pytest_benchmark(found: dict[str, Any]) -> bool:
    """Whether this is the content of a file that pytest-benchmark saved."""
    return "schema" not in found and "benchmarks" in found


# convbench's own ------------------------------------------------------------------------------------------------------


def _from_run(path: Path) -> SampleFile:
    record = run.read_run(path)
    data = {name: getattr(record.config, name) for name in ("data", "samples", "batch_size", "learning_rate", "seed")}
    rows = {}
    for row in record.rows:
        settings = _row_settings(row.device, row.precision, record.environment)
        rows[row.id] = _sample_row(row.epoch_s, settings, _reason(row, "epochs"))
    warnings = [*(["it was interrupted"] if record.interrupted else []), *record.warnings]
    return _sample_file(path, RUN, rows, data, record, warnings)


def _from_layers(path: Path) -> SampleFile:
    record = layers.read_layers(path)
    data = {name: getattr(record.config, name) for name in ("batch_size", "seed")}
    rows = {}
    for row in record.rows:
        settings, reason = _row_settings(row.device, row.precision, record.environment), _reason(row, "steps")
        rows[f"{row.id} whole step"] = _sample_row(row.step_s, settings, reason)
        for times in row.operations:
            rows[f"{row.id} {times.stage} {times.operation}"] = _sample_row(times.seconds, settings, reason)
    return _sample_file(path, LAYERS, rows, data, record, record.warnings)


def _sample_file(
    path: Path,
    kind: str,
    rows: dict[str, SampleRow],
    data: dict[str, Any],
    record: run.RunRecord | layers.LayersRecord,
    warnings: list[str],
) -> SampleFile:
    environment = record.environment
    settings = {
        "machine": _machine(environment),
        "threads": {"threads": environment.threads},
        "data": data,
        "math": {"--math": record.config.precision},
    }
    software = _software(environment, environment.commit, environment.dirty)
    return SampleFile(path, kind, rows, settings, software, warnings)


def _reason(row: run.RunRow | layers.LayerRow, samples: str) -> str:
    """Why the row has no samples that count; empty if it has."""
    if row.finished:
        return ""
    return row.reason or (f"no {samples}" if row.verified else "not verified")


def _machine(environment: Environment | SuiteEnvironment) -> dict[str, Any]:
    return {
        "cpu": environment.cpu,
        "cores": environment.cores,
        MEMORY: environment.memory_bytes,
        "system": environment.system,
    }


def _row_settings(device: Any, precision: Any, environment: Environment | SuiteEnvironment) -> Settings:
    """Device and arithmetic can differ from row to row; the GPU counts only for a row that used it."""
    gpu = environment.gpu if device == "gpu" else None
    return {
        "gpu": {"device": device, "GPU": gpu and gpu.name, "driver": gpu and gpu.driver},
        "math": {"math": precision},
    }


def _software(environment: Environment | SuiteEnvironment, commit: str | None, dirty: bool | None) -> dict[str, Any]:
    changed = " with changes" if dirty else ""
    return {
        "commit": f"{commit[:COMMIT_DIGITS]}{changed}" if commit else None,
        "Python": environment.python,
        **environment.libraries,
        "NUMBA_OPT": environment.numba_opt,
    }


def _sample_row(samples: Sequence[float], settings: Settings, reason: str = "") -> SampleRow:
    """A row whose samples can form a ratio, or a row with the reason why they cannot."""
    if not reason and min(samples) <= 0:
        reason = "it was too short for the clock: a sample is 0 s"
    return SampleRow((), settings, reason) if reason else SampleRow(samples, settings)


# pytest-benchmark's ---------------------------------------------------------------------------------------------------

LENIENT = ConfigDict(extra="ignore", allow_inf_nan=False)
"""For files that another program writes: only the fields that are used here are checked."""


@dataclass(config=LENIENT)
class SuiteGpu:
    """The GPU as this suite's benchmarks describe it."""

    name: str | None = None
    driver: str | None = None


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
    gpu: SuiteGpu | None = None


@dataclass(config=LENIENT)
class Processor:
    """The processor as py-cpuinfo describes it."""

    brand_raw: str | None = None
    count: int | None = None


@dataclass(config=LENIENT)
class MachineInfo:
    """The machine as pytest-benchmark describes it."""

    system: str | None = None
    machine: str | None = None
    python_version: str | None = None
    cpu: Processor | None = None
    convbench: SuiteEnvironment | None = None

    @property
    def environment(self) -> SuiteEnvironment:
        """What this suite wrote; for another suite, what pytest-benchmark found."""
        cpu = self.cpu or Processor()
        return self.convbench or SuiteEnvironment(
            cpu=cpu.brand_raw, cores=cpu.count, system=f"{self.system} {self.machine}", python=self.python_version
        )


@dataclass(config=LENIENT)
class CommitInfo:
    """The state of the checkout."""

    id: str | None = None
    dirty: bool | None = None


@dataclass(config=LENIENT)
class BenchmarkStats:
    """The samples in seconds; None in a file that was saved without them."""

    data: Annotated[list[NotNegative], Field(min_length=1)] | None = None


@dataclass(config=LENIENT)
class ExtraInfo:
    """What this suite's benchmarks add to a result. Another suite may use the same names for anything."""

    device: Any = None
    math: Any = None
    threads: Any = None
    network: Any = None
    batch_size: Any = None
    epoch_pictures: Any = None
    verified: Any = None
    suspicious: Any = None

    @property
    def reason(self) -> str:
        """Why the time does not count; empty if it does."""
        return str(self.suspicious or ("not verified" if self.verified is False else ""))


@dataclass(config=LENIENT)
class Benchmark:
    """One benchmark."""

    fullname: str
    stats: BenchmarkStats
    extra_info: ExtraInfo | None = None


@dataclass(config=LENIENT)
class BenchmarkFile:
    """A file as ``--benchmark-json`` or ``--benchmark-save`` writes it."""

    machine_info: MachineInfo
    benchmarks: Annotated[list[Benchmark], Field(min_length=1)]
    commit_info: CommitInfo | None = None


def _from_pytest_benchmark(path: Path, data: bytes) -> SampleFile:
    found = from_json(BenchmarkFile, data, path, "file of pytest-benchmark")
    environment, commit = found.machine_info.environment, found.commit_info or CommitInfo()
    rows = {}
    for benchmark in found.benchmarks:
        name = benchmark.fullname
        if benchmark.stats.data is None:
            raise UsageError(
                f"{path} has no single samples of {name}, only statistics: save it with --benchmark-save-data, or "
                "write it with --benchmark-json"
            )
        if name in rows:
            raise UsageError(f"{path} is not a valid file of pytest-benchmark: two benchmarks are called {name}")
        rows[name] = _benchmark_row(benchmark.stats.data, benchmark.extra_info or ExtraInfo(), environment)
    software = _software(environment, commit.id, commit.dirty)
    return SampleFile(path, PYTEST_BENCHMARK, rows, {"machine": _machine(environment)}, software)


def _benchmark_row(samples: list[float], about: ExtraInfo, environment: SuiteEnvironment) -> SampleRow:
    settings = {
        **_row_settings(about.device, about.math, environment),
        "threads": {"threads": about.threads},
        "data": {name: getattr(about, name) for name in ("network", "batch_size", "epoch_pictures")},
    }
    return _sample_row(samples, settings, about.reason)
