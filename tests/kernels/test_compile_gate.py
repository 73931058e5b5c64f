"""Every GPU kernel, with the types the real network gives it, through libNVVM and ptxas; no GPU and no driver needed.

It catches what the simulator cannot: types, double precision that crept in, registers that spill. The second half turns
the gate on kernels that break its rules.
"""

import functools
import importlib.util
from dataclasses import dataclass, replace
from types import ModuleType

import numba
import numpy as np
import pytest

from bench.kernels import launches as kernels
from bench.kernels.launches import TARGETS, CompiledKernel, LoopCounts, faults, target_name
from bench.kernels.ptx import inner_loop
from common.architecture import autoencoder
from common.errors import UsageError
from common.network import flat_offsets, parameter_shapes
from common.work import elementwise_work
from versions.registry import REGISTRY, find, names

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda has no wheel for this platform"
)

VECTOR = numba.typeof(np.empty(1, np.float32))
GOOD = CompiledKernel("good_kernel", "sm_90", 32, 32, 48 * 1024, 0, 0, False, None, (1.0,))


@pytest.fixture(scope="session")
def compiled():
    """What came of each kernel of a version for every target; a kernel that versions share is compiled once."""
    done = {}

    @functools.cache
    def of(name):
        uses = kernels.kernel_uses(find(name))
        new = [use for use in uses if (use.kernel, use.types) not in done]
        for use, answer in kernels.compile_uses(new):
            done.setdefault((use.kernel, use.types), []).append(answer)
        return [(use, done[use.kernel, use.types]) for use in uses]

    return of


@pytest.mark.parametrize("name", names())
def test_every_kernel_keeps_the_rules_on_every_target(name, compiled):
    broken = []
    for _, answers in compiled(name):
        assert len(answers) == len(TARGETS)
        for answer in answers:
            broken += [str(answer)] if isinstance(answer, kernels.CompileError) else faults(answer)
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("name", names())
def test_every_kernel_of_a_version_is_compiled(name):
    assert kernels.uncovered_kernels([find(name)]) == []


def test_every_shared_kernel_is_compiled():
    assert kernels.uncovered_kernels(REGISTRY) == []


@pytest.mark.parametrize("name", names())
def test_every_operation_of_every_stage_is_recorded(name):
    recorded = {(launch.stage, launch.operation) for launch in kernels.recorded_launches(find(name))}
    stages = [f"conv{i}" for i in range(1, 6)]
    wanted = {(stage, f"backward {part}") for stage in stages for part in ("data", "filter")}
    wanted |= {("", "gather"), ("", "loss"), ("", "SGD"), ("conv1", "max-pool"), ("conv4", "upsample backward")}
    assert wanted <= recorded
    assert {stage for stage, operation in recorded if "forward" in operation} == set(stages)
    assert all(operation for _, operation in recorded)


@pytest.mark.parametrize("info", REGISTRY, ids=names())
def test_the_stated_work_is_of_the_kernels_that_are_launched(info):
    """``convbench describe`` and ``convbench kernels`` tell of the same kernels."""
    architecture = autoencoder()
    _, parameters = flat_offsets(parameter_shapes(architecture, info.layout))
    work = info.gpu_work(architecture, 64) + elementwise_work(architecture, 64, info.layout, parameters)
    stated = {(row.stage, row.operation, row.kernel) for row in work if not row.kernel.startswith("cuBLAS")}
    launched = {(*operation, use.name) for use in kernels.kernel_uses(info) for operation in use.operations}
    # The gradient to the pictures is compiled like the others, but is not part of a step.
    assert stated == {launch for launch in launched if launch[:2] != ("conv1", "backward data")}


@pytest.mark.parametrize("info", REGISTRY, ids=names())
def test_the_stated_shared_loads_are_those_of_the_inner_loop(info, compiled):
    stated = {row.kernel: row.shared_loads_per_fma for row in info.gpu_work(autoencoder(), 64)}
    for use, answers in compiled(info.name):
        loop = next(answer.loop for answer in answers if answer.target == "sm_90")
        if loop is not None and use.name in stated:
            assert loop.shared_floats / loop.fma == pytest.approx(stated[use.name] or 0), use.name


# The gate itself ----------------------------------------------------------------------------------------------------


def test_the_gate_sees_double_precision():
    from numba import cuda

    @cuda.jit
    def careless_kernel(x):
        i = cuda.grid(1)
        if i < x.size:
            x[i] = x[i] * 0.1  # a Python float is a double

    compiled = kernels.compile_kernel(careless_kernel, (VECTOR,), (9, 0))
    assert compiled.uses_float64
    assert "careless_kernel on sm_90 computes in double precision" in faults(compiled)


def test_the_gate_sees_a_stack_frame():
    from numba import cuda

    @cuda.jit
    def careless_kernel(x, y):
        kept = cuda.local.array(1024, np.float32)
        for i in range(1024):
            kept[i] = x[i]
        kept[int(x[1024])] += x[1025]  # an index known only at run time keeps the array out of registers
        for i in range(1024):
            y[i] = kept[1023 - i]

    compiled = kernels.compile_kernel(careless_kernel, (VECTOR, VECTOR), (8, 0))
    assert compiled.stack_bytes > 0
    assert any("stack frame" in fault for fault in faults(compiled))


def test_the_gate_sees_that_no_bound_is_stated():
    from numba import cuda

    @cuda.jit
    def careless_kernel(x):
        x[0] = np.float32(1)

    compiled = kernels.compile_kernel(careless_kernel, (VECTOR,), (9, 0))
    assert compiled.stated_registers is None
    assert any("states no register bound" in fault for fault in faults(compiled))


def test_the_gate_sees_a_bound_that_cannot_be_kept():
    from numba import cuda

    from common.gpu_jit import gpu_kernel

    @gpu_kernel(registers=32)
    def hopeful_kernel(x, y):
        kept = cuda.local.array(64, np.float32)
        i = cuda.grid(1)
        for j in range(64):
            kept[j] = x[i * 64 + j]
        # All 64 have to be at hand at once.
        for j in range(64):
            y[i * 64 + j] = kept[63 - j] * kept[j // 2]

    compiled = kernels.compile_kernel(hopeful_kernel, (VECTOR, VECTOR), (8, 0))
    assert compiled.spill_bytes > 0
    assert any("spills" in fault and "to keep to 32 registers" in fault for fault in faults(compiled))


def test_a_kernel_that_does_not_compile_is_named():
    from numba import cuda

    @cuda.jit
    def wrong_kernel(x):
        x.no_such_thing(1)

    with pytest.raises(kernels.CompileError, match="wrong_kernel does not compile for sm_80"):
        kernels.compile_kernel(wrong_kernel, (VECTOR,), (8, 0))


BROKEN = {
    "no bound": ({"stated_registers": None}, "states no register bound"),
    "more than the bound": ({"registers": 40}, "needs 40 registers a thread and states 32"),
    "spills": ({"spill_bytes": 8}, "spills 8 bytes"),
    "stack": ({"stack_bytes": 16}, "stack frame of 16 bytes"),
    "double": ({"uses_float64": True}, "double precision"),
    "shared": ({"shared_bytes": 48 * 1024 + 4}, "49156 bytes of shared memory"),
    "too large": ({"occupancy": (0.5, 0.0)}, "too large to run"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_each_rule(change, message):
    assert faults(GOOD) == []
    (fault,) = faults(replace(GOOD, **change))
    assert fault.startswith("good_kernel on sm_90 ")
    assert message in fault


def test_kernels_are_found_wherever_a_module_keeps_them():
    from numba import cuda

    def make(name):
        def body(x):
            x[0] = np.float32(1)

        body.__name__ = name
        return cuda.jit(body)

    @dataclass(frozen=True)
    class Plan:
        kernel: object
        size: int = 4

    class Holder:
        kept = make("in_a_class")

    module = ModuleType("versions.example.gpu")
    Holder.__module__ = module.__name__
    module.plain_kernel = make("plain_kernel")
    module.KERNELS = {"wide": make("body"), "small": [make("body")]}
    module.PLAN = Plan(make("body"))
    module.Holder = Holder
    module.again = module.plain_kernel
    module.helper = cuda.jit(device=True)(lambda x: x)
    module.numpy = np
    found = kernels.kernels_of(module)
    assert list(found) == ["plain_kernel", "KERNELS[wide]", "KERNELS[small][0]", "PLAN.kernel", "Holder.kept"]
    launched = [module.plain_kernel, module.PLAN.kernel, Holder.kept, module.KERNELS["small"][0]]
    assert kernels.missing_kernels(module, launched) == ["KERNELS[wide]"]


def test_the_gate_sees_a_kernel_that_nothing_launches(monkeypatch):
    from numba import cuda

    from common import gpu_kernels
    from versions.v1_naive_nhwc import gpu

    monkeypatch.setattr(gpu, "EXTRA", {"idle": cuda.jit(lambda x: None)}, raising=False)
    assert kernels.uncovered_kernels([find("v1")]) == ["v1: EXTRA[idle] is launched by no operation of the network"]
    monkeypatch.setattr(gpu_kernels, "idle_kernel", cuda.jit(lambda x: None), raising=False)
    assert kernels.missing_kernels(gpu_kernels, []) == list(kernels.kernels_of(gpu_kernels))
    assert "idle_kernel" in kernels.kernels_of(gpu_kernels)


def test_a_version_without_gpu_code_is_a_usage_error():
    with pytest.raises(UsageError, match=r"v1 has no GPU kernels: there is no bench\.gpu"):
        kernels.gpu_module(replace(find("v1"), package="bench"))


# What is computed from what the compilers say -----------------------------------------------------------------------


# Worked out by hand from the limits in the programming guide.
OCCUPANCIES = [
    ((9, 0), 256, 32, 0, 1.0),  # 8 blocks of 8 warps
    ((9, 0), 256, 33, 0, 0.75),  # 40 registers a thread are given: 51 warps, 48 by fours, 6 blocks
    ((9, 0), 128, 128, 0, 0.25),  # 16 warps, 4 blocks
    ((9, 0), 128, 64, 48 * 1024, 0.25),  # 49 KiB a block: 4 of them in 228
    ((8, 0), 128, 64, 40 * 1024, 0.25),  # 41 KiB a block: 4 of them in 164
    ((7, 5), 128, 64, 32 * 1024, 0.25),  # 2 blocks of 4 warps, of 32
    ((7, 5), 32, 32, 0, 0.5),  # 16 blocks at most
    ((10, 0), 1024, 65, 0, 0.0),  # 28 warps, and the block has 32
    ((9, 0), 33, 32, 0, 1.0),  # two warps a block, 32 blocks
]


@pytest.mark.parametrize(("target", "threads", "registers", "shared", "share"), OCCUPANCIES)
def test_occupancy(target, threads, registers, shared, share):
    assert kernels.occupancy(target, threads, registers, shared) == share


def test_operations_in_few_words():
    pairs = [("conv5", "forward"), ("conv1", "forward"), ("conv2", "forward"), ("", "gather"), ("conv2", "max-pool")]
    assert kernels.condensed(pairs) == "forward conv1-2,5, gather, max-pool conv2"


def test_targets_by_name():
    assert kernels.find_targets("all") == TARGETS
    assert [target_name(target) for target in kernels.find_targets("sm_100")] == ["sm_100"]
    with pytest.raises(UsageError, match="unknown target 'sm_91': choose from sm_75, sm_80, sm_90, sm_100 or all"):
        kernels.find_targets("sm_91")


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


def test_the_inner_loop():
    assert inner_loop(PTX) == LoopCounts(fma=2, shared_loads=2, shared_floats=5, global_loads=2, global_floats=3)
    # With no FMA in a loop that holds no other, the outer one counts, without what is inside.
    outer = PTX.replace("%f1, %f4, %f8", "%f1").replace("%f1, %f5, %f8", "%f1").replace("\tfma.rn.f32 %f1, %f1;\n", "")
    outer = outer.replace("\tfma.rn.f32 %f1, %f1, %f1;\n", "")
    assert inner_loop(outer) == LoopCounts(fma=3, global_loads=1, global_floats=1)
    assert inner_loop(PTX.replace("fma.rn.f32", "mul.f32")) is None


@pytest.mark.parametrize("target", TARGETS, ids=target_name)
def test_the_inner_loop_of_a_tiled_kernel(target):
    """Four neighbours at a time from an aligned shared array: wide loads, and as many FMAs as the loop says."""
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

    loop = kernels.compile_kernel(tiled_kernel, (VECTOR, VECTOR, numba.int64), target, threads=(256,)).loop
    assert loop.fma == loop.shared_floats == 4 * loop.global_floats
    assert loop.fma % 4 == 0
