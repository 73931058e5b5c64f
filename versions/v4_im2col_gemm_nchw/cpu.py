"""V4 on the CPU: each thread unfolds one picture at a time and passes it to single-threaded BLAS.

Products over the whole batch would stream hundreds of megabytes of columns through memory. The columns of one picture,
at most about a megabyte in this network, are used while they are still in the core's cache. The product is BLAS's
sgemm, called inside the parallel loop: it accumulates into a thread's own filter gradient without a temporary.
"""

import numpy as np
from numba import njit, prange

from common.architecture import Architecture
from common.backend import Precision
from common.cpu import CpuBackend
from common.cpu_blas import gemm
from common.cpu_kernels import SUM_MATH, add_partials, flip_filters
from versions.v4_im2col_gemm_nchw.plan import workspace


@njit
def im2col(x, columns):
    # x (C,H,W)  columns (C*9, H*W): row (c,r,s) at position (h,w) is x[c, h+r-1, w+s-1], zero outside
    C, H, W = x.shape
    P = H * W
    plane = x.reshape(C, P)
    for c in range(C):
        for r in range(3):
            for s in range(3):
                row = columns[(c * 3 + r) * 3 + s]
                # Tap (r, s) shifts the flat plane by `shift`; values that wrap around a side are zeroed below.
                shift = (r - 1) * W + s - 1
                first, last = max(0, -shift), min(P, P - shift)
                source = plane[c, first + shift : last + shift]
                target = row[first:last]
                for i in range(last - first):
                    target[i] = source[i]
                for i in range(first):
                    row[i] = 0
                for i in range(last, P):
                    row[i] = 0
                if s != 1:
                    side = 0 if s == 0 else W - 1
                    for h in range(H):
                        row[h * W + side] = 0


@njit
def col2im(columns, bias, relu, out):
    # columns (K*9, H*W), overwritten  bias (K,) or (0,)  out (K,H,W): the transpose of im2col, then bias and ReLU
    K, H, W = out.shape
    P = H * W
    planes = out.reshape(K, P)
    zero = np.float32(0)
    for k in range(K):
        plane = planes[k]
        start = bias[k] if bias.size > 0 else zero
        # The centre tap reaches every position.
        centre = columns[k * 9 + 4]
        for i in range(P):
            plane[i] = centre[i] + start
        for r in range(3):
            for s in range(3):
                if r == 1 and s == 1:
                    continue
                row = columns[(k * 3 + r) * 3 + s]
                if s != 1:
                    # These values are outside the picture and must not wrap into the neighbouring row.
                    side = 0 if s == 0 else W - 1
                    for h in range(H):
                        row[h * W + side] = 0
                shift = (r - 1) * W + s - 1
                first, last = max(0, -shift), min(P, P - shift)
                target = plane[first + shift : last + shift]
                source = row[first:last]
                for i in range(last - first):
                    target[i] += source[i]
        if relu:
            for i in range(P):
                # A NaN fails this comparison and stays a NaN.
                plane[i] = zero if plane[i] <= zero else plane[i]


@njit(parallel=True)
def columns_gemm_kernel(x, w, b, y, relu, workspace):
    # x (N,C,H,W)  w (K,C*9)  b (K,) or (0,)  y (N,K,H,W): y = w . im2col(x) + b
    N, C, H, W = x.shape
    K = y.shape[1]
    P = H * W
    zero = np.float32(0)
    threads = workspace.shape[0]
    for t in prange(threads):
        columns = workspace[t, : C * 9 * P].reshape(C * 9, P)
        for n in range(N * t // threads, N * (t + 1) // threads):
            im2col(x[n], columns)
            gemm(K, P, C * 9, w, C * 9, False, columns, P, False, y[n], P, False)
            planes = y[n].reshape(K, P)
            if b.size > 0:
                for k in range(K):
                    for i in range(P):
                        value = planes[k, i] + b[k]
                        planes[k, i] = zero if relu and value <= zero else value


@njit(parallel=True)
def gemm_columns_kernel(x, w, b, y, relu, workspace):
    # x (N,C,H,W)  w (C,K*9)  b (K,) or (0,)  y (N,K,H,W): y = col2im(w^T . x) + b
    N, K, H, W = y.shape
    P = H * W
    threads = workspace.shape[0]
    for t in prange(threads):
        columns = workspace[t, : K * 9 * P].reshape(K * 9, P)
        for n in range(N * t // threads, N * (t + 1) // threads):
            gemm(K * 9, P, x.shape[1], w, K * 9, True, x[n], P, False, columns, P, False)
            col2im(columns, b, relu, y[n])


@njit(parallel=True)
def filter_gradient_kernel(narrow, wide, workspace, partials):
    # narrow (N,C,H,W)  wide (N,K,H,W)  partials (threads, K*C*9 or more): each, as (K,C*9), is the sum of
    # wide[n] . im2col(narrow[n])^T over the thread's n
    N, C, H, W = narrow.shape
    P = H * W
    threads = workspace.shape[0]
    size = wide.shape[1] * C * 9
    for t in prange(threads):
        columns = workspace[t, : C * 9 * P].reshape(C * 9, P)
        partial = partials[t, :size]
        first = N * t // threads
        if first == N * (t + 1) // threads:
            partial[:] = 0
        for n in range(first, N * (t + 1) // threads):
            im2col(narrow[n], columns)
            gemm(wide.shape[1], C * 9, P, wide[n], P, False, columns, P, True, partial, C * 9, n > first)


@njit(parallel=True, fastmath=SUM_MATH)
def conv2d_backward_bias_kernel(dy, db):
    # dy (N,K,H,W)  db (K,)
    N, K, H, W = dy.shape
    for k in prange(K):
        total = np.float32(0)
        for n in range(N):
            # One sum per plane first: adding short sums has a smaller rounding error than one long sum.
            plane = np.float32(0)
            for h in range(H):
                for w in range(W):
                    plane += dy[n, k, h, w]
            total += plane
        db[k] = total


class Im2colGemmCpu(CpuBackend):
    """V4's four convolution operations on the CPU."""

    layout = "NCHW"

    def __init__(self, *, precision: Precision = "fp32", threads: int | None = None) -> None:
        """See CpuBackend."""
        super().__init__(precision=precision, threads=threads)
        self._no_bias = np.empty(0, np.float32)

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate the flipped filters and, for each thread, a column matrix and a partial filter gradient."""
        super().prepare(architecture, batch_size)
        shapes = workspace(architecture, batch_size, "cpu", self.threads)
        self._columns = self.empty(shapes["columns"])
        self._flipped = self.empty(shapes["flipped filters"])
        self._partials = self.empty(shapes["filter gradient parts"])

    def conv2d_forward(self, x, w, b, y, relu):
        self._convolve(x, w, b, y, relu)

    def conv2d_backward_data(self, dy, w, dx):
        # dx is the convolution of dy with the flipped filters.
        self._convolve(dy, w, self._no_bias, dx, relu=False, transposed=True)

    def conv2d_backward_filter(self, x, dy, dw):
        flip = x.shape[1] > dy.shape[1]
        narrow, wide = (dy, x) if flip else (x, dy)
        rows, columns = wide.shape[1], 9 * narrow.shape[1]
        gradient = (self._flipped[: dw.size] if flip else dw).reshape(rows, columns)
        filter_gradient_kernel(narrow, wide, self._columns, self._partials)
        add_partials(self._partials, gradient.reshape(gradient.size))
        if flip:
            flip_filters(gradient.reshape(rows, narrow.shape[1], 3, 3), dw.reshape(narrow.shape[1], -1))

    def conv2d_backward_bias(self, dy, db):
        conv2d_backward_bias_kernel(dy, db)

    def _convolve(self, source, w, b, target, relu, *, transposed=False):
        """Convolve source (N,C,H,W) into target (N,K,H,W) with w (K,C,3,3), or flipped w (C,K,3,3) if transposed."""
        C, K = source.shape[1], target.shape[1]
        unfold_source = C < K or (C == K and not transposed)
        # Unfolding the source needs w as (K, C*9), folding the target needs it as (C, K*9). If w is stored the other
        # way, it is flipped.
        if unfold_source == transposed:
            bank = self._flipped[: w.size].reshape(w.shape[1], -1)
            flip_filters(w, bank)
        else:
            bank = w.reshape(w.shape[0], -1)
        kernel = columns_gemm_kernel if unfold_source else gemm_columns_kernel
        kernel(source, bank, b, target, relu, self._columns)


make_backend = Im2colGemmCpu
