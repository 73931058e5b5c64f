"""V2's convolution kernel on the GPU: forward and, with flipped filters, backward data. The one to read first."""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import ALIGNMENT, BLOCK_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v2_tiled_nhwc.gpu_staging import halo_staging
from versions.v2_tiled_nhwc.plan import ConvolutionTile


@cache
def conv2d_kernel_for(*, tile: ConvolutionTile, height: int, width: int, channels: int, filters: int, flipped: bool):
    """Forward, or backward data if ``flipped``: block = pixels x output channels, stepping over the input channels.

    ::

        a block: TH x TW pixels x FILTERS filters       a thread: a run of PIXELS pixels x OUTPUTS filters,
              TW columns                                          sums in registers
           +--------+--------+
        TH | run 0  | run 1  |   RUNS runs in a row     each step: CHUNK channels of the tile with its halo
           | run 2  | run 3  |   of the tile, LANES                and of the filters go to shared memory; a value
           |  ...   |  ...   |   threads for each run              read from there is used for several outputs
           +--------+--------+

    Backward data is a convolution from dy to dx with flipped filters: each window is rotated by 180 degrees, and C and
    K are exchanged. So ``channels`` are those that the kernel reads, and ``filters`` those that it writes.
    """
    H, W, C, K = height, width, channels, filters
    TH, TW, FILTERS, CHUNK, THREADS = tile.rows, tile.columns, tile.filters, tile.chunk, tile.threads
    PIXELS, OUTPUTS, VECTOR = tile.thread_pixels, tile.thread_filters, tile.vector
    PITCH, PLANE, BANK = TW + 2, tile.plane, tile.bank
    LANES, RUNS = FILTERS // OUTPUTS, TW // PIXELS
    SPREAD = LANES * VECTOR  # from one group of VECTOR neighbouring filters of a thread to its next
    ACROSS, DOWN = -(-W // TW), -(-H // TH)
    WINDOW, TOTALS, INPUT_FLOATS, WEIGHT_FLOATS = PIXELS + 2, PIXELS * OUTPUTS, CHUNK * PLANE, CHUNK * 9 * BANK
    # Weights: neighbouring lanes load along the contiguous axis of w, the groups of lanes along the other axis.
    ALONG, OTHER = (FILTERS, CHUNK) if flipped else (CHUNK, FILTERS)
    AT_ONCE = THREADS // ALONG
    TURNS = -(-OTHER // AT_ONCE)
    WEIGHT_LOADS = 9 * TURNS
    # Where sizes divide, these are true and the compiler drops the guard.
    ALL_CHANNELS, ALL_FILTERS, ALL_PIXELS = C % CHUNK == 0, K % FILTERS == 0, H % TH == 0 and W % TW == 0
    ALL_STAGED = THREADS % ALONG == 0 and OTHER % AT_ONCE == 0
    load_halo, store_halo, HALO_LOADS = halo_staging(
        tile=tile, lanes=CHUNK, channel_step=PLANE, pixel_step=1, height=H, width=W, channels=C
    )

    @gpu_kernel(registers=tile.registers, variant=tile.name, ffma=tile.ffma)
    def conv2d_kernel(x, w, b, y, relu):
        # x (N,H,W,C)  w (K,R,S,C), flipped (C,R,S,K)  b (K,), not read if flipped  y (N,H,W,K), all flat
        # grid (tiles of N,H,W; tiles of K)  block (runs of pixels, groups of filters), filters fastest
        inputs = cuda.shared.array(INPUT_FLOATS, np.float32, ALIGNMENT)  # (channel, halo row, halo column)
        weights = cuda.shared.array(WEIGHT_FLOATS, np.float32, ALIGNMENT)  # (channel, tap, filter)
        halo = cuda.local.array(HALO_LOADS, np.float32)
        bank = cuda.local.array(WEIGHT_LOADS, np.float32)
        totals = cuda.local.array(TOTALS, np.float32)
        row = cuda.local.array(WINDOW, np.float32)
        column = cuda.local.array(OUTPUTS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        lane = t % LANES
        run = t // LANES
        block = cuda.blockIdx.x & BLOCK_BITS
        left = block % ACROSS * TW
        top = block // ACROSS % DOWN * TH
        picture = block // (ACROSS * DOWN) * H
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        start = run // RUNS * PITCH + run % RUNS * PIXELS
        for j in range(OUTPUTS):
            k = first_filter + j // VECTOR * SPREAD + lane * VECTOR + j % VECTOR
            total = np.float32(0)
            # Tiles reach past the last filter.
            if not flipped and (ALL_FILTERS or k < K):
                total = b[unsigned(k)]
            for i in range(PIXELS):
                totals[i * OUTPUTS + j] = total
        for first in range(0, C, CHUNK):
            load_halo(x, halo, picture, top, left, first, t)
            for turn in range(TURNS):
                along, other = t % ALONG, turn * AT_ONCE + t // ALONG
                c, k = (first + other, first_filter + along) if flipped else (first + along, first_filter + other)
                for tap in range(9):
                    value = np.float32(0)
                    # The last turn can reach past the tile. Past the last channel or filter: zero.
                    inside = ALL_STAGED or (t // ALONG < AT_ONCE and other < OTHER)
                    if inside and (ALL_CHANNELS or c < C) and (ALL_FILTERS or k < K):
                        if flipped:
                            value = w[unsigned((c * 9 + 8 - tap) * K + k)]
                        else:
                            value = w[unsigned((k * 9 + tap) * C + c)]
                    bank[turn * 9 + tap] = value
            # No thread may store the next channels while another still reads the last ones.
            cuda.syncthreads()
            store_halo(halo, inputs, t)
            for turn in range(TURNS):
                along, other = t % ALONG, turn * AT_ONCE + t // ALONG
                c, k = (other, along) if flipped else (along, other)
                # As above.
                if ALL_STAGED or (t // ALONG < AT_ONCE and other < OTHER):
                    for tap in range(9):
                        weights[unsigned((c * 9 + tap) * BANK + k)] = bank[turn * 9 + tap]
            # All threads read what each has stored.
            cuda.syncthreads()
            for c in range(CHUNK):
                for r in range(3):
                    for i in range(WINDOW):
                        row[i] = inputs[unsigned(c * PLANE + start + r * PITCH + i)]
                    for s in range(3):
                        for j in range(OUTPUTS):
                            k = j // VECTOR * SPREAD + lane * VECTOR + j % VECTOR
                            column[j] = weights[unsigned((c * 9 + r * 3 + s) * BANK + k)]
                        for i in range(PIXELS):
                            for j in range(OUTPUTS):
                                totals[i * OUTPUTS + j] += row[i + s] * column[j]
        h = top + run // RUNS
        v = left + run % RUNS * PIXELS
        own = first_filter + lane * VECTOR
        corner = ((picture + h) * W + v) * K + own
        for i in range(PIXELS):
            for j in range(OUTPUTS):
                k = j // VECTOR * SPREAD + j % VECTOR
                # Tiles reach past the picture's border and past the last filter.
                if (ALL_PIXELS or (h < H and v + i < W)) and (ALL_FILTERS or own + k < K):
                    total = totals[i * OUTPUTS + j]
                    # A NaN fails this comparison and stays a NaN.
                    if relu and total <= np.float32(0):
                        total = np.float32(0)
                    y[unsigned(corner + i * K + k)] = total

    return conv2d_kernel
