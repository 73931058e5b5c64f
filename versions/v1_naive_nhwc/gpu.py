"""V1 on the GPU: one thread per output value, all operands read from global memory."""

from math import prod

import numpy as np
from numba import cuda

from common.gpu import GpuBackend
from common.gpu_jit import gpu_kernel


@gpu_kernel(registers=64)
def conv2d_forward_kernel(x, w, b, y, relu):
    # x (N,H,W,C)  w (K,R,S,C)  b (K,)  y (N,H,W,K)
    N, H, W, C = x.shape
    K, R, S, _ = w.shape
    i = cuda.grid(1)
    # The grid is rounded up to whole blocks.
    if i < N * H * W * K:
        k = i % K
        v = i // K % W
        h = i // (K * W) % H
        n = i // (K * W * H)
        total = b[k]
        for r in range(R):
            for s in range(S):
                row = h + r - 1
                column = v + s - 1
                # Outside the picture is padding: zero.
                if 0 <= row < H and 0 <= column < W:
                    for c in range(C):
                        total += x[n, row, column, c] * w[k, r, s, c]
        # A NaN fails this comparison and stays a NaN.
        if relu and total <= np.float32(0):
            total = np.float32(0)
        y[n, h, v, k] = total


@gpu_kernel(registers=64)
def conv2d_backward_data_kernel(dy, w, dx):
    # dy (N,H,W,K)  w (K,R,S,C)  dx (N,H,W,C)
    N, H, W, K = dy.shape
    _, R, S, C = w.shape
    i = cuda.grid(1)
    # The grid is rounded up to whole blocks.
    if i < N * H * W * C:
        c = i % C
        v = i // C % W
        h = i // (C * W) % H
        n = i // (C * W * H)
        total = np.float32(0)
        for r in range(R):
            for s in range(S):
                row = h + 1 - r
                column = v + 1 - s
                # Only outputs inside the picture read this input.
                if 0 <= row < H and 0 <= column < W:
                    for k in range(K):
                        total += dy[n, row, column, k] * w[k, r, s, c]
        dx[n, h, v, c] = total


@gpu_kernel(registers=112)
def conv2d_backward_filter_kernel(x, dy, dw):
    # x (N,H,W,C)  dy (N,H,W,K)  dw (K,R,S,C)
    N, H, W, C = x.shape
    K, R, S, _ = dw.shape
    i = cuda.grid(1)
    # The grid is rounded up to whole blocks.
    if i < K * R * S * C:
        c = i % C
        s = i // C % S
        r = i // (C * S) % R
        k = i // (C * S * R)
        total = np.float32(0)
        for n in range(N):
            # One sum per picture first: adding short sums has a smaller rounding error than one long sum.
            picture = np.float32(0)
            for h in range(max(0, 1 - r), min(H, H + 1 - r)):
                for v in range(max(0, 1 - s), min(W, W + 1 - s)):
                    picture += dy[n, h, v, k] * x[n, h + r - 1, v + s - 1, c]
            total += picture
        dw[k, r, s, c] = total


@gpu_kernel(registers=56)
def conv2d_backward_bias_kernel(dy, db):
    # dy (N,H,W,K)  db (K,)
    N, H, W, K = dy.shape
    k = cuda.grid(1)
    # The grid is rounded up to whole blocks.
    if k < K:
        total = np.float32(0)
        for n in range(N):
            picture = np.float32(0)
            for h in range(H):
                for v in range(W):
                    picture += dy[n, h, v, k]
            total += picture
        db[k] = total


class NaiveGpu(GpuBackend):
    """V1's four convolution operations on the GPU."""

    layout = "NHWC"

    def conv2d_forward(self, x, w, b, y, relu):
        self.launch(conv2d_forward_kernel, prod(y.shape), x, w, b, y, relu)

    def conv2d_backward_data(self, dy, w, dx):
        self.launch(conv2d_backward_data_kernel, prod(dx.shape), dy, w, dx)

    def conv2d_backward_filter(self, x, dy, dw):
        self.launch(conv2d_backward_filter_kernel, prod(dw.shape), x, dy, dw)

    def conv2d_backward_bias(self, dy, db):
        self.launch(conv2d_backward_bias_kernel, prod(db.shape), dy, db)


make_backend = NaiveGpu
