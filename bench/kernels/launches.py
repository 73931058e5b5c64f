"""Every GPU kernel that a version launches, compiled for real targets without a GPU.

The list is not written down anywhere: a training step of the real network is run on a runtime that launches nothing and
records which kernels were asked for, by which operation, with which types and in which shape. A new version, or a new
kernel of an old one, is therefore covered as soon as it is used, and a kernel that exists and is not used is a fault.
libNVVM turns each into PTX and ptxas into machine code, under the register bound that the kernel states, and reports
registers, spills, stack and shared memory; both come with ``numba-cuda[cu12]`` and need no driver.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import multiprocessing
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np

from bench.kernels.ptx import LoopCounts, inner_loop
from common.architecture import Architecture, autoencoder
from common.device import in_simulator, usable_cores
from common.errors import UsageError
from common.network import Network, initial_parameters
from versions.registry import REGISTRY, BackendInfo, find

Target = tuple[int, int]  # compute capability
TARGETS: tuple[Target, ...] = ((7, 5), (8, 0), (9, 0), (10, 0))
BATCH_SIZE = 64
MOST_SHARED_BYTES = 48 * 1024  # what a kernel may declare without asking the driver for more
INSTALL_HINT = 'install them with: python -m pip install "numba-cuda[cu12]" (Linux or Windows; no GPU is needed)'

OPERATIONS = {  # the methods of a backend that launch kernels, as the field calls them
    "conv2d_forward": "forward",
    "conv2d_backward_data": "backward data",
    "conv2d_backward_filter": "backward filter",
    "conv2d_backward_bias": "backward bias",
    "maxpool_forward": "max-pool",
    "relu_maxpool_backward": "max-pool backward",
    "upsample_forward": "upsample",
    "relu_upsample_backward": "upsample backward",
    "gather_batch": "gather",
    "mse_loss": "loss",
    "sgd": "SGD",
    "prepare": "prepare",
    # What a version that fuses launches by itself.
    "stage_forward": "fused forward",
    "stage_backward": "fused backward",
}


class CompileError(RuntimeError):
    """A compiler refused a kernel; the message says which, for which target and why."""


# What is launched ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch, and what asked for it; ``stage`` is empty where the operation belongs to no stage."""

    kernel: Any
    types: tuple
    grid: tuple[int, ...]
    block: tuple[int, ...]
    stage: str
    operation: str


@dataclass(frozen=True)
class KernelUse:
    """A kernel with the argument types it is given, and everything that launches it so."""

    kernel: Any
    types: tuple
    name: str
    """How its module reaches it: ``conv2d_forward_kernel``, or ``KERNELS[wide]``."""
    versions: tuple[str, ...]
    operations: tuple[tuple[str, str], ...]
    """(stage, operation), in the order of the step."""
    threads: tuple[int, ...]
    """Block sizes, in threads."""
    blocks: tuple[int, ...]
    """Grid sizes, in blocks."""
    place: int
    """Among the uses of the first of ``versions``."""


class RecordingRuntime:
    """Stands where a GPU would: hands out host memory that nothing touches, and records launches."""

    threads_per_block = 256

    def __init__(self) -> None:
        """Start with nothing recorded."""
        self.launches: list[Launch] = []
        self.doing = [("", "")]  # the stage and operation under way; the last one is the innermost

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Reserve address space of the right shape and type."""
        return np.empty(shape, dtype)

    def write(self, buffer: np.ndarray, array: np.ndarray) -> None:
        """Ignore: values do not matter here."""

    def read(self, buffer: np.ndarray) -> np.ndarray:
        """Return the buffer, whatever is in it."""
        return buffer

    def synchronize(self) -> None:
        """Nothing is under way."""

    def gemm(self, *arguments: Any, **options: Any) -> None:
        """Ignore: cuBLAS is not ours to compile."""

    def bind(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...]) -> Any:
        """Return a launcher that records the kernel and the types it was given."""

        def record(*arguments: Any) -> None:
            types = tuple(numba.typeof(argument) for argument in arguments)
            self.launches.append(Launch(kernel, types, grid, block, *self.doing[-1]))

        return record

    def label(self, backend: Any) -> None:
        """Make the operations of ``backend`` say that they are under way."""
        for name, operation in OPERATIONS.items():
            setattr(backend, name, self._labelled(getattr(backend, name), name, operation))

    def _labelled(self, method: Callable, name: str, operation: str) -> Callable:
        @functools.wraps(method)
        def labelled(*arguments: Any, **options: Any) -> Any:
            stage = arguments[0].name if name.startswith("stage_") else self.doing[-1][0]
            self.doing.append((stage, operation))
            try:
                return method(*arguments, **options)
            finally:
                self.doing.pop()

        return labelled


def gpu_module(info: BackendInfo) -> ModuleType:
    """The module of a version's GPU code; UsageError if it has none."""
    if importlib.util.find_spec(f"{info.package}.gpu") is None:
        raise UsageError(f"{info.name} has no GPU kernels: there is no {info.package}.gpu")
    return importlib.import_module(f"{info.package}.gpu")


def recorded_launches(
    info: BackendInfo, architecture: Architecture | None = None, batch_size: int = BATCH_SIZE
) -> list[Launch]:
    """Launches of one training step of a version, in order, and of the first stage's backward data.

    Training never needs the gradient to the picture, but it is an operation like any other.
    """
    architecture = architecture or autoencoder()
    runtime = RecordingRuntime()
    backend = gpu_module(info).make_backend(runtime=runtime)
    runtime.label(backend)
    network = Network(backend, architecture, batch_size, initial_parameters(architecture, 0))
    images = backend.empty((batch_size, *architecture.input_shape), np.uint8)
    order, losses = backend.empty((batch_size,), np.int32), backend.empty((1,))
    network.step(images, order, 0, batch_size, 0.001, losses, 0)
    first, views = architecture.stages[0], network.views(batch_size)
    runtime.doing = [(first.name, "")]
    backend.conv2d_backward_data(views.convolved[0], network.parameters[f"{first.name}.weight"], views.picture)
    return runtime.launches


def kernel_uses(info: BackendInfo) -> list[KernelUse]:
    """The kernels of a version in the order of their first launch, one entry for each set of argument types."""
    from common import gpu_kernels

    module = gpu_module(info)
    names = {id(kernel): name for name, kernel in {**kernels_of(gpu_kernels), **kernels_of(module)}.items()}
    grouped: dict[tuple, list[Launch]] = {}
    for launch in recorded_launches(info):
        grouped.setdefault((launch.kernel, launch.types), []).append(launch)
    return [
        KernelUse(
            kernel=kernel,
            types=types,
            name=names.get(id(kernel), kernel.py_func.__name__),
            versions=(info.name,),
            operations=tuple(dict.fromkeys((launch.stage, launch.operation) for launch in launches)),
            threads=tuple(sorted({prod(launch.block) for launch in launches})),
            blocks=tuple(sorted({prod(launch.grid) for launch in launches})),
            place=place,
        )
        for place, ((kernel, types), launches) in enumerate(grouped.items())
    ]


def condensed(operations: Iterable[tuple[str, str]]) -> str:
    """Say (stage, operation) pairs in few words: ``forward conv1-4, backward data conv5``."""
    stages: dict[str, list[str]] = {}
    for stage, operation in operations:
        stages.setdefault(operation, []).append(stage)
    return ", ".join(f"{operation} {_runs(names)}".strip() for operation, names in stages.items())


def _runs(names: Iterable[str]) -> str:
    """conv1, conv2, conv3 and conv5 as ``conv1-3,5``."""
    numbered: dict[str, list[int]] = {}
    others = []
    for name in sorted(names):
        prefix, digits = re.fullmatch(r"(.*?)(\d*)", name).groups()
        if digits:
            numbered.setdefault(prefix, []).append(int(digits))
        elif name:
            others.append(name)
    for prefix, numbers in numbered.items():
        numbers.sort()
        runs = []
        for number in numbers:
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        others.append(prefix + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs))
    return " ".join(others)


def merged_uses(infos: Iterable[BackendInfo]) -> list[KernelUse]:
    """The kernels of several versions; one that they share, with the same types, comes once."""
    merged: dict[tuple, KernelUse] = {}
    for info in infos:
        for use in kernel_uses(info):
            key = (use.kernel, use.types)
            before = merged.get(key)
            if before is not None:
                use = replace(
                    before,
                    versions=before.versions + use.versions,
                    operations=tuple(dict.fromkeys(before.operations + use.operations)),
                    threads=tuple(sorted({*before.threads, *use.threads})),
                    blocks=tuple(sorted({*before.blocks, *use.blocks})),
                )
            merged[key] = use
    return list(merged.values())


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """Every kernel that a module's globals reach, by the way to it; the same in the simulator.

    Kernels are also made by functions and kept in dictionaries, tuples, lists, sets, dataclasses and class attributes,
    and a version may spread over several modules of its package.
    """
    if in_simulator():
        from numba.cuda.simulator.kernel import FakeCUDAKernel as Kernel
    else:
        from numba.cuda.dispatcher import CUDADispatcher as Kernel

    found: dict[str, Any] = {}
    seen: set[int] = set()
    package = module.__name__.rpartition(".")[0]

    def children(value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping):
            yield from ((f"[{key}]", item) for key, item in value.items())
        elif isinstance(value, tuple | list | set | frozenset):
            yield from ((f"[{i}]", item) for i, item in enumerate(value))
        elif isinstance(value, type):
            if value.__module__ == module.__name__:
                yield from ((f".{name}", item) for name, item in vars(value).items())
        elif is_dataclass(value):
            yield from ((f".{field.name}", getattr(value, field.name, None)) for field in fields(value))
        elif isinstance(value, ModuleType) and package not in ("", "common") and value.__name__.startswith(package):
            yield from ((f".{name}", item) for name, item in vars(value).items())

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Kernel):
            device = value._device if in_simulator() else value.targetoptions.get("device")
            if not device and id(value) not in seen:
                found[path] = value
            seen.add(id(value))
            return
        if id(value) not in seen:
            seen.add(id(value))
            for step, child in children(value):
                visit(path + step, child)

    for name, value in vars(module).items():
        if not name.startswith("__"):
            visit(name, value)
    return found


def missing_kernels(module: ModuleType, launched: Iterable[Any]) -> list[str]:
    """Names of the kernels that a module reaches and that are not among ``launched``."""
    identities = {id(kernel) for kernel in launched}
    return [name for name, kernel in kernels_of(module).items() if id(kernel) not in identities]


def uncovered_kernels(infos: Iterable[BackendInfo]) -> list[str]:
    """Say which kernels no operation launches: those of each version, and, given all versions, the shared ones."""
    from common import gpu_kernels

    infos = list(infos)
    launched = {info.name: [launch.kernel for launch in recorded_launches(info)] for info in infos}
    faults = []
    for info in infos:
        for name in missing_kernels(gpu_module(info), launched[info.name]):
            faults.append(f"{info.name}: {name} is launched by no operation of the network")
    if {info.name for info in infos} == {info.name for info in REGISTRY}:
        for name in missing_kernels(gpu_kernels, [kernel for kernels in launched.values() for kernel in kernels]):
            faults.append(f"common.gpu_kernels: {name} is launched by no version")
    return faults


# What the compilers make of it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """What the blocks that run at once on one multiprocessor share."""

    warps: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int
    """Shared memory that the system takes from each block."""
    shared_unit: int
    """Bytes in which shared memory is given out."""


# NVIDIA, "CUDA C++ Programming Guide" 13.0, "Technical Specifications per Compute Capability".
MULTIPROCESSORS: dict[Target, Multiprocessor] = {
    (7, 5): Multiprocessor(32, 16, 64 * 1024, 0, 256),
    (8, 0): Multiprocessor(64, 32, 164 * 1024, 1024, 128),
    (9, 0): Multiprocessor(64, 32, 228 * 1024, 1024, 128),
    (10, 0): Multiprocessor(64, 32, 228 * 1024, 1024, 128),
}
REGISTERS = 65_536  # of a multiprocessor, on all of these
REGISTER_UNIT = 256  # registers a warp is given at a time
WARP_UNIT = 4  # a multiprocessor has four schedulers, each with a quarter of the registers
LANES = 32


@dataclass(frozen=True)
class CompiledKernel:
    """What the compilers say of one kernel for one target."""

    name: str
    target: str
    registers: int
    """32-bit registers a thread."""
    stated_registers: int | None
    """The bound that the kernel states and is compiled under."""
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    """Stored and loaded, by a thread."""
    uses_float64: bool
    loop: LoopCounts | None
    """One turn of the inner loop, as in the PTX; None if no loop has a multiply-add."""
    occupancy: tuple[float, ...] = ()
    """Warps that can run at once, as a share of the most, for each of the block sizes it is launched with."""


def target_name(target: Target) -> str:
    """``sm_90`` for (9, 0)."""
    return f"sm_{target[0]}{target[1]}"


def find_targets(name: str | None) -> tuple[Target, ...]:
    """The target of that name, or all; UsageError lists the known ones."""
    known = {target_name(target): target for target in TARGETS}
    if name in (None, "all"):
        return TARGETS
    if name not in known:
        raise UsageError(f"unknown target {name!r}: choose from {', '.join(known)} or all")
    return (known[name],)


def occupancy(target: Target, threads: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that blocks of ``threads`` can fill; 0 if not even one block fits.

    ``registers`` are a thread's, ``shared_bytes`` a block's; the arithmetic is that of NVIDIA's occupancy calculator.
    """
    limits = MULTIPROCESSORS[target]
    warps = -(-threads // LANES)
    registers_of_warp = -(-registers * LANES // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // registers_of_warp // WARP_UNIT * WARP_UNIT // warps
    shared = -(-(shared_bytes + limits.reserved_bytes) // limits.shared_unit) * limits.shared_unit
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps


def compile_kernel(
    kernel: Any, types: tuple, target: Target, *, name: str | None = None, threads: tuple[int, ...] = ()
) -> CompiledKernel:
    """Compile one kernel through libNVVM and ptxas, as it is compiled for a real GPU; CompileError if one refuses."""
    from numba import cuda

    from common.gpu_jit import stated_registers

    name = name or kernel.py_func.__name__
    architecture = target_name(target)
    try:
        ptx, _ = cuda.compile(kernel.py_func, types, device=False, cc=target, abi="numba", output="ptx", fastmath=False)
    except Exception as error:  # Numba and libNVVM have many; what they say is the answer
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
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    shared = max((int(n) for n in re.findall(r"(\d+) bytes smem", report)), default=0)
    return CompiledKernel(
        name=name,
        target=architecture,
        registers=registers,
        stated_registers=bound,
        shared_bytes=shared,
        stack_bytes=max(stack, default=0),
        spill_bytes=sum(spills),
        uses_float64=bool(re.search(r"\.f64", ptx)),
        loop=inner_loop(ptx),
        occupancy=tuple(occupancy(target, size, registers, shared) for size in threads),
    )


def faults(compiled: CompiledKernel) -> list[str]:
    """What breaks the rules that every kernel keeps, each as a sentence that names kernel and target."""
    bound = compiled.stated_registers
    broken = []
    if bound is None:
        broken.append("states no register bound: declare it with gpu_kernel(registers=...)")
    elif compiled.registers > bound:
        broken.append(f"needs {compiled.registers} registers a thread and states {bound}")
    if compiled.spill_bytes:
        broken.append(f"spills {compiled.spill_bytes} bytes a thread to keep to {compiled.registers} registers")
    if compiled.stack_bytes:
        broken.append(f"has a stack frame of {compiled.stack_bytes} bytes a thread: a local array is not in registers")
    if compiled.uses_float64:
        broken.append("computes in double precision")
    if compiled.shared_bytes > MOST_SHARED_BYTES:
        broken.append(f"has {compiled.shared_bytes} bytes of shared memory a block, more than {MOST_SHARED_BYTES}")
    if 0.0 in compiled.occupancy:
        broken.append("has blocks too large to run at all")
    return [f"{compiled.name} on {compiled.target} {what}" for what in broken]


def compile_uses(
    uses: list[KernelUse], targets: Iterable[Target] = TARGETS, processes: int | None = None
) -> Iterator[tuple[KernelUse, CompiledKernel | CompileError]]:
    """Compile each use for each target, in order, and yield what came of it as soon as it is there.

    Each takes a second or so and Numba compiles one at a time, so they are shared between processes, by default one a
    core. A kernel cannot be sent to another process: each records the launches again and is told which is meant.
    """
    jobs = [(use, target) for use in uses for target in targets]
    processes = min(processes or usable_cores(), len(jobs))
    if processes <= 1:
        for use, target in jobs:
            yield use, _attempt(use, target)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_leave_interrupts_to_the_parent)
    try:
        waiting = [(use, pool.submit(_compile_place, use.versions[0], use.place, target)) for use, target in jobs]
        for use, answer in waiting:
            yield use, answer.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@functools.cache
def _uses_here(version: str) -> list[KernelUse]:
    return kernel_uses(find(version))


def _compile_place(version: str, place: int, target: Target) -> CompiledKernel | CompileError:
    return _attempt(_uses_here(version)[place], target)


def _attempt(use: KernelUse, target: Target) -> CompiledKernel | CompileError:
    try:
        return compile_kernel(use.kernel, use.types, target, name=use.name, threads=use.threads)
    except CompileError as error:
        return error


def check_compilers() -> None:
    """Make sure that kernels can be compiled here; UsageError says what to install."""
    if in_simulator():
        raise UsageError("NUMBA_ENABLE_CUDASIM is set: the simulator compiles no kernels")
    from numba import cuda

    def probe_kernel(x):
        x[0] = 1

    missing = "the GPU kernels cannot be compiled here, libNVVM or ptxas is missing"
    try:
        cuda.compile(probe_kernel, (numba.int32[::1],), device=False, cc=TARGETS[0], abi="numba", output="ptx")
        ptxas_path()
    except Exception as error:  # a missing library shows as one of many exceptions, and the answer is the same
        reason = " ".join(str(error).split())
        raise UsageError(f"{missing} ({type(error).__name__}: {reason}): {INSTALL_HINT}") from error


def ptxas_path() -> Path:
    """The ptxas that ``nvidia-cuda-nvcc`` installed; FileNotFoundError if it did not."""
    from importlib.metadata import PackageNotFoundError, files

    for distribution in ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"):
        try:
            found = [Path(file.locate()) for file in files(distribution) or () if file.name in ("ptxas", "ptxas.exe")]
        except PackageNotFoundError:
            continue
        if found:
            return found[0]
    raise FileNotFoundError("no ptxas: install numba-cuda[cu12]")
