"""Registers of the kernels that a call launches, as compiled for the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.backend import Backend


def kernel_registers(backend: Backend, call: Callable[[], None]) -> dict[str, int] | None:
    """Registers a thread of each Numba kernel that ``call`` launches, as compiled for this GPU; None on a CPU.

    A kernel compiled for several argument types counts with its largest. Numba knows nothing of cuBLAS's kernels.
    """
    if backend.device != "gpu":
        return None
    launch_grid = backend.launch_grid
    launched: dict[int, Any] = {}

    def recording(kernel: Any, *arguments: Any) -> None:
        launched[id(kernel)] = kernel
        launch_grid(kernel, *arguments)

    backend.launch_grid = recording
    try:
        call()
        backend.synchronize()
    finally:
        del backend.launch_grid
    registers: dict[str, int] = {}
    for kernel in launched.values():
        name = kernel.py_func.__name__  # kernels made by one function share it
        registers[name] = max(registers.get(name, 0), *kernel.get_regs_per_thread().values())
    return registers
