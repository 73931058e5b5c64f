"""Every GPU kernel that a version launches, compiled for real targets without a GPU.

The list is not written down anywhere: a training step of the real network is run on a runtime that launches nothing and
records which kernels were asked for and with which types. A new version, or a new kernel of an old one, is therefore
covered as soon as it is used. libNVVM turns each into PTX and ptxas into machine code, and reports registers, spills,
stack and shared memory; both come with ``numba-cuda[cu12]`` and need no driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np

from common.architecture import Architecture, autoencoder
from common.network import Network, initial_parameters
from versions.registry import BackendInfo

TARGETS = ((7, 5), (8, 0), (9, 0), (10, 0))


@dataclass(frozen=True)
class CompiledKernel:
    """What the compilers say of one kernel for one target."""

    name: str
    target: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    uses_float64: bool


class RecordingRuntime:
    """Stands where a GPU would: hands out host memory that nothing touches, and records launches."""

    threads_per_block = 256

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self.launches: dict[tuple[Any, tuple], None] = {}  # a set that keeps its order

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Reserve address space of the right shape and type."""
        return np.empty(shape, dtype)

    def write(self, buffer: np.ndarray, array: np.ndarray) -> None:
        """Ignore: values do not matter here."""

    def read(self, buffer: np.ndarray) -> np.ndarray:
        """Return the buffer, whatever is in it."""
        return buffer

    def synchronize(self) -> None:
        """Nothing is under way."""

    def gemm(self, *arguments: Any, **options: Any) -> None:
        """Ignore: cuBLAS is not ours to compile."""

    def bind(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...]) -> Any:
        """Return a launcher that records the kernel and the types it was given."""

        def record(*arguments: Any) -> None:
            self.launches[kernel, tuple(numba.typeof(argument) for argument in arguments)] = None

        return record


def recorded_launches(info: BackendInfo, architecture: Architecture | None = None, batch_size: int = 64) -> list:
    """Pairs of kernel and argument types of one training step of a version."""
    from importlib import import_module

    architecture = architecture or autoencoder()
    runtime = RecordingRuntime()
    backend = import_module(f"{info.package}.gpu").make_backend(runtime=runtime)
    network = Network(backend, architecture, batch_size, initial_parameters(architecture, 0))
    images = backend.empty((batch_size, *architecture.input_shape), np.uint8)
    order, losses = backend.empty((batch_size,), np.int32), backend.empty((1,))
    network.step(images, order, 0, batch_size, 0.001, losses, 0)
    return list(runtime.launches)


def compile_kernel(kernel: Any, types: tuple, target: tuple[int, int]) -> CompiledKernel:
    """Compile one kernel through libNVVM and ptxas; raises what they raise."""
    from numba import cuda

    ptx, _ = cuda.compile(kernel.py_func, types, device=False, cc=target, abi="numba", output="ptx", fastmath=False)
    name = f"sm_{target[0]}{target[1]}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [str(ptxas_path()), "-v", f"-arch={name}", str(source), "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=False,
        )
    report = done.stderr + done.stdout
    if done.returncode:
        raise RuntimeError(f"ptxas refused {kernel.py_func.__name__} for {name}: {report.strip()}")
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", report)]
    return CompiledKernel(
        name=kernel.py_func.__name__,
        target=name,
        registers=max(registers),
        shared_bytes=max(shared, default=0),
        stack_bytes=max(stack, default=0),
        spill_bytes=sum(spills),
        uses_float64=bool(re.search(r"\.f64", ptx)),
    )


def ptxas_path() -> Path:
    """The ptxas that ``nvidia-cuda-nvcc`` installed; FileNotFoundError if it did not."""
    from importlib.metadata import PackageNotFoundError, files

    for distribution in ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"):
        try:
            found = [Path(file.locate()) for file in files(distribution) or () if file.name in ("ptxas", "ptxas.exe")]
        except PackageNotFoundError:
            continue
        if found:
            return found[0]
    raise FileNotFoundError("no ptxas: install numba-cuda[cu12]")
