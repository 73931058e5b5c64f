"""The suite's own pytest options, what of the machine goes into saved files, and where those lie.

``tests/conftest.py`` imports the hooks, so that pytest knows the options before it reads any test, whatever folder it
is given.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from typing import Any

import pytest

from bench.machine.devices import DEVICES, DeviceStatus, device_status, nvml_gpu
from bench.machine.environment import Environment, describe_environment, worker_environment
from common.architecture import Architecture, autoencoder
from common.backend import PRECISIONS, Device, Precision
from common.device import usable_cores
from common.errors import UsageError
from versions.registry import REGISTRY, BackendInfo, find, names

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this is one of several processes of pytest-xdist; read before ``conftest.py`` hides it from children."""

CACHES = ("warm", "cold")
NETWORKS = ("full", "tiny")
BATCH_SIZE = 64
EPOCH_PICTURES: dict[Device, int] = {"cpu": 64, "gpu": 2_048}
TINY_BATCH, TINY_EPOCH = 5, 7  # odd, and with a smaller last batch

FIXED_AT_IMPORT = ("NUMBA_OPT", "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "CUDA_DEVICE_ORDER")

# The same at every run on a machine but for these; the commit has a place of its own in the file.
CHANGES_BETWEEN_RUNS = ("command_line", "commit", "dirty")


@dataclass(frozen=True)
class Settings:
    """What was asked for, every default filled in."""

    versions: tuple[BackendInfo, ...]
    devices: tuple[Device, ...]
    precision: Precision
    threads: int
    caches: tuple[str, ...]
    timed: bool
    tiny: bool
    asked_batch_size: int
    asked_epoch_pictures: int | None

    @property
    def architecture(self) -> Architecture:
        """The network: the real one when timing, unless the tiny one was asked for."""
        return autoencoder((8, 8), (5, 4)) if self.tiny else autoencoder()

    @property
    def batch_size(self) -> int:
        """Pictures a step."""
        return TINY_BATCH if self.tiny else self.asked_batch_size

    def epoch_pictures(self, device: Device) -> int:
        """Pictures an epoch."""
        return TINY_EPOCH if self.tiny else self.asked_epoch_pictures or EPOCH_PICTURES[device]

    def batch_sizes(self, device: Device) -> list[int]:
        """The sizes of batch that are timed: the full one, and the epoch's last if that is another."""
        return sorted({self.batch_size, self.epoch_pictures(device) % self.batch_size} - {0}, reverse=True)


SETTINGS = pytest.StashKey[Settings]()


@functools.cache
def status_of(device: Device) -> DeviceStatus:
    """Whether a device can be used; asked once, since for a GPU that starts a process."""
    return device_status(device)


def pytest_addoption(parser):
    group = parser.getgroup("convbench", "convbench: what the benchmarks in tests/benchmarks time")

    def option(name, text, **more):
        group.addoption(f"--{name}", dest=f"convbench_{name.replace('-', '_')}", help=text, **more)

    one_of = ", ".join
    option("backend", f"A version, repeatable: {one_of(names())} or all (default).", action="append", metavar="NAME")
    option("device", "cpu or gpu, repeatable; by default all that can run.", action="append", metavar="DEVICE")
    option("math", "fp32 (default), or tf32 for cuBLAS on a GPU.", default="fp32", metavar="MATH")
    option("threads", "CPU threads; all cores by default.", type=int, metavar="N")
    option(
        "batch-size", f"Pictures a step when timed (default {BATCH_SIZE}).", type=int, default=BATCH_SIZE, metavar="N"
    )
    pictures = " and ".join(f"{count:,} on a {device.upper()}" for device, count in EPOCH_PICTURES.items())
    option("epoch-pictures", f"Pictures an epoch when timed (default {pictures}).", type=int, metavar="N")
    option("cache", "warm (default) or cold, repeatable: caches before a call.", action="append", metavar="STATE")
    option(
        "network", "full (default) or tiny: what is timed. Untimed it is always tiny.", default="full", metavar="SIZE"
    )


def choose(config: pytest.Config) -> Settings:
    """Read the options; UsageError names a wrong value and the valid ones."""

    def asked(name: str) -> Any:
        return config.getoption(f"convbench_{name}")

    for name, choices in (("backend", (*names(), "all")), ("device", DEVICES), ("cache", CACHES)):
        for value in asked(name) or ():
            _one_of(name, value, choices)
    _one_of("math", asked("math"), PRECISIONS)
    _one_of("network", asked("network"), NETWORKS)
    for name in ("batch_size", "epoch_pictures"):
        if asked(name) is not None and asked(name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {asked(name)}: must be at least 1")
    cores = usable_cores()
    if asked("threads") is not None and not 1 <= asked("threads") <= cores:
        raise UsageError(f"--threads {asked('threads')}: choose from 1 to {cores}, the cores of this machine")
    if "gpu" in (asked("device") or ()) and not status_of("gpu").available:
        raise UsageError(f"--device gpu cannot run here: {status_of('gpu').reason}")
    backends = asked("backend") or ["all"]
    timed = is_timed(config)
    return Settings(
        versions=REGISTRY if "all" in backends else tuple(dict.fromkeys(find(name) for name in backends)),
        devices=tuple(dict.fromkeys(asked("device") or DEVICES)),
        precision=asked("math"),
        threads=asked("threads") or cores,
        caches=tuple(dict.fromkeys(asked("cache") or CACHES[:1])),
        timed=timed,
        tiny=not timed or asked("network") == "tiny",
        asked_batch_size=asked("batch_size"),
        asked_epoch_pictures=asked("epoch_pictures"),
    )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"unknown {name} {value!r}: choose from {', '.join(choices)}")


def is_timed(config: pytest.Config) -> bool:
    """Whether pytest-benchmark will time; pytest-xdist turns that off, because its processes disturb one another."""
    if config.getoption("dist", "no") != "no" or PARALLEL:
        return False
    return config.getoption("benchmark_enable") or not config.getoption("benchmark_disable")


def pytest_configure(config):
    """Before pytest-benchmark's own, which comes last."""
    given = [str(argument) for argument in config.invocation_params.args]
    # Timing is off by default (see addopts); whoever wants nothing but benchmarks wants them timed.
    if config.getoption("benchmark_only") and "--benchmark-disable" not in given:
        config.option.benchmark_enable = True
    if is_timed(config):
        config.option.benchmark_save_data = True  # without the samples, saved files cannot be compared
        # As in the processes of ``convbench run``. Numba and CUDA read these when they are first imported.
        os.environ.update({name: worker_environment(1)[name] for name in FIXED_AT_IMPORT})
    try:
        settings = config.stash[SETTINGS] = choose(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    if settings.timed and not any(argument.startswith("--benchmark-storage") for argument in given):
        config.option.benchmark_storage = default_storage(config, settings)


def default_storage(config: pytest.Config, settings: Settings) -> str:
    """Where saved files go: a folder for this processor and, if one is timed, this GPU."""
    folder = "_".join(environment.machine_slug for environment in _environments(settings))
    return f"file://{config.rootpath / 'results' / 'benchmarks' / folder}"


def _environments(settings: Settings) -> list[Environment]:
    """What describes the processor and, if one is timed, what describes the GPU."""
    devices = ("cpu", "gpu") if "gpu" in _running(settings) else ("cpu",)
    return [describe_environment(device, settings.threads, []) for device in devices]


def _running(settings: Settings) -> list[Device]:
    """Those of the chosen devices that are here."""
    return [device for device in settings.devices if status_of(device).available]


def pytest_benchmark_update_machine_info(config, machine_info):
    """Add what figures depend on, and remove what differs from run to run: pytest-benchmark warns of any difference."""
    settings = config.stash[SETTINGS]
    machine_info.pop("node", None)
    processor = machine_info.get("cpu", {})
    for name in [name for name in processor if name.startswith("hz_")]:
        del processor[name]  # the clock of the moment, or guessed from it
    environment = asdict(_environments(settings)[-1])
    for name in CHANGES_BETWEEN_RUNS:
        del environment[name]
    if environment["gpu"]:
        del environment["gpu"]["sm_clock_mhz"]  # the clock of the moment, too
        environment["gpu"].update(highest_clocks())
    else:
        del environment["gpu"]
    if "numba" in sys.modules:  # it was there before this could set anything
        environment["numba_opt"] = str(int(sys.modules["numba"].config.OPT))
    machine_info["convbench"] = {
        **environment,
        "network": "tiny" if settings.tiny else "full",
        "math": settings.precision,
        "batch_size": settings.batch_size,
        "epoch_pictures": {device: settings.epoch_pictures(device) for device in _running(settings)},
    }


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(machine_info, compared_benchmark):
    """Refuse to compare with figures of another machine or other settings; pytest-benchmark would warn and go on."""
    now, then = (dict(_leaves(info)) for info in (machine_info, compared_benchmark["machine_info"]))
    different = [
        f"{name} {now.get(name)!r} instead of {then.get(name)!r}"
        for name in sorted(now.keys() | then.keys())
        if now.get(name) != then.get(name)
    ]
    if different:
        raise pytest.UsageError(f"--benchmark-compare: not the same machine and settings: {'; '.join(different)}")


def _leaves(info: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(``cpu.brand_raw``, value) of every value in nested dictionaries, as JSON would have it."""
    if isinstance(info, dict):
        for name, value in info.items():
            yield from _leaves(value, f"{path}.{name}" if path else name)
    else:
        yield path, list(info) if isinstance(info, tuple) else info


def highest_clocks() -> dict[str, int]:
    """The clocks, in MHz, that the GPU may reach."""
    with nvml_gpu() as (nvml, gpu):
        return {
            "highest_sm_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
            "highest_memory_clock_mhz": nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        }


# What is timed ------------------------------------------------------------------------------------------------------


def operation_names(settings: Settings, version: BackendInfo) -> list[str]:
    """``conv1-forward``, ``step-loss`` and so on, in the order of a step; or ``conv1-stage_forward``."""
    return [work.id for work in version.step_work(settings.architecture, 1)]


def cases(settings: Settings, operations: Callable[[Settings, BackendInfo], Sequence[str]]) -> list[Any]:
    """(version, device, operation, cache) of every benchmark; what cannot run here is skipped with the reason.

    ``operations`` names what a version has.
    """
    offered = {version: operations(settings, version) for version in settings.versions}
    named = dict.fromkeys(chain.from_iterable(offered.values()))
    found = []
    for operation, device, cache, version in product(named, settings.devices, settings.caches, settings.versions):
        if operation not in offered[version]:
            continue
        marks = []
        if device == "gpu":
            marks.append(pytest.mark.gpu)
            if not status_of("gpu").available:
                marks.append(pytest.mark.skip(reason=status_of("gpu").reason))
        case = (version.name, device, operation, cache)
        found.append(pytest.param(*case, id="-".join([*case[:3], *_apart(settings, *case)]), marks=marks))
    return found


def group(settings: Settings, version: str, device: Device, operation: str, cache: str) -> str:
    """What a benchmark is compared with: the same operation by other versions, all else being equal."""
    return " ".join([device, operation, *_apart(settings, version, device, operation, cache)])


def _apart(settings: Settings, version: str, device: Device, operation: str, cache: str) -> list[str]:
    """What must not be compared with the usual: float32, the real network in batches of 64, warm caches."""
    marks = []
    if find(version).effective_precision(device, settings.precision) == "tf32":
        marks.append("tf32")
    if settings.timed and settings.tiny:
        marks.append("tiny")
    elif settings.timed:
        if settings.batch_size != BATCH_SIZE:
            marks.append(f"batch{settings.batch_size}")
        if operation == "epoch" and settings.epoch_pictures(device) != EPOCH_PICTURES[device]:
            marks.append(f"{settings.epoch_pictures(device)}pictures")
    return [*marks, cache] if cache == "cold" else marks
