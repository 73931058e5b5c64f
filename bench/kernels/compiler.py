"""Compile every GPU kernel for real targets without a GPU.

libNVVM compiles each kernel to PTX, and ptxas compiles the PTX to machine code under the register bound that the kernel
states. One target, ``LINKED``, is linked as a real run does instead, and its machine code is read. Each compiler
reports registers, spills, stack and shared memory. All come with ``numba-cuda[cu12]`` and need no driver.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numba

from bench.kernels.launches import BATCH_SIZE, KernelUse
from bench.kernels.linker import disassemble, disassembler, link
from bench.kernels.ptx import inner_loop
from bench.kernels.sass import machine_code
from bench.kernels.targets import LINKED, TARGETS, Target, occupancy, target_name
from bench.machine.environment import describe_environment
from bench.records.documents import start_time
from bench.records.kernels import KernelResources, KernelRow, KernelsRecord, KernelsSettings, MachineCode
from bench.views.kernel_tables import condensed
from bench.views.words import fine_percent
from common.device import in_simulator, usable_cores
from common.errors import UsageError

MOST_SHARED_BYTES = 48 * 1024  # more needs a request to the driver
MANY_FFMA = 32  # in a turn of the hot loop: the kernel's time is arithmetic
INSTALL_HINT = 'install them with: python -m pip install "numba-cuda[cu12]" (Linux or Windows; no GPU is needed)'


class CompileError(RuntimeError):
    """A compiler refused a kernel; the message names the kernel, the target and the reason."""


def compile_record(
    uses: list[KernelUse],
    targets: Sequence[Target],
    faults: list[str],
    command_line: list[str],
    report: Callable[[str], None] = lambda kernel: None,
) -> KernelsRecord:
    """Compile each use for each target; the record has ``faults`` and those that the compilers find."""
    started = start_time()
    found, rows = list(faults), []
    times = Counter((use.name, *use.versions) for use in uses)
    for use, target, answer in compile_uses(uses, targets):
        report(use.name)
        refused = isinstance(answer, CompileError)
        shared = times[(use.name, *use.versions)] > 1
        name = f"{use.name} for {condensed(use.operations)}" if shared else use.name
        broken = [str(answer).replace(use.name, name, 1)] if refused else rule_faults(name, target, answer)
        found += [f"{' '.join(use.versions)}: {fault}" for fault in broken]
        rows.append(
            KernelRow(
                name=use.name,
                versions=use.versions,
                operations=use.operations,
                threads=use.threads,
                blocks=use.blocks,
                target=target_name(target),
                resources=None if refused else answer,
            )
        )
    return KernelsRecord(
        environment=describe_environment("cpu", usable_cores(), command_line),
        config=KernelsSettings(BATCH_SIZE, [target_name(target) for target in targets]),
        rows=rows,
        started=started,
        faults=found,
    )


def compile_uses(
    uses: list[KernelUse], targets: Sequence[Target]
) -> Iterator[tuple[KernelUse, Target, KernelResources | CompileError]]:
    """Compile each use for each target, and yield each result, in order, as soon as it is there."""
    jobs = [(use, target) for use in uses for target in targets]
    for job, answer in zip(jobs, _in_processes(_attempt, jobs), strict=True):
        yield *job, answer


def machine_codes(uses: list[KernelUse]) -> list[MachineCode]:
    """The machine code of each use, linked for ``LINKED``; CompileError if one does not compile.

    The caller has made sure that there is a disassembler.
    """
    return list(_in_processes(_linked_code, [(use,) for use in uses]))


def _in_processes(function: Callable[..., Any], jobs: Sequence[tuple]) -> Iterator[Any]:
    """Call ``function`` with each job, and yield its answers in order.

    A compilation takes about a second, and Numba compiles one kernel at a time. The work is therefore shared between
    processes, one per core.
    """
    context = multiprocessing.get_context("spawn")
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is left to this process
    pool = ProcessPoolExecutor(usable_cores(), context, initializer=signal.signal, initargs=ignore_interrupts)
    try:
        yield from pool.map(function, *zip(*jobs, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _attempt(use: KernelUse, target: Target) -> KernelResources | CompileError:
    try:
        return compile_kernel(
            use.kernel, use.types, target, name=use.name, threads=use.threads, stated_ffma=use.stated_ffma
        )
    except CompileError as error:
        return error


def _linked_code(use: KernelUse) -> MachineCode:
    from common.gpu_jit import stated_registers

    try:
        linked = link(use.kernel.py_func, use.types, LINKED, stated_registers(use.kernel))
    except Exception as error:  # see compile_kernel
        raise CompileError(f"{use.name} does not compile for {target_name(LINKED)}: {error}") from error
    return _machine_code(linked.cubin, use.name)


def compile_kernel(
    kernel: Any,
    types: tuple,
    target: Target,
    *,
    name: str = "",
    threads: Sequence[int] = (),
    stated_ffma: float | None = None,
) -> KernelResources:
    """Compile one kernel as for a real GPU; CompileError if a compiler refuses it."""
    from numba import cuda

    from common.gpu_jit import stated_registers

    name = name or kernel.py_func.__name__
    bound, machine = stated_registers(kernel), None
    try:
        if target == LINKED:
            linked = link(kernel.py_func, types, target, bound)
            ptx, report = linked.ptx, linked.report
        else:
            ptx, _ = cuda.compile(
                kernel.py_func, types, device=False, cc=target, abi="numba", output="ptx", fastmath=False
            )
    except Exception as error:  # Numba and the compilers raise many types; the message is what matters
        raise CompileError(f"{name} does not compile for {target_name(target)}: {error}") from error
    if target == LINKED:
        machine = _machine_code(linked.cubin, name) if disassembler() else None
    else:
        report = _ptxas_report(ptx, target, bound, name)

    def sizes(pattern: str) -> list[int]:
        return [int(size) for size in re.findall(pattern, report)]

    registers, shared = max(sizes(r"Used (\d+) registers")), max(sizes(r"(\d+) bytes smem"), default=0)
    return KernelResources(
        registers=registers,
        stated_registers=bound,
        shared_bytes=shared,
        stack_bytes=max(sizes(r"(\d+) bytes stack frame"), default=0),
        spill_bytes=sum(sizes(r"(\d+) bytes spill (?:stores|loads)")),
        uses_float64=".f64" in ptx,
        loop=inner_loop(ptx),
        occupancy=[occupancy(target, size, registers, shared) for size in threads],
        stated_ffma=stated_ffma,
        machine=machine,
    )


def _machine_code(cubin: bytes, name: str) -> MachineCode:
    """Read the machine code of a kernel; CompileError if the disassembler refuses it."""
    try:
        return machine_code(disassemble(cubin))
    except subprocess.CalledProcessError as error:
        raise CompileError(f"nvdisasm refused {name} for {target_name(LINKED)}: {error.stderr.strip()}") from error


def _ptxas_report(ptx: str, target: Target, bound: int | None, name: str) -> str:
    """What ptxas says of a kernel; CompileError if it refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        options = ["-v", f"-arch={target_name(target)}", *([f"-maxrregcount={bound}"] if bound else [])]
        command = [ptxas_path(), *options, source, "-o", source.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stderr + done.stdout
    if done.returncode:
        raise CompileError(f"ptxas refused {name} for {target_name(target)}: {report.strip()}")
    return report


def rule_faults(name: str, target: Target, resources: KernelResources) -> list[str]:
    """A sentence for each rule that a compiled kernel breaks, with the names of kernel and target."""
    registers, bound = resources.registers, resources.stated_registers
    spills, stack, shared = resources.spill_bytes, resources.stack_bytes, resources.shared_bytes
    least, hot = resources.stated_ffma, resources.machine and resources.machine.hot_loop
    rules = [
        (bound is None, "states no register bound: declare it with gpu_kernel(registers=...)"),
        (bound and registers > bound, f"needs {registers} registers a thread and states {bound}"),
        (spills, f"spills {spills} bytes a thread to keep to {registers} registers"),
        (stack, f"has a stack frame of {stack} bytes a thread: a local array is not in registers"),
        (resources.uses_float64, "computes in double precision"),
        (shared > MOST_SHARED_BYTES, f"has {shared} bytes of shared memory a block, more than {MOST_SHARED_BYTES}"),
        (0 in resources.occupancy, "has blocks too large to run at all"),
    ]
    if resources.machine:
        ffma, share = (hot.ffma, hot.ffma_share) if hot else (0, 0.0)
        low, undeclared = least is not None and share < least, least is None and ffma >= MANY_FFMA
        rules += [
            (low, f"has {fine_percent(share)} FFMA in its hot loop and states at least {fine_percent(least or 0)}"),
            (undeclared, f"has {ffma} FFMA in its hot loop and no stated share: declare it with gpu_kernel(ffma=...)"),
        ]
    return [f"{name} on {target_name(target)} {fault}" for broken, fault in rules if broken]


def check_compilers() -> None:
    """Check that kernels can be compiled here; UsageError says what to install."""
    if in_simulator():
        raise UsageError("NUMBA_ENABLE_CUDASIM is set: the simulator compiles no kernels")

    def probe_kernel(x):
        x[0] = 1

    try:
        from numba import cuda

        cuda.compile(probe_kernel, (numba.int32[::1],), device=False, cc=TARGETS[0], abi="numba", output="ptx")
        ptxas_path()
        link(probe_kernel, (numba.int32[::1],), LINKED, None)
    except Exception as error:  # a missing library raises one of many exceptions, and the advice is the same
        missing = "the GPU kernels cannot be compiled here, libNVVM, nvJitLink or ptxas is missing"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{missing} ({reason}): {INSTALL_HINT}") from error


def ptxas_path() -> Path:
    """The ptxas that NVIDIA's package for Python installed; FileNotFoundError if there is none."""
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else ():
        for program in Path(folder).glob("*/bin/**/ptxas*"):
            return program
    raise FileNotFoundError("no ptxas: install numba-cuda[cu12]")
