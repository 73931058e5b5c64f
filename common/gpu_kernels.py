"""Element-wise operations, the loss, sums of shares and SGD for the GPU, shared by every version.

Pictures are (outer, H, W, inner): NHWC is already (N, H, W, C), NCHW is viewed as (N*C, H, W, 1). All kernels take flat
arrays. The inner axis varies fastest over the threads, so that neighbouring lanes access neighbouring addresses in both
layouts. A row of pictures is a row whatever its picture, so the kernels need neither N nor H; W and the inner length
are constants of a kernel, so that its divisions are shifts. Comparisons keep NaN. Every sum across threads has a fixed
order and uses no atomics.
"""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import BLOCK_BITS, THREAD_BITS, gpu_kernel, unsigned


@cache
def gather_kernel_for(*, layout: str, channels: int, positions: int):
    """Copy a batch of pictures, scaled from bytes to [0, 1]: a thread per value."""
    NCHW, C, P = layout == "NCHW", channels, positions

    @gpu_kernel(registers=32, variant=layout)
    def gather_kernel(images, order, start, x):
        # images (samples,C,P) uint8, flat  order (samples,) int32  x (N,C,P) or (N,P,C), flat
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < x.size:
            c = i // P % C if NCHW else i % C
            p = i % P if NCHW else i // C % P
            picture = np.int64(order[unsigned(start + i // (C * P))])
            x[unsigned(i)] = np.float32(images[unsigned((picture * C + c) * P + p)]) / np.float32(255)

    return gather_kernel


@cache
def maxpool_forward_kernel_for(*, width: int, inner: int):
    """Maximum of each 2x2 window: a thread per window."""
    W, I = width, inner  # noqa: E741

    @gpu_kernel(registers=32)
    def maxpool_forward_kernel(y, out):
        # y (rows*2,W*2,I)  out (rows,W,I), both flat
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < out.size:
            corner = i // (W * I) * (4 * W * I) + i // I % W * (2 * I) + i % I
            best = y[unsigned(corner)]
            for tap in range(1, 4):
                value = y[unsigned(corner + tap // 2 * (2 * W * I) + tap % 2 * I)]
                # A NaN differs from itself. Once it is the best, no value compares larger.
                if value > best or value != value:
                    best = value
            out[unsigned(i)] = best

    return maxpool_forward_kernel


@cache
def relu_maxpool_backward_kernel_for(*, width: int, inner: int):
    """Give the gradient of a window to its first maximum, if that is positive: a thread per window, so dy may be y."""
    W, I = width, inner  # noqa: E741

    @gpu_kernel(registers=40)
    def relu_maxpool_backward_kernel(y, dout, dy):
        # y, dy (rows*2,W*2,I)  dout (rows,W,I), all flat
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < dout.size:
            corner = i // (W * I) * (4 * W * I) + i // I % W * (2 * I) + i % I
            best = y[unsigned(corner)]
            winner = 0
            for tap in range(1, 4):
                value = y[unsigned(corner + tap // 2 * (2 * W * I) + tap % 2 * I)]
                # Strictly larger: of equal values the first one gets the gradient.
                if value > best:
                    best = value
                    winner = tap
            g = dout[unsigned(i)]
            for tap in range(4):
                passes = tap == winner and best > np.float32(0)
                dy[unsigned(corner + tap // 2 * (2 * W * I) + tap % 2 * I)] = g if passes else np.float32(0)

    return relu_maxpool_backward_kernel


@cache
def upsample_forward_kernel_for(*, width: int, inner: int):
    """Write each value into a 2x2 block: a thread per column of the block, so that stores are coalesced."""
    W, I = width, inner  # noqa: E741

    @gpu_kernel(registers=32)
    def upsample_forward_kernel(y, out):
        # y (rows,W,I)  out (rows*2,W*2,I), both flat
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < 2 * y.size:
            value = y[unsigned(i // (2 * I) * I + i % I)]
            above = i // (2 * W * I) * (4 * W * I) + i % (2 * W * I)
            out[unsigned(above)] = value
            out[unsigned(above + 2 * W * I)] = value

    return upsample_forward_kernel


@cache
def relu_upsample_backward_kernel_for(*, width: int, inner: int):
    """Add the gradients of a 2x2 block where y is positive: a thread per value of y, so dy may be y."""
    W, I = width, inner  # noqa: E741

    @gpu_kernel(registers=32)
    def relu_upsample_backward_kernel(y, dout, dy):
        # y, dy (rows,W,I)  dout (rows*2,W*2,I), all flat
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < y.size:
            corner = i // (W * I) * (4 * W * I) + i // I % W * (2 * I) + i % I
            above = dout[unsigned(corner)] + dout[unsigned(corner + I)]
            below = dout[unsigned(corner + 2 * W * I)] + dout[unsigned(corner + 2 * W * I + I)]
            dy[unsigned(i)] = above + below if y[unsigned(i)] > np.float32(0) else np.float32(0)

    return relu_upsample_backward_kernel


@cache
def block_sum_for(threads: int):
    """A device function that adds the values of a block's ``threads`` (a power of two) by repeated halving."""
    LEVELS = threads.bit_length() - 1

    @cuda.jit(device=True, inline="always")
    def block_sum(sums, t, value):
        # sums (threads,) shared: the sum ends up in sums[0], for thread 0 to read
        sums[unsigned(t)] = value
        for level in range(LEVELS):
            half = threads >> (level + 1)
            # The sums of the upper half must be complete.
            cuda.syncthreads()
            if t < half:
                sums[unsigned(t)] += sums[unsigned(t + half)]

    return block_sum


@cache
def mse_kernels_for(*, threads: int):
    """The loss in two passes: a sum for each block of ``threads``, which also writes the gradient; then their sum."""
    THREADS = threads
    block_sum = block_sum_for(threads)

    @gpu_kernel(registers=40)
    def mse_partial_kernel(prediction, target, gradient, partials, scale):
        # prediction, target, gradient (n,)  partials (blocks of the grid,)
        sums = cuda.shared.array(THREADS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        block = cuda.blockIdx.x & BLOCK_BITS
        total = np.float32(0)
        for j in range(block * THREADS + t, prediction.size, THREADS * (cuda.gridDim.x & BLOCK_BITS)):
            difference = prediction[unsigned(j)] - target[unsigned(j)]
            total += difference * difference
            gradient[unsigned(j)] = scale * difference
        block_sum(sums, t, total)
        if t == 0:
            partials[unsigned(block)] = sums[0]

    @gpu_kernel(registers=32)
    def mse_final_kernel(partials, count, scale, losses, step):
        # partials (>= count,)  losses (steps,): one block
        sums = cuda.shared.array(THREADS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        total = np.float32(0)
        for j in range(t, count, THREADS):
            total += partials[unsigned(j)]
        block_sum(sums, t, total)
        if t == 0:
            losses[unsigned(step)] = sums[0] * scale

    return mse_partial_kernel, mse_final_kernel


@cache
def sum_shares_kernel_for(*, lanes: int, rows: int):
    """The second pass of a sum: ``rows`` x ``lanes`` threads, each row for every ``rows``-th share of the values.

    Many shares of few values would keep few threads busy for long; the rows work side by side, and the first one adds
    what they have found.
    """
    LANES, ROWS = lanes, rows
    THREADS = LANES * ROWS

    @gpu_kernel(registers=40, variant=f"{rows} a value")
    def sum_shares_kernel(partials, offset, shares, out, size, accumulate):
        # partials from ``offset`` on (shares,size)  out (size,), both flat; added to what is there if ``accumulate``
        sums = cuda.shared.array(THREADS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        row = t // LANES
        i = (cuda.blockIdx.x & BLOCK_BITS) * LANES + t % LANES
        total = np.float32(0)
        # The grid is rounded up to whole blocks.
        if i < size:
            for share in range(row, shares, ROWS):
                total += partials[unsigned(offset + share * size + i)]
        sums[unsigned(t)] = total
        # The first row reads what the others have stored.
        cuda.syncthreads()
        if row == 0 and i < size:
            for other in range(1, ROWS):
                total += sums[unsigned(other * LANES + t)]
            out[unsigned(i)] = total + out[unsigned(i)] if accumulate else total

    return sum_shares_kernel


@gpu_kernel(registers=32)
def sgd_kernel(parameters, gradients, learning_rate):
    # parameters, gradients (n,)
    i = cuda.grid(1) & BLOCK_BITS
    # The grid is rounded up to whole blocks.
    if i < parameters.size:
        parameters[unsigned(i)] -= learning_rate * gradients[unsigned(i)]
