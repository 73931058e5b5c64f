"""Every GPU kernel, with the types the real network gives it, through libNVVM and ptxas; no GPU and no driver needed.

It catches what the simulator cannot: types, double precision that crept in, registers that spill.
"""

import importlib.util

import numpy as np
import pytest

from versions.registry import find, names

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda has no wheel for this platform"
)

MOST_REGISTERS = 128
DEFAULT_SHARED_BYTES = 48 * 1024


@pytest.mark.parametrize("name", names())
def test_every_kernel_compiles_well_for_every_target(name):
    from bench.kernels import TARGETS, compile_kernel, recorded_launches

    launches = recorded_launches(find(name))
    assert len({kernel for kernel, _ in launches}) >= 9
    for kernel, types in launches:
        for target in TARGETS:
            compiled = compile_kernel(kernel, types, target)
            assert compiled.spill_bytes == 0, compiled
            assert compiled.stack_bytes == 0, compiled
            assert not compiled.uses_float64, compiled
            assert compiled.registers <= MOST_REGISTERS, compiled
            assert compiled.shared_bytes <= DEFAULT_SHARED_BYTES, compiled


def test_the_gate_sees_double_precision():
    import numba
    from numba import cuda

    from bench.kernels import compile_kernel

    @cuda.jit
    def careless_kernel(x):
        i = cuda.grid(1)
        if i < x.size:
            x[i] = x[i] * 0.1  # a Python float is a double

    compiled = compile_kernel(careless_kernel, (numba.typeof(np.empty(1, np.float32)),), (9, 0))
    assert compiled.uses_float64


def test_the_gate_sees_a_stack_frame():
    import numba
    from numba import cuda

    from bench.kernels import compile_kernel

    @cuda.jit
    def careless_kernel(x, y):
        kept = cuda.local.array(1024, np.float32)
        for i in range(1024):
            kept[i] = x[i]
        kept[int(x[1024])] += x[1025]  # an index known only at run time keeps the array out of registers
        for i in range(1024):
            y[i] = kept[1023 - i]

    vector = numba.typeof(np.empty(1, np.float32))
    assert compile_kernel(careless_kernel, (vector, vector), (8, 0)).stack_bytes > 0
