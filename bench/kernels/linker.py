"""Link a kernel as a real run does, and list its machine code; neither needs a GPU or a driver.

At a launch, numba-cuda lets libNVVM write an intermediate form (LTO-IR) for the card, and nvJitLink optimises it, links
it and assigns registers. ``link`` takes the same steps with the same options; see ``_Kernel`` in numba-cuda's
``dispatcher.py``, ``get_ltoir`` and ``get_cubin`` in ``codegen.py``, and ``_Linker`` in ``cudadrv/driver.py``. Checked
with numba-cuda 0.30.4: the code is that of a real launch, instruction by instruction.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.kernels.targets import Target, target_name
from common.errors import UsageError

DISASSEMBLER_HINT = "the machine code cannot be read, nvdisasm is missing: python -m pip install nvidia-cuda-nvdisasm"


@dataclass(frozen=True)
class Linked:
    """A kernel as the linker leaves it."""

    cubin: bytes
    ptx: str
    """The same code before registers are assigned."""
    report: str
    """Registers, spills and memory, in the linker's words."""


def link(function: Callable, types: tuple, target: Target, registers: int | None) -> Linked:
    """Link a kernel's Python function under a register bound.

    Numba, libNVVM and nvJitLink raise many types of exception.
    """
    from numba import cuda

    code, _ = cuda.compile(function, types, device=False, cc=target, abi="numba", output="ltoir", fastmath=False)
    # ``verbose`` adds the report and changes no code.
    cubin, report = _linked(code, target, "cubin", max_register_count=registers, lineinfo=False, verbose=True)
    ptx, _ = _linked(code, target, "ptx", ptx=True)
    return Linked(cubin, ptx.decode(), report)


def _linked(code: bytes, target: Target, output: str, **options: Any) -> tuple[bytes, str]:
    from cuda.core import Linker, LinkerOptions, ObjectCode

    chosen = LinkerOptions(arch=target_name(target), link_time_optimization=True, **options)
    linker = Linker(ObjectCode.from_ltoir(code), options=chosen)
    try:
        return linker.link(output).code, linker.get_info_log()
    finally:
        linker.close()


def disassembler() -> str | None:
    """The path of nvdisasm, from its package for Python or a CUDA toolkit; None if there is none."""
    from cuda import pathfinder

    return pathfinder.find_nvidia_binary_utility("nvdisasm")


def disassemble(cubin: bytes) -> str:
    """The listing of the machine code; CalledProcessError if nvdisasm refuses it, UsageError if there is none."""
    program = disassembler()
    if program is None:
        raise UsageError(DISASSEMBLER_HINT)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        # Without its analysis of indirect jumps, which no kernel has, it takes three quarters of the time.
        command = [program, "--print-code", "--no-dataflow", file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
