"""V2's filter gradient kernels on the GPU; a second kernel adds the partial sums that they store.

``make_filter_kernel`` is for many channels, ``make_few_channels_filter_kernel`` for one to three channels in x or dy.
"""

import numpy as np
from numba import cuda

from common.gpu_jit import ALIGNMENT, BLOCK_BITS, INDEX_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v2_tiled_nhwc.plan import AT_ONCE


def make_filter_kernel(tile):
    """Backward filter: block = filters x channels x nine taps, stepping over the pixel tiles of its share."""
    TH, TW, FILTERS, CHANNELS = tile.rows, tile.columns, tile.filters, tile.channels
    PIXELS, OUTPUTS, VECTOR = tile.thread_pixels, tile.thread_filters, tile.vector
    THREADS, PITCH, HALO = tile.threads, tile.pitch, tile.halo_pixels
    SPREAD = FILTERS // OUTPUTS * VECTOR
    WINDOW = PIXELS + 2
    RUNS = TW // PIXELS
    TILE_RUNS = TH * RUNS
    TILE_PIXELS = TH * TW
    GRADIENT_ROWS, INPUT_ROWS = THREADS // FILTERS, THREADS // CHANNELS  # pixels that the block loads at once
    GRADIENT_STEP, INPUT_STEP = AT_ONCE * GRADIENT_ROWS, AT_ONCE * INPUT_ROWS
    GRADIENT_FLOATS, INPUT_FLOATS = TILE_PIXELS * FILTERS, HALO * CHANNELS
    TOTALS, WINDOW_FLOATS = 9 * OUTPUTS, 3 * WINDOW

    @gpu_kernel(registers=tile.registers, ffma=0.45)
    def conv2d_backward_filter_kernel(x, dy, partials, N, H, W, C, K):
        # x (N,H,W,C)  dy (N,H,W,K)  partials (shares,K,R,S,C), all flat
        # grid (tiles of C, tiles of K, shares of the pixel tiles)  block (groups of filters, channels)
        gradients = cuda.shared.array(GRADIENT_FLOATS, np.float32, ALIGNMENT)  # (row, column, filter)
        inputs = cuda.shared.array(INPUT_FLOATS, np.float32, ALIGNMENT)  # (halo row, halo column, channel)
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
        across = (W + TW - 1) // TW
        down = (H + TH - 1) // TH
        tiles = N * across * down
        for i in range(TOTALS):
            totals[i] = np.float32(0)
        for index in range(share * tiles // shares, (share + 1) * tiles // shares):
            left = index % across * TW
            top = index // across % down * TH
            picture = index // (across * down) * H
            # Neighbouring lanes load neighbouring filters of dy, and below neighbouring channels of x.
            k = t % FILTERS
            for begin in range(t // FILTERS, TILE_PIXELS, GRADIENT_STEP):
                for n in range(AT_ONCE):
                    p = (begin + n * GRADIENT_ROWS) & INDEX_BITS
                    h = top + p // TW
                    v = left + p % TW
                    # The last load can reach past the tile.
                    if p < TILE_PIXELS:
                        value = np.float32(0)
                        # Past the picture's border or the last filter: zero.
                        if first_filter + k < K and h < H and v < W:
                            value = dy[unsigned(((picture + h) * W + v) * K + first_filter + k)]
                        gradients[unsigned(p * FILTERS + k)] = value
            for begin in range(group, HALO, INPUT_STEP):
                for n in range(AT_ONCE):
                    p = (begin + n * INPUT_ROWS) & INDEX_BITS
                    h = top + p // PITCH - 1
                    v = left + p % PITCH - 1
                    # The last load can reach past the halo.
                    if p < HALO:
                        value = np.float32(0)
                        # Outside the picture is padding, past the last channel nothing: zero.
                        if first_channel + lane < C and 0 <= h < H and 0 <= v < W:
                            value = x[unsigned(((picture + h) * W + v) * C + first_channel + lane)]
                        inputs[unsigned(p * CHANNELS + lane)] = value
            # All threads read what each has loaded.
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
            # No thread may load the next tile while another still reads this one.
            cuda.syncthreads()
        c = first_channel + lane
        for j in range(OUTPUTS):
            k = first_filter + j // VECTOR * SPREAD + group * VECTOR + j % VECTOR
            # Tiles reach past the last filter and the last channel.
            if k < K and c < C:
                for tap in range(9):
                    partials[unsigned(((share * K + k) * 9 + tap) * C + c)] = totals[tap * OUTPUTS + j]

    return conv2d_backward_filter_kernel


def make_few_channels_filter_kernel(tile, few_inputs):
    """Backward filter if x or dy has one to three channels: neighbouring lanes take the many channels of the other.

    The few channels are staged with their halo, and all lanes read the same value at once. Each value of the other
    array is read from global memory once and used for all nine taps in registers. With few outputs the roles of x and
    dy are exchanged, which flips the window: tap t of x around dy is tap 8 - t of dy around x.
    """
    TH, TW, FEW, MANY = tile.rows, tile.columns, tile.filters, tile.channels
    PIXELS, THREADS = tile.thread_pixels, tile.threads
    OWN = MANY // THREADS  # channels of the many that a thread owns
    PITCH = tile.pitch
    HALO = tile.halo_pixels
    RUNS = TW // PIXELS
    TILE_RUNS = TH * RUNS
    ROW_FLOATS = (PIXELS + 2) * FEW
    WINDOW_FLOATS = 3 * ROW_FLOATS
    FEW_LOADS = -(-HALO * FEW // THREADS)
    FEW_FLOATS = HALO * FEW
    VALUES, TOTALS = PIXELS * OWN, OWN * 9 * FEW

    @gpu_kernel(registers=tile.registers, ffma=0.45)
    def conv2d_backward_filter_few_channels_kernel(few, many, partials, N, H, W, B, A):
        # few (N,H,W,B)  many (N,H,W,A)  partials (shares,K,R,S,C), all flat; x is the few and dy the many, or reversed
        # grid (tiles of B, tiles of A, shares of the pixel tiles)  block (channels of the many)
        staged = cuda.shared.array(FEW_FLOATS, np.float32, ALIGNMENT)  # (halo row, halo column, few)
        totals = cuda.local.array(TOTALS, np.float32)
        window = cuda.local.array(WINDOW_FLOATS, np.float32)
        values = cuda.local.array(VALUES, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        first_few = (cuda.blockIdx.x & BLOCK_BITS) * FEW
        first_many = (cuda.blockIdx.y & BLOCK_BITS) * MANY + t
        share = cuda.blockIdx.z & BLOCK_BITS
        shares = cuda.gridDim.z & BLOCK_BITS
        across = (W + TW - 1) // TW
        down = (H + TH - 1) // TH
        tiles = N * across * down
        for i in range(TOTALS):
            totals[i] = np.float32(0)
        for index in range(share * tiles // shares, (share + 1) * tiles // shares):
            left = index % across * TW
            top = index // across % down * TH
            picture = index // (across * down) * H
            for load in range(FEW_LOADS):
                i = load * THREADS + t
                b = i % FEW
                p = i // FEW
                h = top + p // PITCH - 1
                v = left + p % PITCH - 1
                # The last load can reach past the halo.
                if p < HALO:
                    value = np.float32(0)
                    # Outside the picture is padding, past the last channel nothing: zero.
                    if first_few + b < B and 0 <= h < H and 0 <= v < W:
                        value = few[unsigned(((picture + h) * W + v) * B + first_few + b)]
                    staged[unsigned(p * FEW + b)] = value
            # All threads read what each has loaded.
            cuda.syncthreads()
            for run in range(TILE_RUNS):
                h = top + run // RUNS
                v = left + run % RUNS * PIXELS
                for i in range(PIXELS):
                    for j in range(OWN):
                        a = first_many + j * THREADS
                        values[i * OWN + j] = np.float32(0)
                        # Past the picture's border or the last channel: zero.
                        if a < A and h < H and v + i < W:
                            values[i * OWN + j] = many[unsigned(((picture + h) * W + v + i) * A + a)]
                corner = run // RUNS * PITCH + run % RUNS * PIXELS
                for r in range(3):
                    for i in range(ROW_FLOATS):
                        window[r * ROW_FLOATS + i] = staged[unsigned((corner + r * PITCH) * FEW + i)]
                for i in range(PIXELS):
                    for r in range(3):
                        for s in range(3):
                            for b in range(FEW):
                                near = window[r * ROW_FLOATS + (i + s) * FEW + b]
                                for j in range(OWN):
                                    totals[((r * 3 + s) * FEW + b) * OWN + j] += near * values[i * OWN + j]
            # No thread may load the next tile while another still reads this one.
            cuda.syncthreads()
        for j in range(OWN):
            a = first_many + j * THREADS
            for b in range(FEW):
                # Tiles reach past the last channels.
                if a < A and first_few + b < B:
                    if few_inputs:
                        corner = (share * A + a) * 9 * B + first_few + b
                        for tap in range(9):
                            partials[unsigned(corner + tap * B)] = totals[(tap * FEW + b) * OWN + j]
                    else:
                        corner = (share * B + first_few + b) * 9 * A + a
                        for tap in range(9):
                            partials[unsigned(corner + (8 - tap) * A)] = totals[(tap * FEW + b) * OWN + j]

    return conv2d_backward_filter_few_channels_kernel
