"""V4 on the GPU: unfold a part of the batch, one cuBLAS product for the part, fold.

Forward and backward data have a column matrix per picture, (n, rows, positions), so that the product reads and writes
NCHW pictures: one strided-batched GEMM per part, in which all pictures share the filters (stride 0). The filter
gradient also sums over pictures. There the columns of all pictures of a part are side by side, (rows, n * positions),
the pictures of the other side are repacked in the same way, and one GEMM computes the whole sum; later parts are added
to the first. The bias gradient is two products with ones, the first over positions, the second over pictures.
"""

from math import prod

import numpy as np
from numba import cuda

from common.architecture import TAPS, Architecture, Stage
from common.backend import Precision
from common.gpu import GpuBackend, Operand
from common.gpu_jit import gpu_kernel
from versions.v4_im2col_gemm_nchw import floats_per_picture, parts, workspace


@gpu_kernel(registers=40)
def im2col_kernel(x, first, columns, row_stride, picture_stride):
    # x (N,C,H,W)  columns flat: row (c,r,s) of picture n at n * picture_stride + (c,r,s) * row_stride
    # grid (blocks of rows h, C*9, pictures)  block (w, h)
    _, _, H, W = x.shape
    row = cuda.blockIdx.y
    n = cuda.blockIdx.z
    c = row // 9
    tap = row % 9
    h = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    source_h = h + tap // 3 - 1
    start = n * picture_stride + row * row_stride + h * W
    # The last block of rows can reach below the picture.
    if h < H:
        for w in range(cuda.threadIdx.x, W, cuda.blockDim.x):
            source_w = w + tap % 3 - 1
            value = np.float32(0)
            # Outside the picture is padding: zero.
            if 0 <= source_h < H and 0 <= source_w < W:
                value = x[first + n, c, source_h, source_w]
            columns[start + w] = value


@gpu_kernel(registers=72)
def col2im_kernel(columns, out, first, bias, has_bias, relu):
    # columns flat (n,K*9,H*W)  out (N,K,H,W)  bias (>= K,): the transpose of im2col, then bias and ReLU
    # grid (blocks of rows h, K, pictures)  block (w, h)
    _, K, H, W = out.shape
    k = cuda.blockIdx.y
    n = cuda.blockIdx.z
    h = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    start = (n * K + k) * 9 * H * W
    # The last block of rows can reach below the picture.
    if h < H:
        for w in range(cuda.threadIdx.x, W, cuda.blockDim.x):
            total = bias[k] if has_bias else np.float32(0)
            for r in range(3):
                for s in range(3):
                    source_h = h + 1 - r
                    source_w = w + 1 - s
                    # Only positions inside the picture have columns.
                    if 0 <= source_h < H and 0 <= source_w < W:
                        total += columns[start + (r * 3 + s) * H * W + source_h * W + source_w]
            # A NaN fails this comparison and stays a NaN.
            if relu and total <= np.float32(0):
                total = np.float32(0)
            out[first + n, k, h, w] = total


@gpu_kernel(registers=32)
def bias_relu_kernel(y, first, bias, relu):
    # y (N,K,H,W), in place  bias (K,)
    # grid (blocks of rows h, K, pictures)  block (w, h)
    _, _, H, W = y.shape
    k = cuda.blockIdx.y
    n = first + cuda.blockIdx.z
    h = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    # The last block of rows can reach below the picture.
    if h < H:
        for w in range(cuda.threadIdx.x, W, cuda.blockDim.x):
            value = y[n, k, h, w] + bias[k]
            # A NaN fails this comparison and stays a NaN.
            if relu and value <= np.float32(0):
                value = np.float32(0)
            y[n, k, h, w] = value


@gpu_kernel(registers=32)
def repack_kernel(x, first, packed, offset):
    # x (N,C,H,W)  packed, from `offset` on, (C, pictures*H*W): pictures side by side
    # grid (blocks of rows h, C, pictures)  block (w, h)
    _, _, H, W = x.shape
    c = cuda.blockIdx.y
    n = cuda.blockIdx.z
    h = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    start = offset + (c * cuda.gridDim.z + n) * H * W + h * W
    # The last block of rows can reach below the picture.
    if h < H:
        for w in range(cuda.threadIdx.x, W, cuda.blockDim.x):
            packed[start + w] = x[first + n, c, h, w]


@gpu_kernel(registers=32)
def flip_filters_kernel(w, K, C, flipped):
    # w (K,C,9)  flipped (C,K,9), both flat: K and C exchanged, each window rotated by 180 degrees; its own inverse
    i = cuda.grid(1)
    # The grid is rounded up to whole blocks.
    if i < K * C * 9:
        tap = i % 9
        k = i // 9 % K
        c = i // (9 * K)
        flipped[i] = w[(k * C + c) * 9 + 8 - tap]


class Im2colGemmGpu(GpuBackend):
    """V4's four convolution operations on the GPU."""

    layout = "NCHW"

    def __init__(self, *, precision: Precision = "fp32", threads: int | None = None, runtime=None) -> None:
        """See GpuBackend."""
        super().__init__(precision=precision, threads=threads, runtime=runtime)
        self._parts: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate the workspace, whose size is bounded."""
        super().prepare(architecture, batch_size)
        shapes = workspace(architecture, batch_size, "gpu", 1)
        self._columns = self.empty(shapes["columns"])
        self._flipped = self.empty(shapes["flipped filters"])
        self._flipped_gradient = self.empty(shapes["flipped filter gradient"])
        self._bias_sums = self.empty(shapes["bias partial sums"])
        self._ones = self.upload(np.ones(shapes["ones"], np.float32))
        self._parts.clear()

    def conv2d_forward(self, x, w, b, y, relu):
        self._convolve(x, w, b, y, relu)

    def conv2d_backward_data(self, dy, w, dx):
        # dx is the convolution of dy with the flipped filters.
        self._convolve(dy, w, None, dx, relu=False, transposed=True)

    def conv2d_backward_filter(self, x, dy, dw):
        flip = x.shape[1] > dy.shape[1]
        narrow, wide = (dy, x) if flip else (x, dy)
        _, C, H, W = narrow.shape
        K = wide.shape[1]
        gradient = self._flipped_gradient if flip else dw
        for first, count in self._split(narrow, wide):
            positions = count * H * W
            packed = TAPS * C * positions  # the other side's pictures are stored after the columns
            self._over_planes(im2col_kernel, narrow, TAPS * C, count, narrow, first, self._columns, positions, H * W)
            self._over_planes(repack_kernel, wide, K, count, wide, first, self._columns, packed)
            self.runtime.gemm(
                K,
                TAPS * C,
                positions,
                Operand(self._columns, packed),
                Operand(self._columns, transposed=True),
                Operand(gradient),
                accumulate=first > 0,
            )
        if flip:
            self._flip(self._flipped_gradient, K, C, self.flat(dw))

    def conv2d_backward_bias(self, dy, db):
        N, K, H, W = dy.shape
        ones = Operand(self._ones)
        # (N*K, H*W) . (H*W, 1), then (1, N) . (N, K)
        self.runtime.gemm(N * K, 1, H * W, Operand(dy), ones, Operand(self._bias_sums))
        self.runtime.gemm(1, K, N, ones, Operand(self._bias_sums), Operand(db))

    def _convolve(self, source, w, b, target, relu, *, transposed=False):
        """Convolve source (N,C,H,W) into target (N,K,H,W) with w (K,C,3,3), or flipped w (C,K,3,3) if transposed."""
        _, C, H, W = source.shape
        K = target.shape[1]
        P = H * W
        unfold_source = C < K or (C == K and not transposed)
        bank = w
        if unfold_source == transposed:
            # w is stored for folding and needed for unfolding, or the other way round.
            self._flip(self.flat(w), w.shape[0], w.shape[1], self._flipped)
            bank = self._flipped
        for first, count in self._split(source, target):
            if unfold_source:
                rows = TAPS * C
                self._over_planes(im2col_kernel, source, rows, count, source, first, self._columns, P, rows * P)
                self.runtime.gemm(
                    K,
                    P,
                    rows,
                    Operand(bank),
                    Operand(self._columns, stride=rows * P),
                    Operand(target, first * K * P, K * P),
                    batch=count,
                )
                if b is not None:
                    self._over_planes(bias_relu_kernel, target, K, count, target, first, b, relu)
            else:
                rows = TAPS * K
                self.runtime.gemm(
                    rows,
                    P,
                    C,
                    Operand(bank, transposed=True),
                    Operand(source, first * C * P, C * P),
                    Operand(self._columns, stride=rows * P),
                    batch=count,
                )
                has_bias = b is not None
                bias = b if has_bias else self._ones
                self._over_planes(col2im_kernel, target, K, count, self._columns, target, first, bias, has_bias, relu)

    def _over_planes(self, kernel, pictures, rows, count, *arguments):
        """Launch over (rows of a plane, ``rows`` planes, ``count`` pictures), threads along W, then H."""
        H, W = pictures.shape[2:]
        across = min(W, 32)
        down = min(H, max(1, self.runtime.threads_per_block // across))
        self.launch_grid(kernel, (-(-H // down), rows, count), (across, down), *arguments)

    def _flip(self, w, filters, channels, flipped):
        self.launch(flip_filters_kernel, filters * channels * TAPS, w, filters, channels, flipped)

    def _split(self, a, b):
        """Parts of the batch whose columns and repacked pictures fit into the workspace."""
        key = (*a.shape, b.shape[1])
        if key not in self._parts:
            N, C, H, W = a.shape
            per_picture = floats_per_picture(Stage("", C, b.shape[1], H, W))
            self._parts[key] = parts(N, max(1, prod(self._columns.shape) // per_picture))
        return self._parts[key]


make_backend = Im2colGemmGpu
