"""Every GPU kernel, with its types in the real network, compiled without a GPU by the compilers of a real run.

The compilers find what the simulator cannot: wrong types, accidental double precision, spilled registers. The second
half checks that kernels which break the rules are found.
"""

import importlib.util
from dataclasses import replace

import numba
import numpy as np
import pytest

from bench.kernels import compiler
from bench.kernels.compiler import rule_faults
from bench.kernels.launches import KernelUse, Shape, kernel_uses
from bench.kernels.linker import Linked, disassembler
from bench.kernels.targets import TARGETS, target_name
from bench.records.kernels import CodeCounts, KernelResources, MachineCode
from common.architecture import autoencoder
from common.operations import Operation
from versions.registry import REGISTRY, names

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda has no wheel for this platform"
)

TARGET = (9, 0, "a")
VECTOR = numba.typeof(np.empty(1, np.float32))
CODE = MachineCode(CodeCounts(50), [CodeCounts(100, ffma=80)])
GOOD = KernelResources(32, 32, 48 * 1024, 0, 0, False, None, [1.0], 0.8, CODE)
needs_disassembler = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None or disassembler() is None, reason="nvdisasm is not installed"
)


@pytest.fixture(scope="session")
def record():
    """Every kernel for one target; for the oldest and the newest target one shape of each kernel, to save minutes."""
    uses = kernel_uses(REGISTRY)
    found = compiler.compile_record(uses, [TARGET], [], [])
    first = {(use.name, *use.versions): use for use in reversed(uses)}
    others = compiler.compile_record(list(first.values()), [TARGETS[0], TARGETS[-1]], [], [])
    found.rows += others.rows
    found.faults += others.faults
    return found


def test_every_kernel_keeps_the_rules(record):
    assert record.faults == []
    for name in names():
        assert target_name(TARGET) in {row.target for row in record.rows if name in row.versions}
    assert {row.target for row in record.rows} == set(map(target_name, (TARGETS[0], TARGET, TARGETS[-1])))


@pytest.mark.parametrize("info", REGISTRY, ids=names())
def test_the_stated_shared_loads_are_those_of_the_inner_loop(info, record):
    stated = {row.kernel: row.shared_loads_per_fma for row in info.gpu_work(autoencoder(), 64)}
    for row in record.rows:
        loop = row.resources.loop
        if info.name in row.versions and row.target == target_name(TARGET) and loop is not None and row.name in stated:
            assert loop.shared_floats / loop.fma == pytest.approx(stated[row.name] or 0), row.name


# The gate itself ----------------------------------------------------------------------------------------------------


def test_double_precision_is_a_fault():
    from numba import cuda

    @cuda.jit
    def careless_kernel(x):
        i = cuda.grid(1)
        if i < x.size:
            x[i] = x[i] * 0.1  # a Python float is a double

    compiled = compiler.compile_kernel(careless_kernel, (VECTOR,), TARGET)
    assert compiled.uses_float64
    assert "careless_kernel on sm_90a computes in double precision" in rule_faults("careless_kernel", TARGET, compiled)


def test_a_stack_frame_is_a_fault():
    from numba import cuda

    @cuda.jit
    def careless_kernel(x, y):
        kept = cuda.local.array(1024, np.float32)
        for i in range(1024):
            kept[i] = x[i]
        kept[int(x[1024])] += x[1025]  # an index known only at run time keeps the array out of registers
        for i in range(1024):
            y[i] = kept[1023 - i]

    compiled = compiler.compile_kernel(careless_kernel, (VECTOR, VECTOR), TARGET)
    assert compiled.stack_bytes > 0
    assert any("stack frame" in fault for fault in rule_faults("careless_kernel", TARGET, compiled))


def test_a_kernel_without_a_register_bound_is_a_fault():
    from numba import cuda

    @cuda.jit
    def careless_kernel(x):
        x[0] = np.float32(1)

    compiled = compiler.compile_kernel(careless_kernel, (VECTOR,), TARGET)
    assert compiled.stated_registers is None
    assert any("states no register bound" in fault for fault in rule_faults("careless_kernel", TARGET, compiled))


def test_a_bound_that_needs_spills_is_a_fault():
    from numba import cuda

    from common.gpu_jit import gpu_kernel

    @gpu_kernel(registers=32)
    def hopeful_kernel(x, y):
        kept = cuda.local.array(64, np.float32)
        i = cuda.grid(1)
        for j in range(64):
            kept[j] = x[i * 64 + j]
        # All 64 values are needed at once.
        for j in range(64):
            y[i * 64 + j] = kept[63 - j] * kept[j // 2]

    compiled = compiler.compile_kernel(hopeful_kernel, (VECTOR, VECTOR), TARGET)
    assert compiled.spill_bytes > 0
    found = rule_faults("hopeful_kernel", TARGET, compiled)
    assert any("spills" in fault and "to keep to 32 registers" in fault for fault in found)


@needs_disassembler
def test_a_low_share_of_multiply_adds_is_a_fault():
    from numba import cuda

    from common.gpu_jit import gpu_kernel, stated_ffma

    @gpu_kernel(registers=64, ffma=0.5)
    def hopeful_kernel(x, y, z, n):
        i = cuda.grid(1)
        total = np.float32(0)
        for j in range(n):
            # Two loads and their addresses for one multiply-add.
            total += x[(i * 3 + j) % 1000] * y[j * n]
        z[i] = total

    assert stated_ffma(hopeful_kernel) == 0.5
    types = (VECTOR, VECTOR, VECTOR, numba.int32)
    use = KernelUse(hopeful_kernel, types, "hopeful_kernel", ["v1"], [Shape("conv1", Operation.FORWARD, 1, 32)], 0.5)
    # What the kernel states reaches the process that compiles it.
    ((_, _, compiled),) = compiler.compile_uses([use], [TARGET])
    assert 0 < compiled.machine.hot_loop.ffma_share < 0.5
    (fault,) = rule_faults("hopeful_kernel", TARGET, compiled)
    assert "FFMA in its hot loop and states at least 50.0 %" in fault


@needs_disassembler
def test_loads_that_wait_are_told_from_loads_together():
    from numba import cuda

    from common.gpu_jit import gpu_kernel

    @gpu_kernel(registers=64)
    def waiting_kernel(x, y):
        t = cuda.threadIdx.x
        for j in range(4):
            y[np.uint64(t + 1024 * j)] = x[np.uint64(t + 1024 * j)]  # y may be x, so the next load has to wait

    @gpu_kernel(registers=64)
    def together_kernel(x, y):
        t = cuda.threadIdx.x
        held = cuda.local.array(4, np.float32)
        for j in range(4):
            held[j] = x[np.uint64(t + 1024 * j)]
        for j in range(4):
            y[np.uint64(t + 1024 * j)] = held[j]

    waiting, together = (
        compiler.compile_kernel(kernel, (VECTOR, VECTOR), TARGET).machine.straight.loads_together
        for kernel in (waiting_kernel, together_kernel)
    )
    assert (waiting, together) == (1, 4)


@needs_disassembler
def test_a_disassembler_that_refuses_is_named(monkeypatch):
    from numba import cuda

    @cuda.jit
    def plain_kernel(x):
        x[0] = np.float32(1)

    monkeypatch.setattr(compiler, "link", lambda *arguments: Linked(b"no cubin", "", ""))
    with pytest.raises(compiler.CompileError, match="nvdisasm refused plain_kernel for sm_90a: nvdisasm"):
        compiler.compile_kernel(plain_kernel, (VECTOR,), TARGET)


def test_a_kernel_that_does_not_compile_is_named():
    from numba import cuda

    @cuda.jit
    def wrong_kernel(x):
        x.no_such_thing(1)

    with pytest.raises(compiler.CompileError, match="wrong_kernel does not compile for sm_80"):
        compiler.compile_kernel(wrong_kernel, (VECTOR,), (8, 0))


BROKEN = {
    "no bound": ({"stated_registers": None}, "states no register bound"),
    "more than the bound": ({"registers": 40}, "needs 40 registers a thread and states 32"),
    "spills": ({"spill_bytes": 8}, "spills 8 bytes"),
    "stack": ({"stack_bytes": 16}, "stack frame of 16 bytes"),
    "double": ({"uses_float64": True}, "double precision"),
    "shared": ({"shared_bytes": 48 * 1024 + 4}, "49156 bytes of shared memory"),
    "too large": ({"occupancy": [0.5, 0.0]}, "too large to run"),
    "few multiply-adds": ({"stated_ffma": 0.805}, "has 80.0 % FFMA in its hot loop and states at least 80.5 %"),
    "no share": ({"stated_ffma": None}, "has 80 FFMA in its hot loop and no stated share"),
    "no hot loop": ({"machine": MachineCode(CodeCounts(50))}, "has 0.0 % FFMA in its hot loop"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_each_broken_rule_is_a_fault(change, message):
    assert rule_faults("good_kernel", TARGET, GOOD) == []
    (fault,) = rule_faults("good_kernel", TARGET, replace(GOOD, **change))
    assert fault.startswith("good_kernel on sm_90a ")
    assert message in fault


def test_few_multiply_adds_need_no_stated_share():
    few = MachineCode(CodeCounts(50), [CodeCounts(100, ffma=31)])
    assert rule_faults("good_kernel", TARGET, replace(GOOD, stated_ffma=None, machine=few)) == []
    assert rule_faults("good_kernel", TARGET, replace(GOOD, stated_ffma=0.9, machine=None)) == []


def test_a_fault_names_what_launches_a_kernel_whose_name_is_shared(monkeypatch):
    """Kernels that one function builds for several shapes have one name."""
    stages = ("conv2", "conv4")
    uses = [KernelUse(None, (), "a_kernel", ["v1"], [Shape(stage, Operation.FORWARD, 1, 32)], 0.8) for stage in stages]
    answers = [replace(GOOD, spill_bytes=8), compiler.CompileError("a_kernel does not compile for sm_90a: no")]
    monkeypatch.setattr(
        compiler,
        "compile_uses",
        lambda uses, targets: ((use, TARGET, answer) for use, answer in zip(uses, answers, strict=True)),
    )
    record = compiler.compile_record(uses, [TARGET], [], [])
    assert record.faults[0].startswith("v1: a_kernel for forward conv2 on sm_90a spills")
    assert record.faults[1] == "v1: a_kernel for forward conv4 does not compile for sm_90a: no"
