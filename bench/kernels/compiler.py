"""Compile every GPU kernel for real targets without a GPU.

libNVVM compiles each kernel to PTX, and ptxas compiles the PTX to machine code under the register bound that the kernel
states. ptxas reports registers, spills, stack and shared memory. Both come with ``numba-cuda[cu12]`` and need no
driver.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numba

from bench.kernels.launches import BATCH_SIZE, KernelUse, kernel_uses
from bench.kernels.ptx import inner_loop
from bench.kernels.targets import TARGETS, Target, occupancy, target_name
from bench.machine.environment import describe_environment
from bench.records.documents import start_time
from bench.records.kernels import KernelResources, KernelRow, KernelsRecord, KernelsSettings
from common.device import in_simulator, usable_cores
from common.errors import UsageError
from versions.registry import find

MOST_SHARED_BYTES = 48 * 1024  # more needs a request to the driver
INSTALL_HINT = 'install them with: python -m pip install "numba-cuda[cu12]" (Linux or Windows; no GPU is needed)'
PTXAS_PACKAGES = ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")


class CompileError(RuntimeError):
    """A compiler refused a kernel; the message names the kernel, the target and the reason."""


def compile_record(
    uses: list[KernelUse],
    targets: Sequence[Target],
    faults: Sequence[str],
    command_line: list[str],
    report: Callable[[str], None] = lambda kernel: None,
) -> KernelsRecord:
    """Compile each use for each target; the record has ``faults`` and those that the compilers find.

    ``report`` is called with the kernel's name after each compilation.
    """
    started, faults = start_time(), list(faults)
    rows = []
    for use, target, answer in compile_uses(uses, targets):
        report(use.name)
        refused = isinstance(answer, CompileError)
        broken = [str(answer)] if refused else rule_faults(use.name, target, answer)
        faults += [f"{' '.join(use.versions)}: {fault}" for fault in broken]
        rows.append(
            KernelRow(
                name=use.name,
                versions=list(use.versions),
                operations=list(use.operations),
                threads=list(use.threads),
                blocks=list(use.blocks),
                target=target_name(target),
                resources=None if refused else answer,
            )
        )
    return KernelsRecord(
        environment=describe_environment("cpu", usable_cores(), command_line),
        config=KernelsSettings(BATCH_SIZE, [target_name(target) for target in targets]),
        rows=rows,
        started=started,
        faults=faults,
    )


def compile_kernel(
    kernel: Any, types: tuple, target: Target, *, name: str | None = None, threads: tuple[int, ...] = ()
) -> KernelResources:
    """Compile one kernel through libNVVM and ptxas, as for a real GPU; CompileError if one of them refuses it."""
    from numba import cuda

    from common.gpu_jit import stated_registers

    name = name or kernel.py_func.__name__
    architecture = target_name(target)
    try:
        ptx, _ = cuda.compile(kernel.py_func, types, device=False, cc=target, abi="numba", output="ptx", fastmath=False)
    except Exception as error:  # Numba and libNVVM raise many types; the message is what matters
        raise CompileError(f"{name} does not compile for {architecture}: {error}") from error
    bound = stated_registers(kernel)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        options = ["-v", f"-arch={architecture}", *([f"-maxrregcount={bound}"] if bound else [])]
        done = subprocess.run(
            [str(ptxas_path()), *options, str(source), "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=False,
        )
    report = done.stderr + done.stdout
    if done.returncode:
        raise CompileError(f"ptxas refused {name} for {architecture}: {report.strip()}")
    registers, shared = (
        max(_sizes(r"Used (\d+) registers", report)),
        max(_sizes(r"(\d+) bytes smem", report), default=0),
    )
    return KernelResources(
        registers=registers,
        stated_registers=bound,
        shared_bytes=shared,
        stack_bytes=max(_sizes(r"(\d+) bytes stack frame", report), default=0),
        spill_bytes=sum(_sizes(r"(\d+) bytes spill (?:stores|loads)", report)),
        uses_float64=".f64" in ptx,
        loop=inner_loop(ptx),
        occupancy=[occupancy(target, size, registers, shared) for size in threads],
    )


def _sizes(pattern: str, report: str) -> list[int]:
    return [int(size) for size in re.findall(pattern, report)]


def rule_faults(name: str, target: Target, resources: KernelResources) -> list[str]:
    """A sentence for each rule that a compiled kernel breaks, with the names of kernel and target."""
    bound = resources.stated_registers
    broken = []
    if bound is None:
        broken.append("states no register bound: declare it with gpu_kernel(registers=...)")
    elif resources.registers > bound:
        broken.append(f"needs {resources.registers} registers a thread and states {bound}")
    if resources.spill_bytes:
        broken.append(f"spills {resources.spill_bytes} bytes a thread to keep to {resources.registers} registers")
    if resources.stack_bytes:
        broken.append(f"has a stack frame of {resources.stack_bytes} bytes a thread: a local array is not in registers")
    if resources.uses_float64:
        broken.append("computes in double precision")
    if resources.shared_bytes > MOST_SHARED_BYTES:
        broken.append(f"has {resources.shared_bytes} bytes of shared memory a block, more than {MOST_SHARED_BYTES}")
    if 0.0 in resources.occupancy:
        broken.append("has blocks too large to run at all")
    return [f"{name} on {target_name(target)} {what}" for what in broken]


# In several processes -----------------------------------------------------------------------------------------------


def compile_uses(
    uses: list[KernelUse], targets: Iterable[Target] = TARGETS, processes: int | None = None
) -> Iterator[tuple[KernelUse, Target, KernelResources | CompileError]]:
    """Compile each use for each target, and yield each result, in order, as soon as it is there.

    A compilation takes about a second, and Numba compiles one kernel at a time. The work is therefore shared between
    processes, by default one per core. A kernel cannot be sent to another process: each process records the launches
    itself and receives the kernel's place among them.
    """
    jobs = [(use, target) for use in uses for target in targets]
    processes = min(processes or usable_cores(), len(jobs))
    if processes <= 1:
        for use, target in jobs:
            yield use, target, _attempt(use, target)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_ignore_interrupts)
    try:
        waiting = [
            (use, target, pool.submit(_compile_place, use.versions[0], use.place, target)) for use, target in jobs
        ]
        for use, target, answer in waiting:
            yield use, target, answer.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def _uses_here(version: str) -> list[KernelUse]:
    return kernel_uses(find(version))


def _compile_place(version: str, place: int, target: Target) -> KernelResources | CompileError:
    return _attempt(_uses_here(version)[place], target)


def _attempt(use: KernelUse, target: Target) -> KernelResources | CompileError:
    try:
        return compile_kernel(use.kernel, use.types, target, name=use.name, threads=use.threads)
    except CompileError as error:
        return error


# The compilers ------------------------------------------------------------------------------------------------------


def check_compilers() -> None:
    """Check that kernels can be compiled here; UsageError says what to install."""
    if in_simulator():
        raise UsageError("NUMBA_ENABLE_CUDASIM is set: the simulator compiles no kernels")
    from numba import cuda

    def probe_kernel(x):
        x[0] = 1

    missing = "the GPU kernels cannot be compiled here, libNVVM or ptxas is missing"
    try:
        cuda.compile(probe_kernel, (numba.int32[::1],), device=False, cc=TARGETS[0], abi="numba", output="ptx")
        ptxas_path()
    except Exception as error:  # a missing library raises one of many exceptions, and the advice is the same
        reason = " ".join(str(error).split())
        raise UsageError(f"{missing} ({type(error).__name__}: {reason}): {INSTALL_HINT}") from error


def ptxas_path() -> Path:
    """The ptxas that ``nvidia-cuda-nvcc`` installed; FileNotFoundError if there is none."""
    from importlib.metadata import PackageNotFoundError, files

    for distribution in PTXAS_PACKAGES:
        try:
            found = [Path(file.locate()) for file in files(distribution) or () if file.name in ("ptxas", "ptxas.exe")]
        except PackageNotFoundError:
            continue
        if found:
            return found[0]
    raise FileNotFoundError("no ptxas: install numba-cuda[cu12]")
