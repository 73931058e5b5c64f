"""Counting the instructions of a kernel's inner loop in PTX, written by hand and made by the compilers."""

import importlib.util

import numba
import numpy as np
import pytest

from bench.kernels.compiler import compile_kernel
from bench.kernels.ptx import inner_loop
from bench.kernels.targets import TARGETS, target_name
from bench.records.kernels import LoopCounts

VECTOR = numba.typeof(np.empty(1, np.float32))

PTX = """
.visible .entry example(.param .u64 example_param_0)
{
	.reg .pred %p<4>;
	ld.param.u64 %rd1, [example_param_0];
$L__BB0_1:                              // the outer loop: an FMA too many would be counted here
	ld.global.nc.f32 %f9, [%rd9];
	fma.rn.f32 %f1, %f2, %f3, %f1;
	fma.rn.f32 %f1, %f2, %f3, %f1;
	fma.rn.f32 %f1, %f2, %f3, %f1;
$L__BB0_2:
	ld.shared.v4.f32 {%f4, %f5, %f6, %f7}, [%r1];
	ld.shared.f32 %f8, [%r1+16];
	@%p3 bra $L__BB0_4;
	ld.global.v2.f32 {%f2, %f3}, [%rd2];
	@%p2 ld.global.f32 %f3, [%rd2+8];
$L__BB0_4:
	fma.rn.f32 %f1, %f4, %f8, %f1;
	fma.rn.f32 %f1, %f5, %f8, %f1;
	@%p1 bra $L__BB0_2;
	{ // callseq 0, 0
	.param .b32 param0;
	}
$L__BB0_3:
	ld.global.f32 %f2, [%rd2];
	@%p1 bra $L__BB0_3;
	@%p2 bra $L__BB0_1;
	st.global.f32 [%rd3], %f1;
	ret;
}
"""


def test_the_innermost_loop_is_counted_and_an_outer_one_only_without_it():
    assert inner_loop(PTX) == LoopCounts(fma=2, shared_loads=2, shared_floats=5, global_loads=2, global_floats=3)
    # With no FMA in an innermost loop, the outer loop is counted, without the loop inside it.
    outer = PTX.replace("%f1, %f4, %f8", "%f1").replace("%f1, %f5, %f8", "%f1").replace("\tfma.rn.f32 %f1, %f1;\n", "")
    outer = outer.replace("\tfma.rn.f32 %f1, %f1, %f1;\n", "")
    assert inner_loop(outer) == LoopCounts(fma=3, global_loads=1, global_floats=1)
    assert inner_loop(PTX.replace("fma.rn.f32", "mul.f32")) is None


def test_a_block_behind_the_loop_counts_if_it_leads_back_into_it():
    behind = """
{
$L__BB0_1:
	fma.rn.f32 %f1, %f2, %f3, %f1;
	@%p1 bra $L__BB0_4;
$L__BB0_2:
	@%p2 bra $L__BB0_1;
	ret;
$L__BB0_4:
	ld.global.f32 %f2, [%rd1];
	bra.uni $L__BB0_2;
}
"""
    assert inner_loop(behind) == LoopCounts(fma=1, global_loads=1, global_floats=1)
    assert inner_loop(behind.replace("bra.uni $L__BB0_2;", "ret;")) == LoopCounts(fma=1)


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda has no wheel for this platform")
@pytest.mark.parametrize("target", TARGETS, ids=target_name)
def test_the_inner_loop_of_a_tiled_kernel(target):
    """Each turn loads four neighbours from an aligned shared array for one float from global memory."""
    from numba import cuda

    from common.gpu_jit import gpu_kernel

    @gpu_kernel(registers=64)
    def tiled_kernel(x, y, n):
        tile = cuda.shared.array(256, np.float32)
        totals = cuda.local.array(4, np.float32)
        t = cuda.threadIdx.x & 0xFF
        tile[t] = x[t]
        cuda.syncthreads()
        for j in range(4):
            totals[j] = np.float32(0)
        for i in range(n):
            weight = y[np.uint64(i)]
            for j in range(4):
                totals[j] += tile[np.uint64(4 * (i & 63) + j)] * weight
        for j in range(4):
            y[4 * t + j] = totals[j]

    loop = compile_kernel(tiled_kernel, (VECTOR, VECTOR, numba.int64), target, threads=(256,)).loop
    assert loop.fma == loop.shared_floats == 4 * loop.global_floats
    assert loop.fma % 4 == 0
