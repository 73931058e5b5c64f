"""What the CPU versions share: NumPy memory, thread counts, element-wise operations and SGD."""

from __future__ import annotations

import math

import numba
import numpy as np
from threadpoolctl import threadpool_limits

from common import cpu_kernels
from common.architecture import Architecture
from common.backend import Backend, Precision
from common.device import CACHE_LINE, usable_cores
from common.errors import UsageError


class CpuBackend(Backend):
    """A version on the CPU: subclasses add the four convolution operations.

    Numba's threads run in parallel over the pictures of a batch. A BLAS call inside one of them uses a single thread:
    a picture's data then stays in its core's cache, and two thread pools would compete for the cores. Creating a
    backend therefore sets Numba's thread count, and BLAS's to one, for the whole process.
    """

    device = "cpu"

    def __init__(self, *, precision: Precision = "fp32", threads: int | None = None) -> None:
        """Set the thread count; UsageError if it is below one or above Numba's maximum."""
        super().__init__(precision=precision, threads=threads or min(usable_cores(), numba.config.NUMBA_NUM_THREADS))
        if not 1 <= self.threads <= numba.config.NUMBA_NUM_THREADS:
            raise UsageError(f"threads {threads}: choose from 1 to {numba.config.NUMBA_NUM_THREADS}")
        numba.set_num_threads(self.threads)
        threadpool_limits(limits=1, user_api="blas")
        self._sums = np.empty(0, np.float32)
        # Operations of this layout, chosen once: self._elementwise["gather"](...)
        suffix = self.layout.lower()
        names = ("gather", "maxpool_forward", "relu_maxpool_backward", "upsample_forward", "relu_upsample_backward")
        self._elementwise = {name: getattr(cpu_kernels, f"{name}_{suffix}") for name in names}

    def empty(self, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        """Allocate a NumPy array aligned to a cache line.

        NumPy does not align its own arrays to cache lines. Where they begin differs between processes, and with it
        the speed of the kernels.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = np.empty(size + CACHE_LINE, np.uint8)
        start = -memory.ctypes.data % CACHE_LINE
        return memory[start : start + size].view(dtype).reshape(shape)

    def write(self, buffer: np.ndarray, array: np.ndarray) -> None:
        """Copy in."""
        buffer[...] = array

    def read(self, buffer: np.ndarray) -> np.ndarray:
        """Copy out."""
        return buffer.copy()

    def synchronize(self) -> None:
        """Do nothing: every operation has finished when its call returns."""

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate one sum per picture for the loss."""
        self._sums = self.empty((batch_size,))

    def gather_batch(self, images: np.ndarray, order: np.ndarray, start: int, x: np.ndarray) -> None:
        """See Backend."""
        self._elementwise["gather"](images, order, start, x)

    def maxpool_forward(self, y: np.ndarray, out: np.ndarray) -> None:
        """See Backend."""
        self._elementwise["maxpool_forward"](y, out)

    def relu_maxpool_backward(self, y: np.ndarray, dout: np.ndarray, dy: np.ndarray) -> None:
        """See Backend."""
        self._elementwise["relu_maxpool_backward"](y, dout, dy)

    def upsample_forward(self, y: np.ndarray, out: np.ndarray) -> None:
        """See Backend."""
        self._elementwise["upsample_forward"](y, out)

    def relu_upsample_backward(self, y: np.ndarray, dout: np.ndarray, dy: np.ndarray) -> None:
        """See Backend."""
        self._elementwise["relu_upsample_backward"](y, dout, dy)

    def mse_loss(
        self, prediction: np.ndarray, target: np.ndarray, gradient: np.ndarray, losses: np.ndarray, step: int
    ) -> None:
        """See Backend."""
        n = prediction.shape[0]
        cpu_kernels.mse_loss(
            prediction.reshape(n, -1), target.reshape(n, -1), gradient.reshape(n, -1), self._sums, losses, step
        )

    def sgd(self, parameters: np.ndarray, gradients: np.ndarray, learning_rate: float) -> None:
        """See Backend."""
        cpu_kernels.sgd(parameters, gradients, np.float32(learning_rate))
