"""How GPU kernels are declared and how they index: what a kernel file needs besides Numba.

Each kernel states its number of registers. On a real GPU the compiler may not exceed it, and the compile check fails
when a kernel needs more or spills to stay within it. A kernel whose time is arithmetic also states the least share of
multiply-adds (FFMA) among the instructions of its hot loop.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from common.device import in_simulator

# Casts an index that is never negative. Numba lets a signed index count from the end, as Python does. That costs three
# instructions a load and hides from the compiler that neighbouring loads can be combined into one wide load.
unsigned = np.uint64

# Masks for the index of a thread, of a block and into a tile. Such an AND changes no value, but tells the compiler that
# the index is not negative, so that dividing it by a power of two is a shift.
THREAD_BITS = 0x3FF
BLOCK_BITS = 0x7FFFFFFF
INDEX_BITS = 0xFFFF

# Bytes: shared arrays that are read in vectors of four floats are aligned to 16. The simulator takes no alignment.
ALIGNMENT = None if in_simulator() else 16


def gpu_kernel(*, registers: int, variant: str = "", ffma: float | None = None) -> Callable[[Callable], Any]:
    """Declare a kernel that needs at most ``registers`` 32-bit registers a thread.

    ``variant`` tells the kernels apart that one function builds. ``ffma`` is the least share of FFMA in its hot loop,
    between 0 and 1; None if its time is not arithmetic.
    """

    def declare(function: Callable) -> Any:
        # The simulator has no registers and no machine code.
        kernel = cuda.jit(function) if in_simulator() else cuda.jit(max_registers=registers)(function)
        kernel.variant, kernel.least_ffma = variant, ffma  # not among the options: those all go to the compiler
        return kernel

    return declare


def kernel_label(kernel: Any) -> str:
    """The name of a kernel, with its variant in brackets if it has one; a pickled copy has lost the variant."""
    name = (kernel.fn if in_simulator() else kernel.py_func).__name__
    variant = getattr(kernel, "variant", "")
    return f"{name}[{variant}]" if variant else name


def stated_registers(kernel: Any) -> int | None:
    """The number of registers that a kernel was declared with; None if it states none."""
    return kernel.targetoptions.get("max_registers")


def stated_ffma(kernel: Any) -> float | None:
    """The least FFMA share that a kernel was declared with, None if it states none; a pickled copy has lost it."""
    return getattr(kernel, "least_ffma", None)
