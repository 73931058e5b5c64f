"""What a time depends on besides the code: processor, GPU, libraries, threads, commit. Never a host name."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from dataclasses import field

import psutil
from pydantic.dataclasses import dataclass

from bench.machine.devices import ROOT, child_environment, cpu_name, nvml_gpu
from bench.model import CHECKED, AtLeastOne, Count
from common.backend import Device
from common.device import usable_cores

CODE = ("bench", "common", "versions", "pyproject.toml")
LIBRARIES = (
    "numpy", "numba", "scipy", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x",
    "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc", "nvidia-nvjitlink-cu12", "nvidia-nvjitlink", "torch",
)  # fmt: skip


def worker_environment(threads: int) -> dict[str, str]:
    """Environment variables of a worker; libraries read the thread counts when they are imported."""
    fixed = {
        "NUMBA_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS": "0",  # the network has small grids
    }
    # LLVM's level 2 compiles parallel loops faster than Numba's default, 3.
    return {"NUMBA_OPT": "2", **child_environment(), **fixed}


@dataclass(config=CHECKED)
class Gpu:
    """The GPU of a result, as NVML reports it. A field that an older file lacks is empty or None."""

    name: str
    memory_bytes: Count | None = None
    driver: str = ""
    cuda: str = ""
    compute_capability: str = ""
    sm_clock_mhz: Count | None = None


@dataclass(config=CHECKED)
class Environment:
    """The machine and the software of a result."""

    cpu: str
    cores: AtLeastOne
    threads: AtLeastOne
    commit: str
    dirty: bool = False
    """Whether the code differed from the commit."""
    memory_bytes: Count | None = None
    system: str = ""
    python: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    numba_opt: str = ""
    command_line: list[str] = field(default_factory=list)
    gpu: Gpu | None = None
    """None if no GPU was used."""

    @property
    def machine(self) -> str:
        """The machine as charts name it: the GPU, or the processor with its threads."""
        return self.gpu.name if self.gpu else f"{self.cpu}, {self.threads} threads"

    @property
    def machine_slug(self) -> str:
        """The machine as a part of a file name: ``nvidia-h200`` or ``amd-epyc-2c``."""
        name = self.gpu.name if self.gpu else f"{self.cpu} {self.cores}c"
        name = re.sub(r"\((r|tm)\)|processor|cpu|@.*ghz", "", name.lower())
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def describe_environment(device: Device, threads: int, command_line: list[str]) -> Environment:
    """Describe this machine and this installation; ``command_line`` is the user's command."""
    commit, dirty = git_state()
    return Environment(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries={name: version for name in LIBRARIES if (version := _version(name))},
        threads=threads,
        numba_opt=worker_environment(threads)["NUMBA_OPT"],
        commit=commit,
        dirty=dirty,
        command_line=command_line,
        gpu=_describe_gpu() if device == "gpu" else None,
    )


def _describe_gpu() -> Gpu:
    with nvml_gpu() as (nvml, gpu):
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu)
        return Gpu(
            name=nvml.nvmlDeviceGetName(gpu),
            memory_bytes=nvml.nvmlDeviceGetMemoryInfo(gpu).total,
            driver=nvml.nvmlSystemGetDriverVersion(),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
            compute_capability=f"{major}.{minor}",
            sm_clock_mhz=nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        )


def gpu_used_bytes() -> int:
    """Device memory that all processes use; NVML needs no CUDA context for that."""
    with nvml_gpu() as (nvml, gpu):
        return nvml.nvmlDeviceGetMemoryInfo(gpu).used


def peak_process_bytes() -> int:
    """Largest resident set of this process so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def git_state() -> tuple[str, bool]:
    """The short commit, and whether the code differs from it; ("nogit", True) outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD"), bool(git("status", "--porcelain", "--", *CODE))
    except (OSError, subprocess.SubprocessError):
        return "nogit", True


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
