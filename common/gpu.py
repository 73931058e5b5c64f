"""What the GPU versions share: memory and stream, launches, GEMM, element-wise operations and SGD.

There are two runtimes with the same interface. ``CudaRuntime`` is a real GPU: CuPy owns the memory, each array is
wrapped for Numba once, and kernels and cuBLAS run on one explicit stream. ``SimulatorRuntime`` is Numba's simulator,
for tests only: NumPy replaces cuBLAS, and nothing else differs. A buffer is a Numba device array in both.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numba import cuda

from common import gpu_kernels
from common.architecture import Architecture
from common.backend import Backend, Buffer, Precision
from common.device import in_simulator
from common.gpu_jit import BLOCK_BITS
from common.gpu_launch import Call, IdentityCache, Launcher, Tape
from common.work import MOST_LOSS_BLOCKS, sum_rows

CUBLAS_DEFAULT_MATH, CUBLAS_TF32_TENSOR_OP_MATH = 0, 3  # cublasMath_t
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


@dataclass(frozen=True, slots=True)
class Operand:
    """A row-major float32 matrix inside a buffer, or a batch of them.

    ``offset`` is where the first one starts and ``stride`` the distance from one to the next, both in floats. Stride 0
    uses the same matrix for the whole batch. ``row`` is the distance from the start of a row to that of the next; None
    if rows lie together.
    """

    buffer: Buffer
    offset: int = 0
    stride: int = 0
    transposed: bool = False
    row: int | None = None

    @property
    def address(self) -> int:
        """Device address of the first matrix."""
        return self.buffer.device_ctypes_pointer.value + 4 * self.offset

    @property
    def key(self) -> tuple[int, int, int, bool, int | None]:
        """Tells this operand apart from every other while its buffer lives."""
        return (id(self.buffer), self.offset, self.stride, self.transposed, self.row)


class CudaRuntime:
    """A real GPU through CuPy, on one stream."""

    threads_per_block = 256

    def __init__(self, precision: Precision) -> None:
        """Open the device; ``precision`` decides whether cuBLAS may use TF32."""
        import cupy
        from cupy.cuda import cublas

        self._cupy = cupy
        self._cublas = cublas
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._numba_stream = cuda.external_stream(self.stream.ptr)
        self._tape = Tape()
        self._products = IdentityCache()
        # A separate handle: the whole process shares CuPy's, and with it the math mode.
        self._handle = cublas.create()
        cublas.setMathMode(self._handle, CUBLAS_TF32_TENSOR_OP_MATH if precision == "tf32" else CUBLAS_DEFAULT_MATH)

    def empty(self, shape: tuple[int, ...], dtype: type) -> Buffer:
        """Allocate from CuPy's pool and wrap for Numba, once."""
        with self.stream:  # the pool keeps memory per stream
            return cuda.as_cuda_array(self._cupy.empty(shape, dtype), sync=False)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy from the host; the array may be changed as soon as this returns. RuntimeError while recording."""
        self._tape.refuse("write")
        buffer.copy_to_device(np.ascontiguousarray(array), stream=self._numba_stream)
        self.stream.synchronize()

    def read(self, buffer: Buffer) -> np.ndarray:
        """Copy to the host. RuntimeError while recording."""
        self._tape.refuse("read")
        host = buffer.copy_to_host(stream=self._numba_stream)
        self.stream.synchronize()
        return host

    def bind(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...]) -> Launcher:
        """Bind a kernel to its launch shape and stream."""
        return Launcher(kernel, grid, block, self._numba_stream, self._tape)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self.stream.synchronize()

    def record(self, work: Callable[[], Any]) -> list[Call]:
        """Run ``work``; returns its launches and products, ready for ``replay``. RuntimeError if it copies to or from
        the host, which could not be replayed."""
        return self._tape.record(work)

    def replay(self, calls: list[Call]) -> None:
        """Launch what was recorded, in the same order, with the same arguments, on the stream."""
        with self.stream:  # for CuPy's cuBLAS
            for call in calls:
                call()

    def gemm(
        self, m: int, n: int, k: int, a: Operand, b: Operand, c: Operand, *, batch: int = 1, accumulate: bool = False
    ) -> None:
        """c (m, n) = op(a) . op(b), added to c if ``accumulate``, for each of a batch; row-major.

        cuBLAS is column-major and sees a row-major matrix as its transpose: b goes first, and m and n are exchanged.
        """
        key = (m, n, k, batch, accumulate, a.key, b.key, c.key)
        found = self._products.get(key)
        if found is None:
            lda, ldb, ldc = a.row or (m if a.transposed else k), b.row or (k if b.transposed else n), c.row or n
            # cuBLAS reads alpha and beta through host pointers during the call.
            alpha, beta = ONE.ctypes.data, (ONE if accumulate else ZERO).ctypes.data
            sizes = (int(b.transposed), int(a.transposed), n, m, k)  # CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
            if batch == 1:
                call = partial(
                    self._cublas.sgemm,
                    self._handle, *sizes, alpha, b.address, ldb, a.address, lda, beta, c.address, ldc,
                )  # fmt: skip
            else:
                call = partial(
                    self._cublas.sgemmStridedBatched,
                    self._handle, *sizes, alpha,
                    b.address, ldb, b.stride,
                    a.address, lda, a.stride,
                    beta,
                    c.address, ldc, c.stride,
                    batch,
                )  # fmt: skip
            found = self._products.keep(key, call, [operand.buffer for operand in (a, b, c)])
        self._multiply(found[0], a, b, c)

    def gemv(self, m: int, n: int, a: Operand, x: Operand, y: Operand) -> None:
        """y (m,) = op(a) . x, with op(a) (m, n) and x (n,); row-major: ``a`` is (n, m) if it is transposed."""
        key = (m, n, a.key, x.key, y.key)
        found = self._products.get(key)
        if found is None:
            # Column-major, the stored matrix is (rows, columns), and is used transposed unless ``a`` already is.
            rows, columns = (m, n) if a.transposed else (n, m)
            call = partial(
                self._cublas.sgemv,
                self._handle, int(not a.transposed), rows, columns, ONE.ctypes.data,
                a.address, rows,
                x.address, 1,
                ZERO.ctypes.data,
                y.address, 1,
            )  # fmt: skip
            found = self._products.keep(key, call, [operand.buffer for operand in (a, x, y)])
        self._multiply(found[0], a, x, y)

    def _multiply(self, call: Call, *operands: Operand) -> None:
        """Run a product; where a recording is under way, keep it with the memory that it uses."""
        with self.stream:  # CuPy's wrapper runs cuBLAS on its current stream
            call()
        if self._tape.calls is not None:
            again = partial(call)
            again.operands = operands
            self._tape.calls.append(again)


class SimulatorRuntime:
    """Numba's simulator: kernels run as Python, in small blocks because simulating a thread is slow."""

    threads_per_block = 32

    def empty(self, shape: tuple[int, ...], dtype: type) -> Buffer:
        """Allocate a simulated device array."""
        return cuda.device_array(shape, dtype)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy in."""
        buffer.copy_to_device(np.ascontiguousarray(array))

    def read(self, buffer: Buffer) -> np.ndarray:
        """Copy out."""
        return buffer.copy_to_host()

    def bind(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...]) -> Any:
        """Bind a kernel to its launch shape, at each call anew: the simulator stores the shape in the kernel itself."""
        return lambda *arguments: kernel[grid, block](*arguments)

    def synchronize(self) -> None:
        """Do nothing: the simulator has finished when a launch returns."""

    def gemm(
        self, m: int, n: int, k: int, a: Operand, b: Operand, c: Operand, *, batch: int = 1, accumulate: bool = False
    ) -> None:
        """NumPy instead of cuBLAS; see CudaRuntime.gemm."""
        hosts = [operand.buffer.copy_to_host().reshape(-1) for operand in (a, b, c)]

        def matrix(operand: Operand, host: np.ndarray, rows: int, columns: int, i: int) -> np.ndarray:
            if operand.transposed:
                rows, columns = columns, rows
            first, row = operand.offset + i * operand.stride, operand.row or columns
            stored = np.lib.stride_tricks.as_strided(host[first:], (rows, columns), (4 * row, 4))
            return stored.T if operand.transposed else stored

        for i in range(batch):
            left, right = matrix(a, hosts[0], m, k, i), matrix(b, hosts[1], k, n, i)
            target = matrix(c, hosts[2], m, n, i)
            target[...] = left @ right + (target if accumulate else 0)
        c.buffer.copy_to_device(hosts[2].reshape(c.buffer.shape))

    def gemv(self, m: int, n: int, a: Operand, x: Operand, y: Operand) -> None:
        """See CudaRuntime.gemv."""
        self.gemm(m, 1, n, a, x, y)


class GpuBackend(Backend):
    """A version on the GPU: subclasses add the four convolution operations."""

    device = "gpu"

    def __init__(self, *, precision: Precision = "fp32", threads: int | None = None, runtime: Any = None) -> None:
        """Open the device, or use ``runtime`` if given (tests and the compile check have their own)."""
        super().__init__(precision=precision, threads=threads)
        self.runtime = runtime or (SimulatorRuntime() if in_simulator() else CudaRuntime(precision))
        self._bound: dict[tuple, Any] = {}
        self._reshaped: dict[tuple[int, tuple[int, ...]], tuple[Buffer, Buffer]] = {}
        self._recorded: weakref.WeakKeyDictionary[Any, dict[str, list[Call]]] = weakref.WeakKeyDictionary()

    # Launching --------------------------------------------------------------------------------------------------

    def launch(self, kernel: Any, values: int, *arguments: Any) -> None:
        """Run ``kernel`` on a one-dimensional grid with at least ``values`` threads. ValueError for too many."""
        if values > BLOCK_BITS:  # kernels keep the number of a thread in so many bits
            raise ValueError(f"{values} values are too many for one launch: at most {BLOCK_BITS}")
        block = self.runtime.threads_per_block
        self.launch_grid(kernel, (-(-values // block),), (block,), *arguments)

    def launch_grid(self, kernel: Any, grid: tuple[int, ...], block: tuple[int, ...], *arguments: Any) -> None:
        """Run ``kernel`` with a launch shape; it is bound to the shape the first time only."""
        key = (kernel, grid, block)
        launcher = self._bound.get(key)
        if launcher is None:
            launcher = self._bound[key] = self.runtime.bind(kernel, grid, block)
        launcher(*arguments)

    def replayed(self, owner: Any, name: str, work: Callable[[], Any]) -> None:
        """See Backend. On a real GPU the first call records launches and products, and later ones replay them."""
        if not isinstance(self.runtime, CudaRuntime):
            work()
            return
        recorded = self._recorded.setdefault(owner, {})
        if name in recorded:
            self.runtime.replay(recorded[name])
        else:
            recorded[name] = self.runtime.record(work)

    def reshaped(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        """A view of ``buffer`` in another shape, created once: creating one costs more than a launch."""
        key = (id(buffer), shape)
        if key not in self._reshaped:
            # Keeping the buffer alive too makes sure that no other object gets its id.
            self._reshaped[key] = (buffer, buffer.reshape(shape))
        return self._reshaped[key][1]

    def flat(self, buffer: Buffer) -> Buffer:
        """A view of ``buffer`` with one axis."""
        return self.reshaped(buffer, (prod(buffer.shape),))

    def sum_shares(
        self,
        partials: Buffer,
        shares: int,
        out: Buffer,
        *,
        offset: int = 0,
        size: int | None = None,
        accumulate: bool = False,
    ) -> None:
        """Add ``shares`` arrays of ``size`` floats, stored one after another in ``partials``, in a fixed order.

        ``offset`` is where the first one starts, in floats; ``size`` is that of ``out`` if not given. With
        ``accumulate`` the sum is added to ``out``.
        """
        size = prod(out.shape) if size is None else size
        threads = self.runtime.threads_per_block
        rows = sum_rows(shares, size)
        kernel = gpu_kernels.sum_shares_kernel_for(lanes=threads // rows, rows=rows)
        grid = (-(-size * rows // threads),)
        partials, out = self.flat(partials), self.flat(out)
        self.launch_grid(kernel, grid, (threads,), partials, offset, shares, out, size, accumulate)

    def _inner(self, buffer: Buffer) -> dict[str, int]:
        """Width and inner length of ``buffer`` seen as (rows, W, inner), as the element-wise kernels take them."""
        if self.layout == "NHWC":
            return {"width": buffer.shape[2], "inner": buffer.shape[3]}
        return {"width": buffer.shape[3], "inner": 1}

    # Memory -----------------------------------------------------------------------------------------------------

    def empty(self, shape: tuple[int, ...], dtype: type = np.float32) -> Buffer:
        """See Backend."""
        return self.runtime.empty(shape, dtype)

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        """See Backend."""
        self.runtime.write(buffer, array)

    def read(self, buffer: Buffer) -> np.ndarray:
        """See Backend."""
        return self.runtime.read(buffer)

    def synchronize(self) -> None:
        """See Backend."""
        self.runtime.synchronize()

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate the partial sums of the loss, and forget everything prepared for the buffers used so far."""
        self._bound.clear()
        self._reshaped.clear()
        self._recorded.clear()
        self._partials = self.empty((MOST_LOSS_BLOCKS,))

    # Shared operations ------------------------------------------------------------------------------------------

    def gather_batch(self, images: Buffer, order: Buffer, start: int, x: Buffer) -> None:
        """See Backend."""
        _, channels, height, width = images.shape
        kernel = gpu_kernels.gather_kernel_for(layout=self.layout, channels=channels, positions=height * width)
        self.launch(kernel, prod(x.shape), self.flat(images), order, start, self.flat(x))

    def maxpool_forward(self, y: Buffer, out: Buffer) -> None:
        """See Backend."""
        kernel = gpu_kernels.maxpool_forward_kernel_for(**self._inner(out))
        self.launch(kernel, prod(out.shape), self.flat(y), self.flat(out))

    def relu_maxpool_backward(self, y: Buffer, dout: Buffer, dy: Buffer) -> None:
        """See Backend."""
        kernel = gpu_kernels.relu_maxpool_backward_kernel_for(**self._inner(dout))
        self.launch(kernel, prod(dout.shape), *map(self.flat, (y, dout, dy)))

    def upsample_forward(self, y: Buffer, out: Buffer) -> None:
        """See Backend."""
        kernel = gpu_kernels.upsample_forward_kernel_for(**self._inner(y))
        self.launch(kernel, 2 * prod(y.shape), self.flat(y), self.flat(out))

    def relu_upsample_backward(self, y: Buffer, dout: Buffer, dy: Buffer) -> None:
        """See Backend."""
        kernel = gpu_kernels.relu_upsample_backward_kernel_for(**self._inner(y))
        self.launch(kernel, prod(y.shape), *map(self.flat, (y, dout, dy)))

    def mse_loss(self, prediction: Buffer, target: Buffer, gradient: Buffer, losses: Buffer, step: int) -> None:
        """See Backend."""
        values = prod(prediction.shape)
        threads = self.runtime.threads_per_block
        blocks = min(-(-values // threads), MOST_LOSS_BLOCKS)
        partial_kernel, final_kernel = gpu_kernels.mse_kernels_for(threads=threads)
        flat = [self.flat(buffer) for buffer in (prediction, target, gradient)]
        self.launch_grid(partial_kernel, (blocks,), (threads,), *flat, self._partials, np.float32(2 / values))
        self.launch_grid(final_kernel, (1,), (threads,), self._partials, blocks, np.float32(1 / values), losses, step)

    def sgd(self, parameters: Buffer, gradients: Buffer, learning_rate: float) -> None:
        """See Backend."""
        self.launch(gpu_kernels.sgd_kernel, parameters.size, parameters, gradients, np.float32(learning_rate))
