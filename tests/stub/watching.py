"""A runtime that notes what the operations ask for, and a network in training on it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from bench.kernels.launches import gpu_module
from common.architecture import autoencoder
from common.gpu import CudaRuntime, Operand
from common.network import Network, initial_parameters
from tests.stub.driver import Driver, Launched
from versions.registry import find

BATCH_SIZE, LAST = 64, 24


@dataclass(frozen=True)
class Given:
    """A launch as an operation asked for it."""

    kernel: Any
    grid: tuple[int, ...]
    block: tuple[int, ...]
    arguments: tuple


@dataclass(frozen=True)
class Asked:
    """A product as an operation asked for it; gemv has k = 1 product wide."""

    name: str
    sizes: tuple[int, ...]
    operands: tuple[Operand, ...]
    batch: int = 1
    accumulate: bool = False


@dataclass
class Seen:
    """What was asked for, and what came to the driver and to cuBLAS."""

    given: list[Given] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    launched: list[Launched] = field(default_factory=list)
    products: list[Any] = field(default_factory=list)


class WatchedRuntime(CudaRuntime):
    """The real runtime; ``given`` and ``asked`` note the calls that reach it."""

    def __init__(self, precision="fp32"):
        super().__init__(precision)
        self.given, self.asked = [], []

    def bind(self, kernel, grid, block):
        launcher = super().bind(kernel, grid, block)

        def launch(*arguments):
            self.given.append(Given(kernel, grid, block, arguments))
            launcher(*arguments)

        return launch

    def gemm(self, m, n, k, a, b, c, *, batch=1, accumulate=False):
        self.asked.append(Asked("gemm", (m, n, k), (a, b, c), batch, accumulate))
        super().gemm(m, n, k, a, b, c, batch=batch, accumulate=accumulate)

    def gemv(self, m, n, a, x, y):
        self.asked.append(Asked("gemv", (m, n), (a, x, y)))
        super().gemv(m, n, a, x, y)


class Training:
    """A version's network on the watched runtime."""

    def __init__(self, name: str, backend: Any = None, runtime: Any = None) -> None:
        self.backend = backend or gpu_module(find(name)).make_backend(runtime=runtime or WatchedRuntime())
        self.runtime = self.backend.runtime
        architecture = autoencoder()
        self.network = Network(self.backend, architecture, BATCH_SIZE, initial_parameters(architecture, 0))
        self._images = self.backend.upload(np.zeros((BATCH_SIZE, *architecture.input_shape), np.uint8))
        self._order = self.backend.upload(np.arange(BATCH_SIZE, dtype=np.int32))
        self._losses = self.backend.upload(np.zeros(4, np.float32))

    def take(self, *, n: int = BATCH_SIZE, start: int = 0, rate: float = 0.5, index: int = 0) -> None:
        """Take a step."""
        self.network.step(self._images, self._order, start, n, rate, self._losses, index)

    def step(self, **options: Any) -> Seen:
        """Take a step, and tell what was seen of it."""
        from cupy.cuda import cublas

        driver = Driver()
        driver.forget()
        self.runtime.given, self.runtime.asked = [], []
        cublas.products.clear()
        self.take(**options)
        return Seen(self.runtime.given, self.runtime.asked, driver.launches(), list(cublas.products))


def packed(arguments: tuple) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes in bytes and values of what a kernel takes: for an array two unused words, size, item size, pointer, shape
    and strides; for a scalar its bits."""
    sizes, values = [], []
    for each in arguments:
        if isinstance(each, bool):
            words, size = [int(each)], 1
        elif isinstance(each, int):
            words, size = [each % 2**64], 8
        elif isinstance(each, float):
            words, size = [struct.unpack("=Q", struct.pack("=d", each))[0]], 8
        elif isinstance(each, np.float32):
            words, size = [struct.unpack("=I", struct.pack("=f", each))[0]], 4
        else:
            item = each.dtype.itemsize
            strides = [item * prod(each.shape[axis + 1 :]) for axis in range(each.ndim)]
            words = [0, 0, each.size, item, each.device_ctypes_pointer.value, *each.shape, *strides]
            size = 8
        sizes += [size] * len(words)
        values += words
    return tuple(sizes), tuple(values)


def in_three(dimensions: tuple[int, ...]) -> tuple[int, ...]:
    """A grid or a block with all three dimensions."""
    return (*dimensions, 1, 1)[:3]


def with_room(work: Callable[[], Any]) -> Any:
    """Call ``work`` where its frames find memory.

    CPython keeps the frames of Python functions in chunks of 16 KB. Where a compiler works just across the end of one,
    every call takes a chunk from the system and gives it back, which has cost a third of the time of these tests. The
    frame of this function is said to be so large that it gets a chunk of 1 MiB, with room for what it calls.
    """
    return work()


with_room.__code__ = with_room.__code__.replace(co_stacksize=70_000)
