"""V2's gradients of the filters and of the biases on the GPU; a second kernel adds the partial sums that they store."""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import ALIGNMENT, BLOCK_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v2_tiled_nhwc.gpu_staging import halo_staging
from versions.v2_tiled_nhwc.plan import FilterTile


@cache
def filter_kernel_for(*, tile: FilterTile, height: int, width: int, channels: int, filters: int):
    """Backward filter: block = filters x channels x nine taps, stepping over the pixel tiles of its share.

    ::

        a block: FILTERS filters x CHANNELS channels    a thread: OUTPUTS filters x 1 channel x 9 taps, sums in
                 x 9 taps                                         registers; neighbouring lanes take neighbouring
                                                                  channels, the groups of lanes the filters
        each step: TH x TW pixels of dy, and of x with their halo, go to shared memory; a thread takes PIXELS
        neighbouring pixels of a row at a time: their window of x stays in registers for all filters
    """
    H, W, C, K = height, width, channels, filters
    TH, TW, FILTERS, CHANNELS, THREADS = tile.rows, tile.columns, tile.filters, tile.channels, tile.threads
    PIXELS, OUTPUTS, VECTOR = tile.thread_pixels, tile.thread_filters, tile.vector
    SPREAD, PITCH, RUNS = FILTERS // OUTPUTS * VECTOR, TW + 2, TW // PIXELS
    ACROSS, DOWN, WINDOW = -(-W // TW), -(-H // TH), PIXELS + 2
    TILE_RUNS, TILE_PIXELS = TH * RUNS, TH * TW
    AT_ONCE = THREADS // FILTERS  # neighbouring pixels of dy that the block loads together; they divide TW
    GRADIENT_LOADS = TILE_PIXELS // AT_ONCE
    GRADIENT_FLOATS, INPUT_FLOATS = TILE_PIXELS * FILTERS, (TH + 2) * PITCH * CHANNELS
    TOTALS, WINDOW_FLOATS = 9 * OUTPUTS, 3 * WINDOW
    # Where sizes divide, these are true and the compiler drops the guard.
    ALL_CHANNELS, ALL_FILTERS, ALL_PIXELS = C % CHANNELS == 0, K % FILTERS == 0, H % TH == 0 and W % TW == 0
    load_halo, store_halo, HALO_LOADS = halo_staging(
        tile=tile, lanes=CHANNELS, channel_step=1, pixel_step=CHANNELS, height=H, width=W, channels=C
    )

    @gpu_kernel(registers=tile.registers, variant=tile.name, ffma=tile.ffma)
    def conv2d_backward_filter_kernel(x, dy, partials, N):
        # x (N,H,W,C)  dy (N,H,W,K)  partials (shares,K,R,S,C), all flat
        # grid (tiles of C, tiles of K, shares of the pixel tiles)  block (groups of filters, channels)
        gradients = cuda.shared.array(GRADIENT_FLOATS, np.float32, ALIGNMENT)  # (row, column, filter)
        inputs = cuda.shared.array(INPUT_FLOATS, np.float32, ALIGNMENT)  # (halo row, halo column, channel)
        halo = cuda.local.array(HALO_LOADS, np.float32)
        staged = cuda.local.array(GRADIENT_LOADS, np.float32)
        totals = cuda.local.array(TOTALS, np.float32)
        window = cuda.local.array(WINDOW_FLOATS, np.float32)
        column = cuda.local.array(OUTPUTS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        lane = t % CHANNELS
        group = t // CHANNELS
        first_channel = (cuda.blockIdx.x & BLOCK_BITS) * CHANNELS
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        share = cuda.blockIdx.z & BLOCK_BITS
        shares = cuda.gridDim.z & BLOCK_BITS
        tiles = N * (ACROSS * DOWN)
        for i in range(TOTALS):
            totals[i] = np.float32(0)
        for index in range(share * tiles // shares, (share + 1) * tiles // shares):
            number = index & BLOCK_BITS
            left = number % ACROSS * TW
            top = number // ACROSS % DOWN * TH
            picture = number // (ACROSS * DOWN) * H
            k = first_filter + t % FILTERS
            for load in range(GRADIENT_LOADS):
                h = top + load * AT_ONCE // TW
                v = left + load * AT_ONCE % TW + t // FILTERS
                value = np.float32(0)
                # Past the picture's border or the last filter: zero.
                if (ALL_FILTERS or k < K) and (ALL_PIXELS or (h < H and v < W)):
                    value = dy[unsigned(((picture + h) * W + v) * K + k)]
                staged[load] = value
            # No thread may store the next tile while another still reads the last one.
            cuda.syncthreads()
            for load in range(GRADIENT_LOADS):
                gradients[unsigned(load * THREADS + t)] = staged[load]
            load_halo(x, halo, picture, top, left, first_channel, t)
            store_halo(halo, inputs, t)
            # All threads read what each has stored.
            cuda.syncthreads()
            for run in range(TILE_RUNS):
                pixel = run // RUNS * TW + run % RUNS * PIXELS
                corner = run // RUNS * PITCH + run % RUNS * PIXELS
                for r in range(3):
                    for i in range(WINDOW):
                        window[r * WINDOW + i] = inputs[unsigned((corner + r * PITCH + i) * CHANNELS + lane)]
                for i in range(PIXELS):
                    for j in range(OUTPUTS):
                        k = j // VECTOR * SPREAD + group * VECTOR + j % VECTOR
                        column[j] = gradients[unsigned((pixel + i) * FILTERS + k)]
                    for r in range(3):
                        for s in range(3):
                            for j in range(OUTPUTS):
                                totals[(r * 3 + s) * OUTPUTS + j] += window[r * WINDOW + i + s] * column[j]
        c = first_channel + lane
        for j in range(OUTPUTS):
            k = first_filter + j // VECTOR * SPREAD + group * VECTOR + j % VECTOR
            # Tiles reach past the last filter and the last channel.
            if (ALL_FILTERS or k < K) and (ALL_CHANNELS or c < C):
                for tap in range(9):
                    partials[unsigned(((share * K + k) * 9 + tap) * C + c)] = totals[tap * OUTPUTS + j]

    return conv2d_backward_filter_kernel


@cache
def bias_kernel_for(*, threads: int, filters: int):
    """Backward bias: neighbouring lanes sum neighbouring filters, the rows of lanes neighbouring pixels."""
    THREADS, K = threads, filters
    LANES = min(K, THREADS)
    ROWS = THREADS // LANES

    @gpu_kernel(registers=40)
    def conv2d_backward_bias_kernel(dy, partials, pixels):
        # dy (pixels,K)  partials (shares,K), both flat  grid (tiles of K, shares of the pixels)
        sums = cuda.shared.array(THREADS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        row = t // LANES
        k = (cuda.blockIdx.x & BLOCK_BITS) * THREADS + t % LANES
        share = cuda.blockIdx.y & BLOCK_BITS
        shares = cuda.gridDim.y & BLOCK_BITS
        total = np.float32(0)
        # Threads beyond the last whole row and past the last filter add nothing.
        if row < ROWS and k < K:
            for p in range(share * pixels // shares + row, (share + 1) * pixels // shares, ROWS):
                total += dy[unsigned(p * K + k)]
        sums[unsigned(t)] = total
        # The first row reads what the others wrote.
        cuda.syncthreads()
        if row == 0 and k < K:
            for i in range(1, ROWS):
                total += sums[unsigned(i * LANES + t)]
            partials[unsigned(share * K + k)] = total

    return conv2d_backward_bias_kernel
