"""Which GPU kernels a version launches, found without a GPU.

No list of kernels is written by hand. A training step of the real network runs on a runtime that launches nothing; it
records each kernel with its argument types, its launch shape and the operation that asked for it. A kernel that no
operation launches is a fault.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields, is_dataclass
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
NETWORK = autoencoder()
RECORDED = {**METHODS, **STAGE_METHODS, "prepare": Operation.PREPARE}
"""The methods of a backend that can launch kernels, with the operation under which their launches are recorded."""


@dataclass(frozen=True)
class Launch:
    """One launch, and the operation that asked for it; ``stage`` is ``WHOLE_STEP`` where it belongs to none."""

    version: str
    kernel: Any
    types: tuple
    grid: tuple[int, ...]
    block: tuple[int, ...]
    stage: str
    operation: Operation


@dataclass(frozen=True)
class Product:
    """A matrix product of cuBLAS, (m, k) times (k, n), for each of a batch; and the operation that asked for it."""

    stage: str
    operation: Operation
    m: int
    n: int
    k: int
    batch: int


@dataclass(frozen=True)
class Shape:
    """The shape of one launch, in blocks and threads a block, and the operation that asked for it."""

    stage: str
    operation: Operation
    blocks: int
    threads: int


@dataclass(frozen=True)
class KernelUse:
    """A kernel with the types of its arguments, and everything that launches it; see ``KernelRow`` for the fields."""

    kernel: Any
    types: tuple
    name: str
    versions: list[str]
    shapes: list[Shape]
    stated_ffma: float | None
    """Kept here because a kernel loses it on its way to another process."""

    @property
    def operations(self) -> list[tuple[str, Operation]]:
        """The stages and operations that launch it, each once, in the order of the step."""
        return list(dict.fromkeys((shape.stage, shape.operation) for shape in self.shapes))

    @property
    def threads(self) -> list[int]:
        """Its block sizes."""
        return sorted({shape.threads for shape in self.shapes})

    @property
    def blocks(self) -> list[int]:
        """Its grid sizes."""
        return sorted({shape.blocks for shape in self.shapes})


class RecordingRuntime:
    """Replaces the GPU: returns host memory that nothing writes to, and records launches and products."""

    threads_per_block = 256

    def __init__(self, version: str) -> None:
        """Start with no launches."""
        self.version = version
        self.launches: list[Launch] = []
        self.products: list[Product] = []
        self.doing: list[tuple[str, Operation]] = []  # stages and operations under way, the innermost last

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Reserve address space of this shape and type."""
        return np.empty(shape, dtype)

    def ignore(self, *arguments: Any, **options: Any) -> None:
        """Do nothing: values do not matter here."""

    write = synchronize = ignore

    def gemm(self, m: int, n: int, k: int, *operands: Any, batch: int = 1, **options: Any) -> None:
        """Record a product; cuBLAS is compiled already."""
        if self.doing:
            self.products.append(Product(*self.doing[-1], m, n, k, batch))

    def gemv(self, m: int, n: int, *operands: Any) -> None:
        """Record a product with a vector."""
        self.gemm(m, 1, n)

    def bind(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...]) -> Callable[..., None]:
        """Return a launcher that records the kernel and its types; it raises RuntimeError outside every operation."""

        def record(*arguments: Any) -> None:
            if not self.doing:
                raise RuntimeError(f"{kernel} is launched outside {', '.join(RECORDED)}")
            types = tuple(map(numba.typeof, arguments))
            self.launches.append(Launch(self.version, kernel, types, grid, block, *self.doing[-1]))

        return record

    def watch(self, backend: Any) -> None:
        """Wrap the operations of ``backend``, so that each launch is recorded under its stage and operation."""
        for method, operation in RECORDED.items():
            setattr(backend, method, self._watched(getattr(backend, method), operation))

    def _watched(self, method: Callable[..., None], operation: Operation) -> Callable[..., None]:
        def watched(*arguments: Any, **options: Any) -> None:
            stage = self.doing[-1][0] if self.doing else WHOLE_STEP
            if operation in STAGE_METHODS.values():
                stage = arguments[0].name
            self.doing.append((stage, operation))
            method(*arguments, **options)
            self.doing.pop()

        return watched


def gpu_module(info: BackendInfo) -> ModuleType:
    """The module with a version's GPU code; UsageError if there is none."""
    if importlib.util.find_spec(f"{info.package}.gpu") is None:
        raise UsageError(f"{info.name} has no GPU kernels: there is no {info.package}.gpu")
    return importlib.import_module(f"{info.package}.gpu")


def gpu_modules(info: BackendInfo) -> list[ModuleType]:
    """The modules of a version that its GPU code imports, ``gpu`` first: each of them may hold kernels."""
    first = gpu_module(info)
    loaded = [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{info.package}.")]
    return [first, *(module for module in loaded if module is not first)]


def recorded_launches(info: BackendInfo) -> list[Launch]:
    """The launches of ``recorded_step``, in order."""
    return recorded_step(info).launches


def recorded_step(
    info: BackendInfo, batch_size: int = BATCH_SIZE, architecture: Architecture = NETWORK
) -> RecordingRuntime:
    """The launches and products of one training step of a version, then those of the first stage's backward data.

    Training never needs the gradient to the picture, but the kernels must be able to compute it, unless the version has
    whole stages only.
    """
    runtime = RecordingRuntime(info.name)
    backend = gpu_module(info).make_backend(runtime=runtime)
    runtime.watch(backend)
    network = Network(backend, architecture, batch_size, initial_parameters(architecture, 0))
    images = backend.empty((batch_size, *architecture.input_shape), np.uint8)
    order, losses = backend.empty((batch_size,), np.int32), backend.empty((1,))
    network.step(images, order, 0, batch_size, 0.001, losses, 0)
    if not backend.whole_stages:
        first, views = architecture.stages[0], network.views(batch_size)
        runtime.doing.append((first.name, Operation.BACKWARD_DATA))
        backend.conv2d_backward_data(views.kept[0]["y"], network.parameters[f"{first.name}.weight"], views.picture)
    return runtime


def kernel_uses(
    infos: Iterable[BackendInfo], batch_size: int = BATCH_SIZE, architecture: Architecture = NETWORK
) -> list[KernelUse]:
    """The kernels of these versions in the order of their first launch, one entry for each set of argument types."""
    from common import gpu_kernels
    from common.gpu_jit import kernel_label, stated_ffma

    names = kernels_of(gpu_kernels)
    grouped: dict[tuple, list[Launch]] = {}
    for info in infos:
        for module in reversed(gpu_modules(info)):  # where two hold a kernel, the name in ``gpu`` counts
            names.update(kernels_of(module))
        for launch in recorded_step(info, batch_size, architecture).launches:
            grouped.setdefault((launch.kernel, launch.types), []).append(launch)
    return [
        KernelUse(
            kernel=kernel,
            types=types,
            name=names.get(kernel, kernel_label(kernel)),
            versions=list(dict.fromkeys(launch.version for launch in launches)),
            shapes=[
                Shape(launch.stage, launch.operation, prod(launch.grid), prod(launch.block)) for launch in launches
            ],
            stated_ffma=stated_ffma(kernel),
        )
        for (kernel, types), launches in grouped.items()
    ]


def kernels_of(module: ModuleType) -> dict[Any, str]:
    """Each kernel of a module with its path: in globals, dictionaries, lists, tuples, dataclasses and own classes."""
    from numba import cuda

    kernel_type = type(cuda.jit(lambda: None))
    found: dict[Any, str] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, kernel_type):
            on_device_only = value._device if in_simulator() else value.targetoptions.get("device")
            if not on_device_only:
                found.setdefault(value, path)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{path}[{key}]", item)
        elif isinstance(value, tuple | list):
            visit(path, dict(enumerate(value)))
        elif is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                visit(f"{path}.{field.name}", getattr(value, field.name))
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for name, item in vars(value).items():
                visit(f"{path}.{name}", item)

    for name, value in vars(module).items():
        if not name.startswith("__"):
            visit(name, value)
    return found


def missing_kernels(module: ModuleType, launched: Collection[Any]) -> list[str]:
    """Paths of the kernels that a module holds and that are not among ``launched``."""
    return [path for kernel, path in kernels_of(module).items() if kernel not in launched]


def uncovered_kernels(infos: Iterable[BackendInfo]) -> list[str]:
    """A sentence for each kernel of these versions that no operation launches; given all versions, also shared ones."""
    from common import gpu_kernels

    faults = []
    launched: dict[BackendInfo, set[Any]] = {}
    for info in infos:
        launched[info] = {launch.kernel for launch in recorded_launches(info)}
        missing = [path for module in gpu_modules(info) for path in missing_kernels(module, launched[info])]
        faults += [f"{info.name}: {path} is launched by no operation of the network" for path in missing]
    if launched.keys() == set(REGISTRY):
        for path in missing_kernels(gpu_kernels, set().union(*launched.values())):
            faults.append(f"common.gpu_kernels: {path} is launched by no version")
    return faults
