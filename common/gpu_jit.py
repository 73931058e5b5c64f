"""How every GPU kernel is declared and how it indexes: the few things a kernel file needs beside Numba itself.

The number of registers is a promise twice over: the compilers are told not to exceed it on a real GPU, and the compile
gate fails when a kernel needs more than it states, or has to spill to keep it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda

from common.device import in_simulator

# An index that is never negative. Numba lets a signed index count from the end, as Python does: three instructions a
# load, which also keep the compiler from seeing that neighbouring loads are neighbours and can be one wide load.
offset = np.uint64

# ANDed with an index of a thread, of a block or into a tile, these change nothing, but tell the compiler that it is not
# negative, so that dividing it by a power of two is a shift.
THREAD_BITS = 0x3FF
BLOCK_BITS = 0x7FFFFFFF
INDEX_BITS = 0xFFFF


# Shared arrays that are read four neighbours at a time begin at a 16-byte boundary; the simulator knows no alignment.
ALIGNMENT = None if in_simulator() else 16


def gpu_kernel(*, registers: int) -> Callable[[Callable], Any]:
    """Declare a kernel that needs at most ``registers`` 32-bit registers a thread."""
    if in_simulator():
        return cuda.jit  # it has no registers to bound
    return cuda.jit(max_registers=registers)


def stated_registers(kernel: Any) -> int | None:
    """The bound a kernel was declared with; None if it states none."""
    return kernel.targetoptions.get("max_registers")
