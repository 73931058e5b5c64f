"""Element-wise operations, the loss and SGD for the GPU, shared by every version: one thread per value.

Pictures are (outer, H, W, inner): NHWC is already (N, H, W, C), NCHW is viewed as (N*C, H, W, 1). The inner axis varies
fastest over the threads, so that neighbouring lanes access neighbouring addresses in both layouts. Comparisons keep
NaN. Every sum across threads has a fixed order and uses no atomics.
"""

import numpy as np
from numba import cuda

from common.gpu_jit import BLOCK_BITS, gpu_kernel, unsigned

REDUCTION_THREADS = 64  # threads of the block that finishes a sum; also the length of its shared array


@gpu_kernel(registers=32)
def gather_nchw_kernel(images, order, start, x):
    # images (samples,C,H,W) uint8  order (samples,) int32  x (N,C,H,W)
    N, C, H, W = x.shape
    i = cuda.grid(1)
    if i < N * C * H * W:
        w = i % W
        h = i // W % H
        c = i // (W * H) % C
        n = i // (W * H * C)
        x[n, c, h, w] = np.float32(images[order[start + n], c, h, w]) / np.float32(255)


@gpu_kernel(registers=32)
def gather_nhwc_kernel(images, order, start, x):
    # images (samples,C,H,W) uint8  order (samples,) int32  x (N,H,W,C)
    N, H, W, C = x.shape
    i = cuda.grid(1)
    if i < N * H * W * C:
        c = i % C
        w = i // C % W
        h = i // (C * W) % H
        n = i // (C * W * H)
        x[n, h, w, c] = np.float32(images[order[start + n], c, h, w]) / np.float32(255)


@gpu_kernel(registers=40)
def maxpool_forward_kernel(y, out):
    # y (outer,2H,2W,inner)  out (outer,H,W,inner)
    O, H, W, I = out.shape  # noqa: E741
    i = cuda.grid(1)
    if i < O * H * W * I:
        c = i % I
        w = i // I % W
        h = i // (I * W) % H
        o = i // (I * W * H)
        best = y[o, 2 * h, 2 * w, c]
        for tap in range(1, 4):
            value = y[o, 2 * h + tap // 2, 2 * w + tap % 2, c]
            # A NaN differs from itself. Once it is the best, no value compares larger.
            if value > best or value != value:
                best = value
        out[o, h, w, c] = best


@gpu_kernel(registers=48)
def relu_maxpool_backward_kernel(y, dout, dy):
    # y, dy (outer,2H,2W,inner)  dout (outer,H,W,inner): a thread owns a window, so dy may be y
    O, H, W, I = dout.shape  # noqa: E741
    i = cuda.grid(1)
    if i < O * H * W * I:
        c = i % I
        w = i // I % W
        h = i // (I * W) % H
        o = i // (I * W * H)
        best = y[o, 2 * h, 2 * w, c]
        winner = 0
        for tap in range(1, 4):
            value = y[o, 2 * h + tap // 2, 2 * w + tap % 2, c]
            # Strictly larger: of equal values the first one gets the gradient.
            if value > best:
                best = value
                winner = tap
        g = dout[o, h, w, c]
        for tap in range(4):
            passes = tap == winner and best > np.float32(0)
            dy[o, 2 * h + tap // 2, 2 * w + tap % 2, c] = g if passes else np.float32(0)


@gpu_kernel(registers=32)
def upsample_forward_kernel(y, out):
    # y (outer,H,W,inner)  out (outer,2H,2W,inner): one thread per value of out, for coalesced stores
    O, H, W, I = out.shape  # noqa: E741
    i = cuda.grid(1)
    if i < O * H * W * I:
        c = i % I
        w = i // I % W
        h = i // (I * W) % H
        o = i // (I * W * H)
        out[o, h, w, c] = y[o, h // 2, w // 2, c]


@gpu_kernel(registers=40)
def relu_upsample_backward_kernel(y, dout, dy):
    # y, dy (outer,H,W,inner)  dout (outer,2H,2W,inner): a thread owns a value, so dy may be y
    O, H, W, I = y.shape  # noqa: E741
    i = cuda.grid(1)
    if i < O * H * W * I:
        c = i % I
        w = i // I % W
        h = i // (I * W) % H
        o = i // (I * W * H)
        above = dout[o, 2 * h, 2 * w, c] + dout[o, 2 * h, 2 * w + 1, c]
        below = dout[o, 2 * h + 1, 2 * w, c] + dout[o, 2 * h + 1, 2 * w + 1, c]
        dy[o, h, w, c] = above + below if y[o, h, w, c] > np.float32(0) else np.float32(0)


@gpu_kernel(registers=40)
def mse_partial_kernel(prediction, target, gradient, partials, scale):
    # prediction, target, gradient (n,)  partials (threads of the grid,)
    i = cuda.grid(1)
    stride = cuda.gridsize(1)
    total = np.float32(0)
    for j in range(i, prediction.size, stride):
        difference = prediction[j] - target[j]
        total += difference * difference
        gradient[j] = scale * difference
    partials[i] = total


@gpu_kernel(registers=32)
def mse_final_kernel(partials, count, scale, losses, step):
    # partials (>= count,)  losses (steps,): one block of REDUCTION_THREADS threads
    sums = cuda.shared.array(REDUCTION_THREADS, np.float32)
    t = cuda.threadIdx.x
    total = np.float32(0)
    for j in range(t, count, REDUCTION_THREADS):
        total += partials[j]
    sums[t] = total
    # Thread 0 reads what the others wrote.
    cuda.syncthreads()
    if t == 0:
        total = np.float32(0)
        for j in range(REDUCTION_THREADS):
            total += sums[j]
        losses[step] = total * scale


@gpu_kernel(registers=32)
def sum_shares_kernel(partials, shares, out):
    # partials (shares,size) flat  out (size,) flat: the second pass of a sum, always in the same order
    i = cuda.grid(1) & BLOCK_BITS
    size = out.size
    # The grid is rounded up to whole blocks.
    if i < size:
        total = np.float32(0)
        for share in range(shares):
            total += partials[unsigned(share * size + i)]
        out[unsigned(i)] = total


@gpu_kernel(registers=32)
def sgd_kernel(parameters, gradients, learning_rate):
    # parameters, gradients (n,)
    i = cuda.grid(1)
    if i < parameters.size:
        parameters[i] -= learning_rate * gradients[i]
