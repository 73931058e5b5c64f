"""Machine code of the CPU kernels for AVX-512, on any x86 processor, and their array bounds.

A vector that does not fit into registers is spilled to the stack. That costs time, and not the same time in every
process, because the stack's alignment differs.
"""

import platform
import re
import subprocess
import sys

import pytest
from llvmlite.binding import llvm_version_info

from bench.machine.devices import child_environment

COMPILE = """
from numba import float32, int64
from versions.{version} import cpu
f, i = float32[::1], int64
cpu.{function}.compile({signature})
print(cpu.{function}.inspect_asm({signature}))
"""
PLAIN = """
import numpy as np
from common.verify import convolution_checks
from versions.registry import find
rng = np.random.default_rng(0)
for name in ("v2", "v3"):
    backend = find(name).load("cpu", threads=1)
    allocate = backend.empty
    def empty(shape, dtype=np.float32):
        buffer = allocate(shape, dtype)
        buffer.fill(np.nan)
        return buffer
    backend.empty = empty
    for shape in ((1, 1, 1, 1, 1), (1, 2, 4, 3, 5), (2, 9, 4, 4, 8)):
        assert [check for check in convolution_checks(backend, shape, rng) if not check.passed] == []
    print(name)
"""
ZEN_4 = {"NUMBA_CPU_NAME": "znver4", "NUMBA_CPU_FEATURES": "+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx2,+fma"}


def inner_loops(assembly):
    """The lines of each innermost loop."""
    lines = assembly.splitlines()
    labels = {line.rstrip(":"): n for n, line in enumerate(lines) if re.match(r"\.LBB\w+:$", line)}
    for n, line in enumerate(lines):
        jump = re.match(r"\tj\w+\t(\.LBB\w+)$", line)
        start = labels.get(jump[1], n) if jump else n
        body = lines[start + 1 : n]
        if body and not any(inside in labels for inside in (part.rstrip(":") for part in body)):
            yield body


def test_only_innermost_loops_are_found():
    code = "\n".join([".LBB0_1:", "\tmov", ".LBB0_2:", "\tadd", "\tjne\t.LBB0_2", "\tje\t.LBB0_1", "\tjmp\t.LBB0_9"])
    assert list(inner_loops(code)) == [["\tadd"]]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="code for x86 is compiled on x86 only")
@pytest.mark.skipif(llvm_version_info < (16,), reason="LLVM knows Zen 4 from version 16")
@pytest.mark.parametrize(
    ("version", "function", "signature", "products"),
    [
        ("v2_tiled_nhwc", "dot_tile", "(f, i, i, i, f, i, i, i, i, f)", 16),
        ("v2_tiled_nhwc", "add_products", "(f, f, i, i, i, i, f)", 24),
        ("v3_direct_nchw", "add_channels", "(f, i, i, i, f, f, f, i, f)", 27),
        ("v3_direct_nchw", "add_tap_sums", "(f, i, i, f, i, i, f, i)", 18),
    ],
)
def test_vectors_stay_in_registers(version, function, signature, products):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(version=version, function=function, signature=signature)],
        env=child_environment() | ZEN_4,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    vectors = [[line for line in body if "%zmm" in line] for body in inner_loops(done.stdout)]
    sums = [lines for lines in vectors if any("vfmadd" in line for line in lines)]
    assert sums
    assert [sum("vfmadd" in line for line in lines) % products for lines in sums] == [0] * len(sums)
    assert [line for lines in sums for line in lines if "%rsp" in line] == []


def test_kernels_stay_within_their_workspace():
    """Run as plain Python, where an index past an array's end is an error, on memory that is NaN before."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        env=child_environment() | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["v2", "v3"]
