"""What a figure depends on besides the code: processor, GPU, libraries, threads, commit. No names of hosts."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import sys
from typing import Any

import psutil

from bench.machine.devices import ROOT, child_environment, cpu_name, nvml_gpu
from common.backend import Device
from common.device import usable_cores

CODE = ("bench", "common", "versions", "pyproject.toml")
LIBRARIES = ("numpy", "numba", "scipy", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "torch")
WORKER_NUMBA_OPT = "2"
"""LLVM's level for the workers: level 2 compiles parallel loops faster than Numba's default, 3; recorded."""


def worker_environment(threads: int) -> dict[str, str]:
    """Environment variables of a worker: thread counts are fixed before anything that reads them is imported."""
    fixed = {
        "NUMBA_NUM_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS": "0",  # small grids are part of the network
    }
    return {"NUMBA_OPT": WORKER_NUMBA_OPT, **child_environment(), **fixed}


def describe_environment(device: Device, threads: int, command_line: list[str]) -> dict[str, Any]:
    """Everything about the machine and the software that a result is recorded with."""
    commit, dirty = git_state()
    environment = {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "threads": threads,
        "numba_opt": worker_environment(threads)["NUMBA_OPT"],
        "commit": commit,
        "dirty": dirty,
        "command_line": command_line,
    }
    if device == "gpu":
        environment["gpu"] = describe_gpu()
    return environment


def describe_gpu() -> dict[str, Any]:
    """The GPU that is used, as NVML names it."""
    with nvml_gpu() as (nvml, gpu):
        cuda = nvml.nvmlSystemGetCudaDriverVersion()
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu)
        return {
            "name": nvml.nvmlDeviceGetName(gpu),
            "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(gpu).total,
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
            "compute_capability": f"{major}.{minor}",
            "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        }


def gpu_used_bytes() -> int:
    """Device memory in use by everyone, from NVML, which needs no context of its own."""
    with nvml_gpu() as (nvml, gpu):
        return nvml.nvmlDeviceGetMemoryInfo(gpu).used


def peak_process_bytes() -> int:
    """Largest resident set that this process has had."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def git_state() -> tuple[str, bool]:
    """Short commit of the code that runs, and whether that code differs from it; ("nogit", True) outside a checkout."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    if commit is None:
        return "nogit", True
    return commit, bool(_git("status", "--porcelain", "--", *CODE))


def machine_label(environment: dict[str, Any]) -> str:
    """What a figure was measured on, as charts say it: the GPU, or the processor with its threads."""
    gpu = environment.get("gpu")
    return gpu["name"] if gpu else f"{environment['cpu']}, {environment['threads']} threads"


def machine_slug(environment: dict[str, Any]) -> str:
    """A file-name part that tells machines apart by their processor: ``nvidia-h200`` or ``amd-epyc-2c``."""
    gpu = environment.get("gpu")
    name = gpu["name"] if gpu else f"{environment['cpu']} {environment['cores']}c"
    name = re.sub(r"\((r|tm)\)|processor|cpu|@.*ghz", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
