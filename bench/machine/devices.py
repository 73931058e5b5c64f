"""The devices of this machine, and the reason if one cannot be used.

Nothing here imports CUDA code at module level, so a machine without a GPU imports everything. The probe really imports
and calls what a run needs, cuBLAS included: package metadata and CuPy's configuration can report cuBLAS as present when
it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.backend import Device
from common.device import in_simulator
from common.errors import UsageError

GPU_INSTALL_HINT = 'install the GPU packages with: python -m pip install -e ".[cuda12]" (or ".[cuda13]")'
ROOT = Path(__file__).resolve().parent.parent.parent
DEVICES: tuple[Device, ...] = ("cpu", "gpu")


@dataclass(frozen=True)
class DeviceStatus:
    """Whether a device can be used; if not, ``reason`` says why."""

    device: Device
    available: bool
    name: str
    reason: str = ""


@dataclass(frozen=True)
class Probe:
    """The result of one attempt."""

    what: str
    ok: bool
    detail: str


def device_status(device: Device) -> DeviceStatus:
    """Whether ``device`` can be used, and its model."""
    if device == "cpu":
        return DeviceStatus("cpu", True, cpu_name())
    probes = probe_gpu()
    last = probes[-1]
    if last.ok:
        return DeviceStatus("gpu", True, probes[0].detail)
    return DeviceStatus("gpu", False, "", f"{last.what}: {last.detail}")


def choose_device(asked: str) -> DeviceStatus:
    """The device for ``auto``, ``cpu`` or ``gpu``; UsageError with the reason if it cannot be used. No fallback."""
    if asked not in ("auto", *DEVICES):
        raise UsageError(f"unknown device {asked!r}: choose from auto, {', '.join(DEVICES)}")
    if asked != "cpu":
        status = device_status("gpu")
        if status.available:
            return status
        if asked == "gpu":
            raise UsageError(f"--device gpu cannot run here: {status.reason}. Choose cpu or auto")
    return device_status("cpu")


def cpu_name() -> str:
    """The processor's model as the system reports it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cpu_cache_bytes() -> int | None:
    """Size of the processor's last cache; None where Linux does not report it."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = (re.fullmatch(r"(\d+)([KMG])", file.read_text().strip()) for file in files)
    return max((int(size[1]) * 1024 ** (1 + "KMG".index(size[2])) for size in sizes if size), default=None)


def child_environment() -> dict[str, str]:
    """Environment variables of a child process.

    With them it imports this code, and nothing from the current folder, and numbers the GPUs as NVML does.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # an empty entry would be the current folder
    return {
        **os.environ,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }


@contextlib.contextmanager
def nvml_gpu() -> Iterator[tuple[Any, Any]]:
    """NVML, and its handle of CUDA's first GPU; RuntimeError if there is none.

    NVML numbers GPUs by bus and ignores CUDA_VISIBLE_DEVICES, so this function applies that variable.
    ``child_environment`` lets CUDA number them in the same way.
    """
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if visible in ("", "-1"):
        raise RuntimeError("CUDA_VISIBLE_DEVICES hides every GPU")
    pynvml.nvmlInit()
    try:
        if visible.isdigit():
            yield pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(visible))
        else:
            yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(visible)
    finally:
        pynvml.nvmlShutdown()


# Probes -------------------------------------------------------------------------------------------------------------


def probe_gpu(*, thorough: bool = False) -> list[Probe]:
    """Try everything that the GPU versions need, in order, up to the first failure.

    ``thorough`` also compares the versions of CUDA and runs a kernel and a product, each even if another fails. A child
    process creates the CUDA contexts, so that they do not hold device memory during a measurement.
    """
    if in_simulator():
        return [Probe("real device", False, "NUMBA_ENABLE_CUDASIM is set: Numba's simulator is not a GPU")]
    driver = attempt("NVIDIA driver", _driver, "a machine with an NVIDIA GPU and its driver is needed")
    if not driver.ok:
        return [driver]
    program = f"import bench.machine.gpu_probes as probes; probes.print_probes(thorough={thorough})"
    command = [sys.executable, "-c", program]
    try:
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300, check=True)
        return [driver, *(Probe(*found) for found in json.loads(done.stdout.splitlines()[-1]))]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return [driver, Probe("CUDA libraries", False, f"trying them failed: {type(error).__name__}")]


def attempt(what: str, action: Callable[[], str], hint: str) -> Probe:
    """Call ``action`` for the detail; if it fails, the detail is its error, with ``hint`` unless a result is wrong."""
    try:
        return Probe(what, True, action())
    except Exception as error:  # a driver or a library can fail to load in many ways
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        return Probe(what, False, first_line if isinstance(error, ArithmeticError) else f"{first_line}; {hint}")


def _driver() -> str:
    with nvml_gpu() as (nvml, gpu):
        return nvml.nvmlDeviceGetName(gpu)
