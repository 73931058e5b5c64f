"""V1 on the CPU: plain nested loops over NHWC arrays, parallel over pictures and rows.

The innermost loop is always over a contiguous axis. The compiler may reorder sums to fill vector registers; apart from
that it keeps the arithmetic as written.
"""

import numpy as np
from numba import njit, prange

from common.cpu import CpuBackend
from common.cpu_kernels import SUM_MATH


@njit(parallel=True, fastmath=SUM_MATH)
def conv2d_forward_kernel(x, w, b, y, relu):
    # x (N,H,W,C)  w (K,R,S,C)  b (K,)  y (N,H,W,K)
    N, H, W, C = x.shape
    K, R, S, _ = w.shape
    for row in prange(N * H):
        n, h = row // H, row % H
        for v in range(W):
            for k in range(K):
                total = b[k]
                for r in range(max(0, 1 - h), min(R, H + 1 - h)):
                    for s in range(max(0, 1 - v), min(S, W + 1 - v)):
                        for c in range(C):
                            total += x[n, h + r - 1, v + s - 1, c] * w[k, r, s, c]
                # A NaN fails this comparison and stays a NaN.
                y[n, h, v, k] = np.float32(0) if relu and total <= np.float32(0) else total


@njit(parallel=True, fastmath=SUM_MATH)
def conv2d_backward_data_kernel(dy, w, dx):
    # dy (N,H,W,K)  w (K,R,S,C)  dx (N,H,W,C)
    N, H, W, K = dy.shape
    _, R, S, C = w.shape
    for row in prange(N * H):
        n, h = row // H, row % H
        for v in range(W):
            for c in range(C):
                dx[n, h, v, c] = np.float32(0)
            for r in range(max(0, h + 2 - H), min(R, h + 2)):
                for s in range(max(0, v + 2 - W), min(S, v + 2)):
                    for k in range(K):
                        g = dy[n, h + 1 - r, v + 1 - s, k]
                        for c in range(C):
                            dx[n, h, v, c] += g * w[k, r, s, c]


@njit(parallel=True, fastmath=SUM_MATH)
def conv2d_backward_filter_kernel(x, dy, dw):
    # x (N,H,W,C)  dy (N,H,W,K)  dw (K,R,S,C)
    N, H, W, C = x.shape
    K, R, S, _ = dw.shape
    for row in prange(K * R):
        k, r = row // R, row % R
        for s in range(S):
            for c in range(C):
                dw[k, r, s, c] = np.float32(0)
        for n in range(N):
            for h in range(max(0, 1 - r), min(H, H + 1 - r)):
                for v in range(W):
                    g = dy[n, h, v, k]
                    for s in range(max(0, 1 - v), min(S, W + 1 - v)):
                        for c in range(C):
                            dw[k, r, s, c] += g * x[n, h + r - 1, v + s - 1, c]


@njit(parallel=True, fastmath=SUM_MATH)
def conv2d_backward_bias_kernel(dy, db):
    # dy (N,H,W,K)  db (K,)
    N, H, W, K = dy.shape
    for k in prange(K):
        total = np.float32(0)
        for n in range(N):
            for h in range(H):
                for v in range(W):
                    total += dy[n, h, v, k]
        db[k] = total


class NaiveCpu(CpuBackend):
    """V1's four convolution operations on the CPU."""

    layout = "NHWC"

    def conv2d_forward(self, x, w, b, y, relu):
        conv2d_forward_kernel(x, w, b, y, relu)

    def conv2d_backward_data(self, dy, w, dx):
        conv2d_backward_data_kernel(dy, w, dx)

    def conv2d_backward_filter(self, x, dy, dw):
        conv2d_backward_filter_kernel(x, dy, dw)

    def conv2d_backward_bias(self, dy, db):
        conv2d_backward_bias_kernel(dy, db)


make_backend = NaiveCpu
