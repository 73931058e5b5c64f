"""V3's gradients of the filters and of the biases on the GPU; a second kernel adds the partial sums that they store."""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import BLOCK_BITS, THREAD_BITS, gpu_kernel, unsigned
from common.gpu_kernels import block_sum_for
from versions.v3_direct_nchw.plan import Strip


@cache
def filter_kernel_for(*, strip: Strip, warp: int, height: int, width: int, channels: int, filters: int):
    """Backward filter: a thread walks down a column of dy and of x and sums FILTERS x CHANNELS x 9 products.

    ::

        x, CHANNELS planes     dy, FILTERS planes       a thread: every WARP-th column of its share of the pictures
        w w w   kept                                    a warp:   WARP neighbouring columns
        w w w   kept           d   ROWS new rows        a block:  its warps take neighbouring groups of CHANNELS, so
        w w w   ROWS new       d                                  that they read the same dy; lanes are added at
        w w w   rows                                              the end in shared memory
    """
    H, W, C, K, WARP = height, width, channels, filters, warp
    ROWS, FILTERS, CHANNELS, THREADS = strip.rows, strip.filters, strip.channels, strip.threads
    BLOCK_CHANNELS = strip.block_channels(WARP)
    PLANE, COLUMN = H * W, (ROWS + 2) * 3  # of a channel, in memory and in the window
    SUMS = FILTERS * 9  # of a thread and channel
    WINDOW, GRADIENTS, TOTALS = CHANNELS * COLUMN, ROWS * FILTERS, CHANNELS * SUMS
    PITCH = SUMS | 1  # odd, so that the lanes write to different banks
    SHARED_FLOATS, BLOCK_SUMS = THREADS * PITCH, THREADS // WARP * SUMS
    TURNS = -(-BLOCK_SUMS // THREADS)
    # Where sizes divide, these are true and the compiler drops the guard.
    ALL_CHANNELS, ALL_FILTERS, ALL_ROWS = C % BLOCK_CHANNELS == 0, K % FILTERS == 0, H % ROWS == 0

    @cuda.jit(device=True, inline="always")
    def load_row(x, window, first_channel, corner, v, h, i, present):
        # Row h of the planes from ``corner`` on, three columns around v of each channel, into row i of the window.
        # ``present``: the row is known to be inside the picture.
        for s in range(3):
            near = v + s - 1
            # Outside the picture is padding, past the last channel nothing: zero.
            inside = (present or h < H) and 0 <= near < W
            place = corner + h * W + near
            for c in range(CHANNELS):
                value = np.float32(0)
                if inside and (ALL_CHANNELS or first_channel + c < C):
                    value = x[unsigned(place + c * PLANE)]
                window[c * COLUMN + i * 3 + s] = value

    @cuda.jit(device=True, inline="always")
    def add_lanes(sums, totals, partials, t, block_channel, first_filter, share, c):
        # Channel c of every thread: store the sums of all lanes, add them in a fixed order.
        # The sums of the channel before must have been read.
        cuda.syncthreads()
        for i in range(SUMS):
            sums[unsigned(t * PITCH + i)] = totals[c * SUMS + i]
        # The sums of all lanes must be stored before they are added.
        cuda.syncthreads()
        for turn in range(TURNS):
            i = turn * THREADS + t
            own = i % SUMS
            k = first_filter + own % FILTERS
            channel = block_channel + i // SUMS * CHANNELS + c
            # The last turn can reach past the block's sums, the last group past the channels or the filters.
            if i < BLOCK_SUMS and (ALL_CHANNELS or channel < C) and (ALL_FILTERS or k < K):
                total = np.float32(0)
                for other in range(WARP):
                    total += sums[unsigned((i // SUMS * WARP + other) * PITCH + own)]
                partials[unsigned(((share * K + k) * C + channel) * 9 + own // FILTERS)] = total

    @cuda.jit(device=True, inline="always")
    def multiply(totals, window, gradients, c, p):
        # The products of row p of dy with the nine values of channel c around it.
        for tap in range(9):
            near_value = window[c * COLUMN + p * 3 + tap]
            for j in range(FILTERS):
                totals[(c * 9 + tap) * FILTERS + j] += near_value * gradients[p * FILTERS + j]

    @gpu_kernel(registers=strip.registers, variant=strip.name, ffma=strip.ffma)
    def conv2d_backward_filter_kernel(x, dy, partials, N):
        # x (N,C,H,W)  dy (N,K,H,W)  partials (shares,K,C,R,S), all flat
        # grid (groups of C, groups of K, shares of the columns)  block (lanes: columns, warps: channels)
        sums = cuda.shared.array(SHARED_FLOATS, np.float32)  # (thread, tap, filter)
        totals = cuda.local.array(TOTALS, np.float32)
        window = cuda.local.array(WINDOW, np.float32)
        gradients = cuda.local.array(GRADIENTS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        lane = t % WARP
        block_channel = (cuda.blockIdx.x & BLOCK_BITS) * BLOCK_CHANNELS
        first_channel = block_channel + t // WARP * CHANNELS
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        share = cuda.blockIdx.z & BLOCK_BITS
        shares = cuda.gridDim.z & BLOCK_BITS
        columns = N * W
        for i in range(TOTALS):
            totals[i] = np.float32(0)
        for index in range(share * columns // shares + lane, (share + 1) * columns // shares, WARP):
            v = (index & BLOCK_BITS) % W
            n = (index & BLOCK_BITS) // W
            # The first rows to be kept: the padding above the picture, and its first row.
            for c in range(CHANNELS):
                for s in range(3):
                    window[c * COLUMN + ROWS * 3 + s] = np.float32(0)
            corner = (n * C + first_channel) * PLANE
            load_row(x, window, first_channel, corner, v, 0, ROWS + 1, True)
            for top in range(0, H, ROWS):
                # The last two rows of the window before are the first two of this one.
                for i in range(6):
                    for c in range(CHANNELS):
                        window[c * COLUMN + i] = window[c * COLUMN + ROWS * 3 + i]
                for p in range(ROWS):
                    for j in range(FILTERS):
                        value = np.float32(0)
                        # Below the picture or past the last filter: zero.
                        if (ALL_ROWS or top + p < H) and (ALL_FILTERS or first_filter + j < K):
                            value = dy[unsigned((n * K + first_filter + j) * PLANE + (top + p) * W + v)]
                        gradients[p * FILTERS + j] = value
                load_row(x, window, first_channel, corner, v, top + 1, 2, ALL_ROWS and ROWS > 1)
                if ROWS > 1:
                    load_row(x, window, first_channel, corner, v, top + 2, 3, False)
                # Written out: a newer compiler leaves a loop of so many products as it is, and its arrays in memory.
                multiply(totals, window, gradients, 0, 0)
                if CHANNELS > 1:
                    multiply(totals, window, gradients, 1, 0)
                if ROWS > 1:
                    multiply(totals, window, gradients, 0, 1)
                if CHANNELS > 1 and ROWS > 1:
                    multiply(totals, window, gradients, 1, 1)
        add_lanes(sums, totals, partials, t, block_channel, first_filter, share, 0)
        if CHANNELS > 1:
            add_lanes(sums, totals, partials, t, block_channel, first_filter, share, 1)

    return conv2d_backward_filter_kernel


@cache
def bias_kernel_for(*, threads: int, positions: int, filters: int):
    """Backward bias: a block sums one filter's planes, lanes on neighbouring pixels, then adds by repeated halving."""
    THREADS, P, K = threads, positions, filters
    TURNS = -(-P // THREADS)
    block_sum = block_sum_for(threads)

    @gpu_kernel(registers=64)
    def conv2d_backward_bias_kernel(dy, partials, N):
        # dy (N,K,P)  partials (shares,K), both flat  grid (K, shares of the pictures)
        sums = cuda.shared.array(THREADS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        k = cuda.blockIdx.x & BLOCK_BITS
        share = cuda.blockIdx.y & BLOCK_BITS
        shares = cuda.gridDim.y & BLOCK_BITS
        total = np.float32(0)
        for n in range(share * N // shares, (share + 1) * N // shares):
            for turn in range(TURNS):
                p = turn * THREADS + t
                # The last turn can reach past the plane.
                if p < P:
                    total += dy[unsigned((n * K + k) * P + p)]
        block_sum(sums, t, total)
        if t == 0:
            partials[unsigned(share * K + k)] = sums[0]

    return conv2d_backward_bias_kernel
