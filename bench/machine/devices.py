"""Which devices this machine has, and if one cannot be used, why not.

Nothing here imports CUDA code at module level: a machine with no GPU imports and runs everything. "Installed" is not
believed: the imports that a run needs are made for real, cuBLAS included, because package metadata and CuPy's own
configuration report it present when it is not.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
    """Whether a device can be used; ``reason`` says why not, and is empty where it can."""

    device: Device
    available: bool
    name: str
    reason: str = ""


@dataclass(frozen=True)
class Probe:
    """One thing that was tried for real."""

    what: str
    ok: bool
    detail: str


def cpu_name() -> str:
    """The processor's model as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def child_environment() -> dict[str, str]:
    """Environment of a process of the suite's own.

    It imports this code, not whatever lies in the folder that the user stands in, and counts GPUs as NVML does.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # an empty entry would mean the user's folder
    return {
        **os.environ,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(path),
    }


def probe_gpu() -> list[Probe]:
    """Try, in order, everything that the GPU versions need; stops at the first failure.

    A process of its own makes the CUDA contexts: held here, they would take device memory from what is measured.
    """
    if in_simulator():
        return [Probe("real device", False, "NUMBA_ENABLE_CUDASIM is set: Numba's simulator is not a GPU")]
    driver = _attempt(*STEPS[0])
    if not driver.ok:
        return [driver]
    command = [sys.executable, "-c", "import bench.machine.devices as d; d.print_probes()"]
    try:
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300, check=True)
        return [Probe(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return [driver, Probe("CUDA libraries", False, f"trying them failed: {type(error).__name__}")]


def print_probes() -> None:
    """Make every attempt in this process and print the outcome as JSON, for ``probe_gpu``."""
    probes = []
    for what, action, hint in STEPS:
        probes.append(_attempt(what, action, hint))
        if not probes[-1].ok:
            break
    print(json.dumps([asdict(probe) for probe in probes]))


def _attempt(what: str, action: Callable[[], str], hint: str) -> Probe:
    try:
        return Probe(what, True, action())
    except Exception as error:  # any failure to load a driver or a library is an answer here, not a crash
        first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Probe(what, False, f"{first_line}; {hint}")


def device_status(device: Device) -> DeviceStatus:
    """Whether ``device`` can be used here, and its model."""
    if device == "cpu":
        return DeviceStatus("cpu", True, cpu_name())
    probes = probe_gpu()
    failed = next((probe for probe in probes if not probe.ok), None)
    if failed:
        return DeviceStatus("gpu", False, "", f"{failed.what}: {failed.detail}")
    return DeviceStatus("gpu", True, probes[0].detail)


def choose_device(asked: str) -> DeviceStatus:
    """Resolve ``auto``; UsageError with the reason if what was asked for is not there. Never falls back."""
    if asked not in ("auto", *DEVICES):
        raise UsageError(f"unknown device {asked!r}: choose from auto, {', '.join(DEVICES)}")
    if asked == "cpu":
        return device_status("cpu")
    status = device_status("gpu")
    if status.available:
        return status
    if asked == "gpu":
        raise UsageError(f"--device gpu cannot run here: {status.reason}. Choose cpu or auto")
    return device_status("cpu")


@contextlib.contextmanager
def nvml_gpu() -> Iterator[tuple[Any, Any]]:
    """NVML, and its handle of the GPU that CUDA calls the first.

    NVML counts by bus and does not know CUDA_VISIBLE_DEVICES, so that is followed here; processes that use the GPU are
    given CUDA_DEVICE_ORDER=PCI_BUS_ID, which makes CUDA count the same way. Raises RuntimeError where there is none.
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


def _driver() -> str:
    with nvml_gpu() as (nvml, gpu):
        return nvml.nvmlDeviceGetName(gpu)


def _numba_cuda() -> str:
    from numba import cuda

    importlib.import_module("numba_cuda")
    cuda.current_context()
    return f"{importlib.metadata.version('numba-cuda')}"


def _cupy() -> str:
    import cupy

    cupy.zeros(1).sum().item()
    return cupy.__version__


def _cublas() -> str:
    from cupy.cuda import cublas

    handle = cublas.create()
    try:
        return f"version {cublas.getVersion(handle)}"
    finally:
        cublas.destroy(handle)


STEPS: tuple[tuple[str, Callable[[], str], str], ...] = (
    ("NVIDIA driver", _driver, "a machine with an NVIDIA GPU and its driver is needed"),
    ("numba-cuda", _numba_cuda, GPU_INSTALL_HINT),
    ("CuPy", _cupy, GPU_INSTALL_HINT),
    ("cuBLAS through CuPy", _cublas, GPU_INSTALL_HINT),
)
