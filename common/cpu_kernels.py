"""Element-wise operations, the loss and SGD for the CPU, shared by every version: Numba loops, parallel over pictures.

Numba's static schedule splits a batch over the threads; one thread computes each picture. Sums over pictures are added
afterwards in the order of the pictures, so results do not depend on timing. Comparisons keep NaN: the checks fill
buffers with NaN before a call, and a value that was never written must not become zero.
"""

import numpy as np
from numba import njit, prange

# Sums may be reordered to run in vector registers; NaN and infinity keep their meaning.
SUM_MATH = {"reassoc", "contract", "nsz"}


@njit(parallel=True)
def gather_nchw(images, order, start, x):
    # images (samples,C,H,W) uint8  order (samples,) int32  x (N,C,H,W)
    N, C, H, W = x.shape
    scale = np.float32(255)
    for n in prange(N):
        source = images[order[start + n]]
        for c in range(C):
            for h in range(H):
                for w in range(W):
                    x[n, c, h, w] = np.float32(source[c, h, w]) / scale


@njit(parallel=True)
def gather_nhwc(images, order, start, x):
    # images (samples,C,H,W) uint8  order (samples,) int32  x (N,H,W,C)
    N, H, W, C = x.shape
    scale = np.float32(255)
    for n in prange(N):
        source = images[order[start + n]]
        for h in range(H):
            for w in range(W):
                for c in range(C):
                    x[n, h, w, c] = np.float32(source[c, h, w]) / scale


@njit
def _larger(a, b):
    """The larger of two values; NaN if either is NaN."""
    return a if a >= b else (a if a != a else b)


@njit(parallel=True)
def maxpool_forward_nchw(y, out):
    # y (N,K,H,W)  out (N,K,H/2,W/2)
    N, K, OH, OW = out.shape
    for n in prange(N):
        for k in range(K):
            for h in range(OH):
                above = y[n, k, 2 * h]
                below = y[n, k, 2 * h + 1]
                for w in range(OW):
                    out[n, k, h, w] = _larger(
                        _larger(above[2 * w], above[2 * w + 1]), _larger(below[2 * w], below[2 * w + 1])
                    )


@njit(parallel=True)
def maxpool_forward_nhwc(y, out):
    # y (N,H,W,K)  out (N,H/2,W/2,K)
    N, OH, OW, K = out.shape
    for n in prange(N):
        for h in range(OH):
            for w in range(OW):
                a = y[n, 2 * h, 2 * w]
                b = y[n, 2 * h, 2 * w + 1]
                c = y[n, 2 * h + 1, 2 * w]
                d = y[n, 2 * h + 1, 2 * w + 1]
                for k in range(K):
                    out[n, h, w, k] = _larger(_larger(a[k], b[k]), _larger(c[k], d[k]))


@njit
def _route(a, b, c, d, g):
    """The gradient g at the first maximum of (a, b, c, d) if that is positive, zero elsewhere."""
    zero = np.float32(0)
    m = max(max(a, b), max(c, d))
    g = g if m > zero else zero
    to_a = a == m
    to_b = (not to_a) and b == m
    to_c = (not to_a) and (not to_b) and c == m
    to_d = (not to_a) and (not to_b) and (not to_c)
    return (
        g if to_a else zero,
        g if to_b else zero,
        g if to_c else zero,
        g if to_d else zero,
    )


@njit(parallel=True)
def relu_maxpool_backward_nchw(y, dout, dy):
    # y, dy (N,K,H,W)  dout (N,K,H/2,W/2)
    N, K, OH, OW = dout.shape
    for n in prange(N):
        for k in range(K):
            for h in range(OH):
                above, below = y[n, k, 2 * h], y[n, k, 2 * h + 1]
                d_above, d_below = dy[n, k, 2 * h], dy[n, k, 2 * h + 1]
                for w in range(OW):
                    da, db, dc, dd = _route(
                        above[2 * w], above[2 * w + 1], below[2 * w], below[2 * w + 1], dout[n, k, h, w]
                    )
                    d_above[2 * w] = da
                    d_above[2 * w + 1] = db
                    d_below[2 * w] = dc
                    d_below[2 * w + 1] = dd


@njit(parallel=True)
def relu_maxpool_backward_nhwc(y, dout, dy):
    # y, dy (N,H,W,K)  dout (N,H/2,W/2,K)
    N, OH, OW, K = dout.shape
    for n in prange(N):
        for h in range(OH):
            for w in range(OW):
                for k in range(K):
                    da, db, dc, dd = _route(
                        y[n, 2 * h, 2 * w, k],
                        y[n, 2 * h, 2 * w + 1, k],
                        y[n, 2 * h + 1, 2 * w, k],
                        y[n, 2 * h + 1, 2 * w + 1, k],
                        dout[n, h, w, k],
                    )
                    dy[n, 2 * h, 2 * w, k] = da
                    dy[n, 2 * h, 2 * w + 1, k] = db
                    dy[n, 2 * h + 1, 2 * w, k] = dc
                    dy[n, 2 * h + 1, 2 * w + 1, k] = dd


@njit(parallel=True)
def upsample_forward_nchw(y, out):
    # y (N,K,H,W)  out (N,K,2H,2W)
    N, K, H, W = y.shape
    for n in prange(N):
        for k in range(K):
            for h in range(H):
                above, below = out[n, k, 2 * h], out[n, k, 2 * h + 1]
                for w in range(W):
                    value = y[n, k, h, w]
                    above[2 * w] = value
                    above[2 * w + 1] = value
                    below[2 * w] = value
                    below[2 * w + 1] = value


@njit(parallel=True)
def upsample_forward_nhwc(y, out):
    # y (N,H,W,K)  out (N,2H,2W,K)
    N, H, W, K = y.shape
    for n in prange(N):
        for h in range(2 * H):
            for w in range(2 * W):
                for k in range(K):
                    out[n, h, w, k] = y[n, h // 2, w // 2, k]


@njit(parallel=True)
def relu_upsample_backward_nchw(y, dout, dy):
    # y, dy (N,K,H,W)  dout (N,K,2H,2W)
    N, K, H, W = y.shape
    zero = np.float32(0)
    for n in prange(N):
        for k in range(K):
            for h in range(H):
                above, below = dout[n, k, 2 * h], dout[n, k, 2 * h + 1]
                for w in range(W):
                    total = (above[2 * w] + above[2 * w + 1]) + (below[2 * w] + below[2 * w + 1])
                    dy[n, k, h, w] = total if y[n, k, h, w] > zero else zero


@njit(parallel=True)
def relu_upsample_backward_nhwc(y, dout, dy):
    # y, dy (N,H,W,K)  dout (N,2H,2W,K)
    N, H, W, K = y.shape
    zero = np.float32(0)
    for n in prange(N):
        for h in range(H):
            for w in range(W):
                for k in range(K):
                    total = (dout[n, 2 * h, 2 * w, k] + dout[n, 2 * h, 2 * w + 1, k]) + (
                        dout[n, 2 * h + 1, 2 * w, k] + dout[n, 2 * h + 1, 2 * w + 1, k]
                    )
                    dy[n, h, w, k] = total if y[n, h, w, k] > zero else zero


@njit(parallel=True, fastmath=SUM_MATH)
def mse_loss(prediction, target, gradient, sums, losses, step):
    # prediction, target, gradient (N,values)  sums (batch,)  losses (steps,)
    N, values = prediction.shape
    scale = np.float32(2) / np.float32(N * values)
    for n in prange(N):
        total = np.float32(0)
        for i in range(values):
            difference = prediction[n, i] - target[n, i]
            total += difference * difference
            gradient[n, i] = scale * difference
        sums[n] = total
    total = np.float32(0)
    for n in range(N):
        total += sums[n]
    losses[step] = total / np.float32(N * values)


@njit
def sgd(parameters, gradients, learning_rate):
    for i in range(parameters.size):
        parameters[i] -= learning_rate * gradients[i]


@njit
def flip_filters(w, flipped):
    # w (K,C,R,S)  flipped, of the same size, as (C,K,R,S): K and C exchanged, each window rotated by 180 degrees
    K, C, R, S = w.shape
    out = flipped.reshape(C, K, R, S)
    for k in range(K):
        for c in range(C):
            for r in range(R):
                for s in range(S):
                    out[c, k, r, s] = w[k, c, R - 1 - r, S - 1 - s]


@njit
def add_partials(partials, out):
    # partials (threads, out.size or more)  out (size,): always added in the order of the threads
    for i in range(out.size):
        total = np.float32(0)
        for t in range(partials.shape[0]):
            total += partials[t, i]
        out[i] = total
