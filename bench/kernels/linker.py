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
from pathlib import Path

from bench.kernels.targets import Target, target_name
from common.errors import UsageError

DISASSEMBLER_HINT = "the machine code cannot be read, nvdisasm is missing: python -m pip install nvidia-cuda-nvdisasm"


def link(function: Callable, types: tuple, target: Target, registers: int | None) -> tuple[bytes, str]:
    """Link a kernel's Python function under a register bound: its cubin, and what the linker reports of it.

    Numba, libNVVM and nvJitLink raise many types of exception.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda

    code, _ = cuda.compile(function, types, device=False, cc=target, abi="numba", output="ltoir", fastmath=False)
    options = LinkerOptions(
        arch=target_name(target),
        max_register_count=registers,
        link_time_optimization=True,
        lineinfo=False,
        verbose=True,  # adds the report and changes no code
    )
    linker = Linker(ObjectCode.from_ltoir(code), options=options)
    try:
        return linker.link("cubin").code, linker.get_info_log()
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
