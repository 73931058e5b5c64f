"""Which GPU kernels a version launches, found without a GPU.

No list of kernels is written by hand. A training step of the real network runs on a runtime that launches nothing; it
records each kernel with its argument types, its launch shape and the operation that asked for it. A new kernel is
therefore found as soon as a version uses it, and a kernel that no operation launches is a fault.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from math import prod
from types import ModuleType
from typing import Any

import numba
import numpy as np

from common.architecture import Architecture, autoencoder
from common.device import in_simulator
from common.errors import UsageError
from common.network import Network, initial_parameters
from common.operations import METHODS, STAGE_METHODS, WHOLE_STEP, Operation
from versions.registry import REGISTRY, BackendInfo

BATCH_SIZE = 64
RECORDED = {**METHODS, **STAGE_METHODS, "prepare": Operation.PREPARE}
"""The methods of a backend that can launch kernels, with the operation under which their launches are recorded."""


@dataclass(frozen=True)
class Launch:
    """One launch, and the operation that asked for it."""

    kernel: Any
    types: tuple
    grid: tuple[int, ...]
    block: tuple[int, ...]
    stage: str
    """``WHOLE_STEP`` where the operation belongs to no stage."""
    operation: Operation


@dataclass(frozen=True)
class KernelUse:
    """A kernel with the types of its arguments, and everything that launches it with these types."""

    kernel: Any
    types: tuple
    name: str
    """How its module reaches it: ``conv2d_forward_kernel``, or ``KERNELS[wide]``."""
    versions: tuple[str, ...]
    operations: tuple[tuple[str, Operation], ...]
    """(stage, operation), in the order of the step."""
    threads: tuple[int, ...]
    """Block sizes, in threads."""
    blocks: tuple[int, ...]
    """Grid sizes, in blocks."""
    place: int
    """Its index among the uses of the first of ``versions``."""


# Recording ----------------------------------------------------------------------------------------------------------


class RecordingRuntime:
    """Replaces the GPU: returns host memory that nothing writes to, and records launches."""

    threads_per_block = 256

    def __init__(self) -> None:
        """Start with no launches."""
        self.launches: list[Launch] = []
        self.doing: list[tuple[str, Operation]] = []  # stages and operations under way, the innermost last

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Reserve address space of this shape and type."""
        return np.empty(shape, dtype)

    def write(self, buffer: np.ndarray, array: np.ndarray) -> None:
        """Do nothing: values do not matter here."""

    def read(self, buffer: np.ndarray) -> np.ndarray:
        """Return the buffer with its undefined content."""
        return buffer

    def synchronize(self) -> None:
        """Do nothing: no work is queued."""

    def gemm(self, *arguments: Any, **options: Any) -> None:
        """Do nothing: cuBLAS is compiled already."""

    def bind(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...]) -> Any:
        """Return a launcher that records the kernel and its types; it raises RuntimeError outside every operation."""

        def record(*arguments: Any) -> None:
            if not self.doing:
                raise RuntimeError(f"{kernel} is launched outside {', '.join(RECORDED)}")
            types = tuple(numba.typeof(argument) for argument in arguments)
            self.launches.append(Launch(kernel, types, grid, block, *self.doing[-1]))

        return record

    def watch(self, backend: Any) -> None:
        """Wrap the operations of ``backend``, so that each launch is recorded under its stage and operation."""
        for name, operation in RECORDED.items():
            setattr(backend, name, self._watched(getattr(backend, name), name, operation))

    def _watched(self, method: Callable, name: str, operation: Operation) -> Callable:
        @functools.wraps(method)
        def watched(*arguments: Any, **options: Any) -> Any:
            outer = self.doing[-1][0] if self.doing else WHOLE_STEP
            stage = arguments[0].name if name in STAGE_METHODS else outer
            self.doing.append((stage, operation))
            try:
                return method(*arguments, **options)
            finally:
                self.doing.pop()

        return watched


def gpu_module(info: BackendInfo) -> ModuleType:
    """The module with a version's GPU code; UsageError if there is none."""
    if importlib.util.find_spec(f"{info.package}.gpu") is None:
        raise UsageError(f"{info.name} has no GPU kernels: there is no {info.package}.gpu")
    return importlib.import_module(f"{info.package}.gpu")


def recorded_launches(
    info: BackendInfo, architecture: Architecture | None = None, batch_size: int = BATCH_SIZE
) -> list[Launch]:
    """The launches of one training step of a version, in order, then those of the first stage's backward data.

    Training never needs the gradient to the picture, but the kernels must be able to compute it.
    """
    architecture = architecture or autoencoder()
    runtime = RecordingRuntime()
    backend = gpu_module(info).make_backend(runtime=runtime)
    runtime.watch(backend)
    network = Network(backend, architecture, batch_size, initial_parameters(architecture, 0))
    images = backend.empty((batch_size, *architecture.input_shape), np.uint8)
    order, losses = backend.empty((batch_size,), np.int32), backend.empty((1,))
    network.step(images, order, 0, batch_size, 0.001, losses, 0)
    first, views = architecture.stages[0], network.views(batch_size)
    runtime.doing = [(first.name, Operation.BACKWARD_DATA)]
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


def merged_uses(infos: Iterable[BackendInfo]) -> list[KernelUse]:
    """The kernels of several versions; a kernel that they share, with the same types, comes once."""
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


# Coverage -----------------------------------------------------------------------------------------------------------


def kernels_of(module: ModuleType) -> dict[str, Any]:
    """Every kernel that a module's globals reach, by its path: ``KERNELS[wide]``. This works in the simulator too.

    Functions make kernels as well; modules keep them in dictionaries, tuples, lists, sets, dataclasses and class
    attributes, and a version may have several modules in its package.
    """
    if in_simulator():
        from numba.cuda.simulator.kernel import FakeCUDAKernel as Kernel
    else:
        from numba.cuda.dispatcher import CUDADispatcher as Kernel

    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(path: str, value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Kernel):
            device = value._device if in_simulator() else value.targetoptions.get("device")
            if not device:
                found[path] = value
            return
        for step, child in _children(value, module):
            visit(path + step, child)

    for name, value in vars(module).items():
        if not name.startswith("__"):
            visit(name, value)
    return found


def _children(value: Any, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The values inside a value of ``module``, each with its step of the path: ``[wide]``, ``[0]`` or ``.kernel``."""
    package = module.__name__.rpartition(".")[0]
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


def missing_kernels(module: ModuleType, launched: Iterable[Any]) -> list[str]:
    """Names of the kernels that a module reaches and that are not among ``launched``."""
    identities = {id(kernel) for kernel in launched}
    return [name for name, kernel in kernels_of(module).items() if id(kernel) not in identities]


def uncovered_kernels(infos: Iterable[BackendInfo]) -> list[str]:
    """A sentence for each kernel of these versions that no operation launches; given all versions, also shared ones."""
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
