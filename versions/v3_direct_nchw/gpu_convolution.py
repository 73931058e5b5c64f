"""V3's convolution kernel on the GPU: forward and, with flipped filters, backward data."""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import ALIGNMENT, BLOCK_BITS, INDEX_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v3_direct_nchw.plan import Strip


@cache
def conv2d_kernel_for(*, strip: Strip, height: int, width: int, channels: int, filters: int, flipped: bool):
    """Forward, or backward data if ``flipped``: a thread computes a strip of pixels for several filters.

    ::

        plane of H x W     lane  0   1   2  ...      a thread: ROWS x 1 pixels x FILTERS filters, sums in registers
        ROWS rows:             | s | s | s |         a warp:   neighbouring columns, so that its loads are coalesced
                               | s | s | s |         a block:  THREADS strips, which share the weights of FILTERS
                               | s | s | s |                   filters and CHUNK channels in shared memory

    Backward data is a convolution from dy to dx with flipped filters: each window is rotated by 180 degrees, and C and
    K are exchanged. So ``channels`` are those that the kernel reads, and ``filters`` those that it writes.
    """
    H, W, C, K = height, width, channels, filters
    ROWS, FILTERS, CHUNK, THREADS = strip.rows, strip.filters, strip.chunk, strip.threads
    HALO_ROWS, TOTALS, DOWN = ROWS + 2, ROWS * FILTERS, -(-H // ROWS)
    # Weights are staged as a matrix: a row for each (channel, tap), a column for each filter. A group of lanes loads
    # LINE neighbouring rows of a filter. Rows lie BANK floats apart, so that a warp stores to 32 different banks.
    BANK, LINE, LANES = strip.bank, strip.line, strip.filter_lanes
    WEIGHT_ROWS, ROWS_AT_ONCE = CHUNK * 9, THREADS // LANES
    LOADS, WEIGHT_FLOATS = -(-WEIGHT_ROWS // ROWS_AT_ONCE), CHUNK * 9 * BANK
    if C * 9 > INDEX_BITS:
        raise ValueError(f"{C} channels are too many for this kernel: at most {INDEX_BITS // 9}")
    # Where sizes divide, these are true and the compiler drops the guard.
    ALL_CHANNELS, ALL_FILTERS = C % CHUNK == 0, K % FILTERS == 0
    ALL_STAGED = WEIGHT_ROWS % ROWS_AT_ONCE == 0 and LANES == FILTERS

    @gpu_kernel(registers=strip.registers, variant=strip.name, ffma=strip.ffma)
    def conv2d_kernel(x, w, b, y, N, relu):
        # x (N,C,H,W)  w (K,C,R,S), flipped (C,K,R,S)  b (K,), not read if flipped  y (N,K,H,W), all flat
        # grid (blocks of strips; groups of K)  block (strips: columns fastest, then groups of rows, then pictures)
        weights = cuda.shared.array(WEIGHT_FLOATS, np.float32, ALIGNMENT)
        staged = cuda.local.array(LOADS, np.float32)
        totals = cuda.local.array(TOTALS, np.float32)
        column = cuda.local.array(HALO_ROWS, np.float32)
        taps = cuda.local.array(FILTERS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        strip_index = (cuda.blockIdx.x & BLOCK_BITS) * THREADS + t
        v = strip_index % W
        top = strip_index // W % DOWN * ROWS
        n = strip_index // (W * DOWN)
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        filter_lane = t // LINE % LANES
        row_lane = t % LINE + t // (LINE * LANES) * LINE
        k = first_filter + filter_lane
        for j in range(FILTERS):
            total = np.float32(0)
            # The last group of filters can reach past K.
            if not flipped and (ALL_FILTERS or first_filter + j < K):
                total = b[unsigned(first_filter + j)]
            for p in range(ROWS):
                totals[p * FILTERS + j] = total
        for first in range(0, C, CHUNK):
            for load in range(LOADS):
                row = load * ROWS_AT_ONCE + row_lane
                i = (first * 9 + row) & INDEX_BITS  # (channel, tap) of all channels
                value = np.float32(0)
                # The last load can reach past the matrix. Past the last channel or filter: zero.
                inside = ALL_STAGED or (row < WEIGHT_ROWS and filter_lane < FILTERS)
                if inside and (ALL_CHANNELS or i < C * 9) and (ALL_FILTERS or k < K):
                    if flipped:
                        value = w[unsigned((i // 9 * K + k) * 9 + 8 - i % 9)]
                    else:
                        value = w[unsigned(k * C * 9 + i)]
                staged[load] = value
            # No thread may store the next weights while another still reads the last ones.
            cuda.syncthreads()
            for load in range(LOADS):
                row = load * ROWS_AT_ONCE + row_lane
                # As above.
                if ALL_STAGED or (row < WEIGHT_ROWS and filter_lane < FILTERS):
                    weights[unsigned(row * BANK + filter_lane)] = staged[load]
            # All threads read what each has stored.
            cuda.syncthreads()
            # Threads past the last picture only stage weights.
            for c in range(min(CHUNK, C - first) if n < N else 0):
                plane = (n * C + first + c) * (H * W)
                for s in range(3):
                    near = v + s - 1
                    for i in range(HALO_ROWS):
                        h = top + i - 1
                        value = np.float32(0)
                        # Outside the picture is padding: zero.
                        if 0 <= near < W and 0 <= h < H:
                            value = x[unsigned(plane + h * W + near)]
                        column[i] = value
                    for r in range(3):
                        for j in range(FILTERS):
                            taps[j] = weights[unsigned((c * 9 + r * 3 + s) * BANK + j)]
                        for p in range(ROWS):
                            for j in range(FILTERS):
                                totals[p * FILTERS + j] += column[p + r] * taps[j]
        corner = ((n * K + first_filter) * H + top) * W + v
        for j in range(FILTERS):
            for p in range(ROWS):
                # Blocks reach past the last picture, the last group of filters past K, strips below the picture.
                if n < N and (ALL_FILTERS or first_filter + j < K) and top + p < H:
                    total = totals[p * FILTERS + j]
                    # A NaN fails this comparison and stays a NaN.
                    if relu and total <= np.float32(0):
                        total = np.float32(0)
                    y[unsigned(corner + j * (H * W) + p * W)] = total

    return conv2d_kernel
