"""V2's kernels on the GPU for one to three channels on one side (conv1 and conv5), where a wide tile would be idle."""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import ALIGNMENT, BLOCK_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v2_tiled_nhwc.gpu_staging import halo_staging
from versions.v2_tiled_nhwc.plan import FewChannelsTile, FewOutputsTile


@cache
def few_outputs_kernel_for(
    *, tile: FewOutputsTile, height: int, width: int, channels: int, filters: int, flipped: bool
):
    """Forward or backward data with one to three output channels: the threads of a block split the input channels.

    ::

        a block: TH x TW pixels x FILTERS filters       a thread: a run of PIXELS pixels x FILTERS filters, for one
                                                                  of every SLICES input channels
        each step: SLICES channels, one for each slice of the threads; at the end the slices are added in shared
        memory, in a fixed order

    ``flipped``, ``channels`` and ``filters`` as in ``conv2d_kernel_for``.
    """
    H, W, C, K = height, width, channels, filters
    TH, TW, FILTERS, SLICES, PIXELS = tile.rows, tile.columns, tile.filters, tile.slices, tile.thread_pixels
    THREADS, PITCH, PLANE, RUNS = tile.threads, TW + 2, tile.plane, TW // PIXELS
    ACROSS, DOWN, TILE_RUNS, TILE_OUTPUTS = -(-W // TW), -(-H // TH), TH * RUNS, TH * TW * FILTERS
    WINDOW, TOTALS, INPUT_FLOATS, WEIGHT_FLOATS = PIXELS + 2, PIXELS * FILTERS, SLICES * PLANE, SLICES * 9 * FILTERS
    WEIGHT_LOADS, OUTPUT_STORES = -(-WEIGHT_FLOATS // THREADS), -(-TILE_OUTPUTS // THREADS)
    RUN_FLOATS = TOTALS | 1  # odd, so that neighbouring runs begin in different banks
    SUM_FLOATS = SLICES * TILE_RUNS * RUN_FLOATS
    load_halo, store_halo, HALO_LOADS = halo_staging(
        tile=tile, lanes=SLICES, channel_step=PLANE, pixel_step=1, height=H, width=W, channels=C
    )

    @gpu_kernel(registers=tile.registers, ffma=tile.ffma)
    def conv2d_few_outputs_kernel(x, w, b, y, relu):
        # x (N,H,W,C)  w (K,R,S,C), flipped (C,R,S,K)  b (K,), not read if flipped  y (N,H,W,K), all flat
        # grid (tiles of N,H,W; tiles of K)  block (channel slices, runs of pixels), pixels fastest
        inputs = cuda.shared.array(INPUT_FLOATS, np.float32, ALIGNMENT)  # (channel, halo row, halo column)
        weights = cuda.shared.array(WEIGHT_FLOATS, np.float32, ALIGNMENT)  # (channel, tap, filter)
        sums = cuda.shared.array(SUM_FLOATS, np.float32)  # (slice, run, pixel, filter)
        halo = cuda.local.array(HALO_LOADS, np.float32)
        bank = cuda.local.array(WEIGHT_LOADS, np.float32)
        totals = cuda.local.array(TOTALS, np.float32)
        row = cuda.local.array(WINDOW, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        run = t % TILE_RUNS
        part = t // TILE_RUNS
        block = cuda.blockIdx.x & BLOCK_BITS
        left = block % ACROSS * TW
        top = block // ACROSS % DOWN * TH
        picture = block // (ACROSS * DOWN) * H
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        start = part * PLANE + run // RUNS * PITCH + run % RUNS * PIXELS
        for i in range(TOTALS):
            totals[i] = np.float32(0)
        for first in range(0, C, SLICES):
            load_halo(x, halo, picture, top, left, first, t)
            for load in range(WEIGHT_LOADS):
                i = load * THREADS + t
                c = first + i % SLICES
                tap = i // SLICES % 9
                k = first_filter + i // (SLICES * 9)
                value = np.float32(0)
                # The last load can reach past the tile. Past the last channel or filter: zero.
                if i < WEIGHT_FLOATS and c < C and k < K:
                    if flipped:
                        value = w[unsigned((c * 9 + 8 - tap) * K + k)]
                    else:
                        value = w[unsigned((k * 9 + tap) * C + c)]
                bank[load] = value
            # No thread may store the next channels while another still reads the last ones.
            cuda.syncthreads()
            store_halo(halo, inputs, t)
            for load in range(WEIGHT_LOADS):
                i = load * THREADS + t
                # As above.
                if i < WEIGHT_FLOATS:
                    place = (i % SLICES * 9 + i // SLICES % 9) * FILTERS + i // (SLICES * 9)
                    weights[unsigned(place)] = bank[load]
            # All threads read what each has stored.
            cuda.syncthreads()
            for r in range(3):
                for i in range(WINDOW):
                    row[i] = inputs[unsigned(start + r * PITCH + i)]
                for s in range(3):
                    for k in range(FILTERS):
                        weight = weights[unsigned((part * 9 + r * 3 + s) * FILTERS + k)]
                        for i in range(PIXELS):
                            totals[i * FILTERS + k] += row[i + s] * weight
        for i in range(TOTALS):
            sums[unsigned((part * TILE_RUNS + run) * RUN_FLOATS + i)] = totals[i]
        # The sums of all slices must be stored before they are added.
        cuda.syncthreads()
        for store in range(OUTPUT_STORES):
            i = store * THREADS + t
            k = first_filter + i % FILTERS
            h = top + i // FILTERS // TW
            v = left + i // FILTERS % TW
            # Tiles reach past the picture's border and past the last filter.
            if i < TILE_OUTPUTS and h < H and v < W and k < K:
                total = np.float32(0)
                for piece in range(SLICES):
                    total += sums[unsigned((piece * TILE_RUNS + i // TOTALS) * RUN_FLOATS + i % TOTALS)]
                if not flipped:
                    total += b[unsigned(k)]
                # A NaN fails this comparison and stays a NaN.
                if relu and total <= np.float32(0):
                    total = np.float32(0)
                y[unsigned(((picture + h) * W + v) * K + k)] = total

    return conv2d_few_outputs_kernel


@cache
def few_channels_filter_kernel_for(
    *, tile: FewChannelsTile, height: int, width: int, few: int, many: int, few_inputs: bool
):
    """Backward filter if x or dy has one to three channels: neighbouring lanes take the many channels of the other.

    ::

        a block: FEW channels x MANY channels of the other array x nine taps, and a share of the pixel tiles
        a thread: FEW channels x every THREADS-th of the many x nine taps, sums in registers

    The few channels are staged with their halo, and all lanes read the same value at once. Each value of the other
    array is read from global memory once and used for all nine taps in registers. With few outputs the roles of x and
    dy are exchanged, which flips the window: tap t of x around dy is tap 8 - t of dy around x.
    """
    H, W, B, A = height, width, few, many
    TH, TW, FEW, MANY, PIXELS, THREADS = (
        tile.rows, tile.columns, tile.few, tile.many, tile.thread_pixels, tile.threads
    )  # fmt: skip
    OWN, PITCH, RUNS = MANY // THREADS, TW + 2, TW // PIXELS
    ACROSS, DOWN, TILE_RUNS = -(-W // TW), -(-H // TH), TH * RUNS
    ROW_FLOATS = (PIXELS + 2) * FEW
    WINDOW_FLOATS, FEW_FLOATS = 3 * ROW_FLOATS, (TH + 2) * PITCH * FEW
    VALUES, TOTALS = PIXELS * OWN, OWN * 9 * FEW
    # Where sizes divide, these are true and the compiler drops the guard.
    ALL_MANY, ALL_FEW, ALL_PIXELS = A % MANY == 0, B % FEW == 0, H % TH == 0 and W % TW == 0
    load_halo, store_halo, HALO_LOADS = halo_staging(
        tile=tile, lanes=FEW, channel_step=1, pixel_step=FEW, height=H, width=W, channels=B
    )

    @gpu_kernel(registers=tile.registers, variant="few inputs" if few_inputs else "few outputs", ffma=tile.ffma)
    def conv2d_narrow_filter_kernel(few, many, partials, N):
        # few (N,H,W,B)  many (N,H,W,A)  partials (shares,K,R,S,C), all flat; x is the few and dy the many, or reversed
        # grid (tiles of B, tiles of A, shares of the pixel tiles)  block (channels of the many)
        staged = cuda.shared.array(FEW_FLOATS, np.float32, ALIGNMENT)  # (halo row, halo column, few)
        halo = cuda.local.array(HALO_LOADS, np.float32)
        totals = cuda.local.array(TOTALS, np.float32)
        window = cuda.local.array(WINDOW_FLOATS, np.float32)
        values = cuda.local.array(VALUES, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        first_few = (cuda.blockIdx.x & BLOCK_BITS) * FEW
        first_many = (cuda.blockIdx.y & BLOCK_BITS) * MANY + t
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
            load_halo(few, halo, picture, top, left, first_few, t)
            # No thread may store the next tile while another still reads the last one.
            cuda.syncthreads()
            store_halo(halo, staged, t)
            # All threads read what each has stored.
            cuda.syncthreads()
            for run in range(TILE_RUNS):
                h = top + run // RUNS
                v = left + run % RUNS * PIXELS
                for i in range(PIXELS):
                    for j in range(OWN):
                        a = first_many + j * THREADS
                        values[i * OWN + j] = np.float32(0)
                        # Past the picture's border or the last channel: zero.
                        if (ALL_MANY or a < A) and (ALL_PIXELS or (h < H and v + i < W)):
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
        for j in range(OWN):
            a = first_many + j * THREADS
            for b in range(FEW):
                # Tiles reach past the last channels.
                if (ALL_MANY or a < A) and (ALL_FEW or first_few + b < B):
                    if few_inputs:
                        corner = (share * A + a) * 9 * B + first_few + b
                        for tap in range(9):
                            partials[unsigned(corner + tap * B)] = totals[(tap * FEW + b) * OWN + j]
                    else:
                        corner = (share * B + first_few + b) * 9 * A + a
                        for tap in range(9):
                            partials[unsigned(corner + (8 - tap) * A)] = totals[(tap * FEW + b) * OWN + j]

    return conv2d_narrow_filter_kernel
