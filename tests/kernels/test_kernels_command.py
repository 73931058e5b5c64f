"""``convbench kernels``: it compiles without a GPU, and one line says what is missing if it cannot."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from bench import cli
from bench.kernels import compiler, launches, linker
from bench.kernels.targets import TARGETS, target_name
from bench.machine.devices import ROOT
from bench.records.kernels import KernelResources, read_kernels
from versions.registry import find

needs_compilers = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda has no wheel for this platform"
)


def convbench(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "bench", "kernels", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def in_this_process(monkeypatch, *arguments):
    """Run the command in this process, where a test can replace parts of it; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["convbench", "kernels", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


BAD = {
    "unknown backend": (["--backend", "v9"], ["'v9'", "v1", "v4", "all"]),
    "unknown target": (["--target", "sm_12"], ["'sm_12'", "sm_75", "sm_80", "sm_90a", "sm_100", "all"]),
    "unknown option": (["--frobnicate"], ["--frobnicate"]),
}


@pytest.mark.parametrize(("arguments", "wanted"), BAD.values(), ids=BAD.keys())
def test_bad_input(tmp_path, arguments, wanted):
    done = convbench(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert all(word in done.stderr for word in wanted), done.stderr


def test_in_the_simulator_there_is_nothing_to_compile(tmp_path):
    done = convbench(cwd=tmp_path, NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 2
    assert done.stderr == "error: NUMBA_ENABLE_CUDASIM is set: the simulator compiles no kernels\n"


def test_without_compilers_one_line_says_what_to_install(monkeypatch, capsys):
    def absent():
        raise FileNotFoundError("no ptxas")

    monkeypatch.setattr(compiler, "ptxas_path", absent)
    assert in_this_process(monkeypatch) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("error: the GPU kernels cannot be compiled here")
    assert 'python -m pip install "numba-cuda[cu12]"' in written.err
    assert written.err.count("\n") == 1


@needs_compilers
def test_one_target_in_full(tmp_path):
    done = convbench("--backend", "v1", "--target", "sm_90a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"compiling \d+ kernels for sm_90a\n", done.stderr)
    assert max(map(len, done.stdout.splitlines())) <= 132
    assert "v1 naive (NHWC)" in done.stdout
    assert "forward conv1-5" in done.stdout
    # threads, blocks from conv3's to conv2's, registers, bound, spills, stack, occupancy
    resources = re.search(r"conv2d_forward\w* +256 +768-65,536 +(\d+) +64 +0 +0 +(\d+) %", done.stdout)
    assert resources, done.stdout
    registers, occupancy = map(int, resources.groups())
    assert registers <= 64
    assert occupancy >= 50
    # FMA, no shared loads, global loads, floats an FMA
    loop = re.search(r"conv2d_forward\b.* (\d+) +- +(\d+) \((\d+)\) +2\.00", done.stdout)
    assert loop, done.stdout
    fma, loads, floats = map(int, loop.groups())
    assert loads == floats == 2 * fma
    # The machine code: FFMA of all, their share, none stated, global loads, no shared ones, no stores, loads together.
    machine = re.search(r"conv2d_forward +(\d+) of (\d+) +(\d+) % +- +(\d+)x32 +- +- +\d", done.stdout)
    assert machine, done.stdout
    fma, instructions, share, loads = map(int, machine.groups())
    assert share == round(100 * fma / instructions)
    assert loads == 2 * fma
    assert not list(tmp_path.iterdir())


@needs_compilers
def test_all_targets_and_a_shared_kernel_once(monkeypatch, capsys, tmp_path):
    """Two kernels of several versions for every target: tables of one target and of all, and a file."""
    wanted = ("sgd_kernel", "conv2d_forward_kernel")
    uses = [use for use in launches.kernel_uses([find("v1"), find("v4")]) if use.name in wanted]
    monkeypatch.setattr(launches, "kernel_uses", lambda infos: uses)
    assert in_this_process(monkeypatch, "--backend", "v1", "--backend", "v4", "--out", str(tmp_path)) == 0
    written = capsys.readouterr().out
    full, of_targets = written.split("Registers and occupancy for every target")
    assert "compiled for sm_90a" in full
    assert "shared by v1, v4" in full
    assert "shared by v1, v4" in of_targets
    (row,) = [line for line in of_targets.splitlines() if line.strip().startswith("conv2d_forward")]
    assert len(re.findall(r"\d+, +\d+ %", row)) == 4
    assert all(target_name(target) in of_targets for target in TARGETS)
    (path,) = (tmp_path / "runs").iterdir()
    assert f"results: {path}" in written
    record = read_kernels(path)
    assert {(line.name, line.target) for line in record.rows} == {
        (name, target_name(target)) for name in wanted for target in TARGETS
    }
    assert record.config.batch_size == 64
    assert record.faults == []


@needs_compilers
def test_without_a_disassembler_one_line_says_what_to_install(monkeypatch, capsys):
    uses = [use for use in launches.kernel_uses([find("v1")]) if use.name == "sgd_kernel"]
    answers = [
        (use, target, KernelResources(32, 32, 0, 0, 0, False, None, [1.0])) for use in uses for target in TARGETS
    ]
    monkeypatch.setattr(launches, "kernel_uses", lambda infos: uses)
    monkeypatch.setattr(compiler, "compile_uses", lambda uses, targets: answers)
    monkeypatch.setattr(linker, "disassembler", lambda: None)
    assert in_this_process(monkeypatch, "--backend", "v1") == 0
    written = capsys.readouterr()
    assert "compiled for sm_90a" in written.out
    assert "Machine code" not in written.out
    (line,) = [line for line in written.err.splitlines() if "nvdisasm is missing" in line]
    assert line.endswith("python -m pip install nvidia-cuda-nvdisasm")


@needs_compilers
def test_a_kernel_that_breaks_a_rule_ends_in_exit_code_1(monkeypatch, capsys):
    compile_uses = compiler.compile_uses

    def worse(uses, targets):
        for use, target, answer in compile_uses(uses, targets):
            if use.name == "sgd_kernel":
                answer = compiler.CompileError("ptxas refused sgd_kernel for sm_80: no")
            elif use.name == "conv2d_forward_kernel":
                answer = replace(answer, spill_bytes=24)
            yield use, target, answer

    monkeypatch.setattr(compiler, "compile_uses", worse)
    monkeypatch.setattr(launches, "uncovered_kernels", lambda infos: ["v1: idle_kernel is launched by no operation"])
    assert in_this_process(monkeypatch, "--backend", "v1", "--target", "sm_80") == 1
    written = capsys.readouterr()
    lines = [line for line in written.err.splitlines() if line.startswith("fault: ")]
    assert lines[0] == "fault: v1: idle_kernel is launched by no operation"
    assert lines[1].startswith("fault: v1: conv2d_forward_kernel on sm_80 spills 24 bytes")
    assert lines[2] == "fault: v1: ptxas refused sgd_kernel for sm_80: no"
    assert len(lines) == 3
    assert re.search(r"sgd\w* .* refused", written.out)
