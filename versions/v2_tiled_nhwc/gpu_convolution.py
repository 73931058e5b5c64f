"""V2's convolution kernels on the GPU: forward and, with flipped filters, backward data.

``make_conv2d_kernel`` is the tiled kernel, and the one to read first. ``make_few_outputs_kernel`` replaces it where
there are one to three output channels.
"""

import numpy as np
from numba import cuda

from common.gpu_jit import ALIGNMENT, BLOCK_BITS, INDEX_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v2_tiled_nhwc.plan import AT_ONCE


def make_conv2d_kernel(tile, flipped):
    """Forward, or backward data if ``flipped``: block = pixels x output channels, stepping over the input channels.

    Backward data is a convolution from dy to dx with flipped filters: each window is rotated by 180 degrees, and C and
    K are exchanged. So C is the number of channels that the kernel reads, and K the number that it writes.
    """
    TH, TW, FILTERS, CHUNK = tile.rows, tile.columns, tile.filters, tile.chunk
    PIXELS, OUTPUTS, VECTOR = tile.thread_pixels, tile.thread_filters, tile.vector
    THREADS, PITCH, HALO, PLANE, BANK = tile.threads, tile.pitch, tile.halo_pixels, tile.plane, tile.bank
    LANES = FILTERS // OUTPUTS  # threads that share a run of pixels
    RUNS = TW // PIXELS  # runs of pixels in a row of the tile
    SPREAD = LANES * VECTOR  # from one group of VECTOR neighbouring filters of a thread to its next
    WINDOW = PIXELS + 2
    INPUT_LANES, WEIGHT_LANES = CHUNK, FILTERS if flipped else CHUNK  # neighbours in memory, loaded by neighbours
    INPUT_ROWS, WEIGHT_ROWS = THREADS // INPUT_LANES, THREADS // WEIGHT_LANES
    INPUT_STEP, WEIGHT_STEP = AT_ONCE * INPUT_ROWS, AT_ONCE * WEIGHT_ROWS
    WEIGHTS = 9 * (CHUNK if flipped else FILTERS)
    INPUT_FLOATS, WEIGHT_FLOATS, TOTALS = CHUNK * PLANE, CHUNK * 9 * BANK, PIXELS * OUTPUTS

    @gpu_kernel(registers=tile.registers, ffma=0.65)
    def conv2d_kernel(x, w, b, y, H, W, C, K, has_bias, relu):
        # x (N,H,W,C)  w (K,R,S,C), flipped (C,R,S,K)  b (K,)  y (N,H,W,K), all flat
        # grid (tiles of N,H,W; tiles of K)  block (runs of pixels, groups of filters), filters fastest
        inputs = cuda.shared.array(INPUT_FLOATS, np.float32, ALIGNMENT)  # (channel, halo row, halo column)
        weights = cuda.shared.array(WEIGHT_FLOATS, np.float32, ALIGNMENT)  # (channel, tap, filter)
        totals = cuda.local.array(TOTALS, np.float32)
        row = cuda.local.array(WINDOW, np.float32)
        column = cuda.local.array(OUTPUTS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        lane = t % LANES
        run = t // LANES
        across = (W + TW - 1) // TW
        down = (H + TH - 1) // TH
        block = cuda.blockIdx.x & BLOCK_BITS
        left = block % across * TW
        top = block // across % down * TH
        picture = block // (across * down) * H
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        start = run // RUNS * PITCH + run % RUNS * PIXELS
        input_lane = t % INPUT_LANES
        weight_lane = t % WEIGHT_LANES
        # Threads beyond the last whole row of lanes load nothing.
        first_pixel = t // INPUT_LANES if t < INPUT_LANES * INPUT_ROWS else HALO
        first_weight = t // WEIGHT_LANES if t < WEIGHT_LANES * WEIGHT_ROWS else WEIGHTS
        for j in range(OUTPUTS):
            k = first_filter + j // VECTOR * SPREAD + lane * VECTOR + j % VECTOR
            total = np.float32(0)
            # Tiles reach past the last filter.
            if has_bias and k < K:
                total = b[unsigned(k)]
            for i in range(PIXELS):
                totals[i * OUTPUTS + j] = total
        for first in range(0, C, CHUNK):
            for begin in range(first_pixel, HALO, INPUT_STEP):
                for n in range(AT_ONCE):
                    p = (begin + n * INPUT_ROWS) & INDEX_BITS
                    h = top + p // PITCH - 1
                    v = left + p % PITCH - 1
                    # The last load can reach past the halo.
                    if p < HALO:
                        value = np.float32(0)
                        # Outside the picture is padding, past the last channel nothing: zero.
                        if first + input_lane < C and 0 <= h < H and 0 <= v < W:
                            value = x[unsigned(((picture + h) * W + v) * C + first + input_lane)]
                        inputs[unsigned(input_lane * PLANE + p)] = value
            for begin in range(first_weight, WEIGHTS, WEIGHT_STEP):
                for n in range(AT_ONCE):
                    i = (begin + n * WEIGHT_ROWS) & INDEX_BITS
                    # Neighbouring lanes read along the contiguous axis of w.
                    tap = i % 9 if flipped else i // FILTERS
                    c = i // 9 if flipped else weight_lane
                    k = weight_lane if flipped else i % FILTERS
                    # The last load can reach past the tile.
                    if i < WEIGHTS:
                        value = np.float32(0)
                        # Past the last channel or filter: zero.
                        if first + c < C and first_filter + k < K:
                            if flipped:
                                value = w[unsigned(((first + c) * 9 + 8 - tap) * K + first_filter + k)]
                            else:
                                value = w[unsigned(((first_filter + k) * 9 + tap) * C + first + c)]
                        weights[unsigned((c * 9 + tap) * BANK + k)] = value
            # All threads read what each has loaded.
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
            # No thread may load the next channels while another still reads these.
            cuda.syncthreads()
        h = top + run // RUNS
        v = left + run % RUNS * PIXELS
        own = first_filter + lane * VECTOR
        corner = ((picture + h) * W + v) * K + own
        for i in range(PIXELS):
            for j in range(OUTPUTS):
                k = j // VECTOR * SPREAD + j % VECTOR
                # Tiles reach past the picture's border and past the last filter.
                if h < H and v + i < W and own + k < K:
                    total = totals[i * OUTPUTS + j]
                    # A NaN fails this comparison and stays a NaN.
                    if relu and total <= np.float32(0):
                        total = np.float32(0)
                    y[unsigned(corner + i * K + k)] = total

    return conv2d_kernel


def make_few_outputs_kernel(tile, flipped):
    """Forward or backward data with one to three output channels: the threads of a block split the input channels.

    A tile of filters would be mostly idle here. Instead each thread computes a run of pixels for all FILTERS outputs
    over one of SLICES slices of the input channels. The slices are added at the end in a fixed order. ``flipped`` as
    above.
    """
    TH, TW, FILTERS, SLICES, PIXELS = tile.rows, tile.columns, tile.filters, tile.chunk, tile.thread_pixels
    THREADS, PITCH, HALO, PLANE = tile.threads, tile.pitch, tile.halo_pixels, tile.plane
    RUNS = TW // PIXELS  # runs of pixels in a row of the tile
    TILE_RUNS = TH * RUNS
    WINDOW = PIXELS + 2
    TILE_OUTPUTS = TH * TW * FILTERS
    INPUT_ROWS = THREADS // SLICES
    INPUT_STEP = AT_ONCE * INPUT_ROWS
    WEIGHT_LOADS = -(-SLICES * 9 * FILTERS // THREADS)
    OUTPUT_STORES = -(-TILE_OUTPUTS // THREADS)
    INPUT_FLOATS, WEIGHT_FLOATS = SLICES * PLANE, SLICES * 9 * FILTERS
    TOTALS = PIXELS * FILTERS
    RUN_FLOATS = TOTALS | 1  # odd, so that neighbouring runs begin in different banks
    SUM_FLOATS = SLICES * TILE_RUNS * RUN_FLOATS

    @gpu_kernel(registers=tile.registers, ffma=0.65)
    def conv2d_few_outputs_kernel(x, w, b, y, H, W, C, K, has_bias, relu):
        # x (N,H,W,C)  w (K,R,S,C), flipped (C,R,S,K)  b (K,)  y (N,H,W,K), all flat
        # grid (tiles of N,H,W; tiles of K)  block (channel slices, runs of pixels), pixels fastest
        inputs = cuda.shared.array(INPUT_FLOATS, np.float32, ALIGNMENT)  # (channel, halo row, halo column)
        weights = cuda.shared.array(WEIGHT_FLOATS, np.float32, ALIGNMENT)  # (channel, tap, filter)
        sums = cuda.shared.array(SUM_FLOATS, np.float32)  # (slice, run, pixel, filter)
        totals = cuda.local.array(TOTALS, np.float32)
        row = cuda.local.array(WINDOW, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        run = t % TILE_RUNS
        part = t // TILE_RUNS
        across = (W + TW - 1) // TW
        down = (H + TH - 1) // TH
        block = cuda.blockIdx.x & BLOCK_BITS
        left = block % across * TW
        top = block // across % down * TH
        picture = block // (across * down) * H
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        start = part * PLANE + run // RUNS * PITCH + run % RUNS * PIXELS
        # Neighbouring lanes read neighbouring channels, which are contiguous in memory.
        lane = t % SLICES
        first_pixel = t // SLICES
        for i in range(TOTALS):
            totals[i] = np.float32(0)
        for first in range(0, C, SLICES):
            for begin in range(first_pixel, HALO, INPUT_STEP):
                for n in range(AT_ONCE):
                    p = (begin + n * INPUT_ROWS) & INDEX_BITS
                    h = top + p // PITCH - 1
                    v = left + p % PITCH - 1
                    # The last load can reach past the halo.
                    if p < HALO:
                        value = np.float32(0)
                        # Outside the picture is padding, past the last channel nothing: zero.
                        if first + lane < C and 0 <= h < H and 0 <= v < W:
                            value = x[unsigned(((picture + h) * W + v) * C + first + lane)]
                        inputs[unsigned(lane * PLANE + p)] = value
            for load in range(WEIGHT_LOADS):
                i = load * THREADS + t
                c = i % SLICES
                tap = i // SLICES % 9
                k = i // (SLICES * 9)
                # The last load can reach past the tile.
                if k < FILTERS:
                    value = np.float32(0)
                    # Past the last channel or filter: zero.
                    if first + c < C and first_filter + k < K:
                        if flipped:
                            value = w[unsigned(((first + c) * 9 + 8 - tap) * K + first_filter + k)]
                        else:
                            value = w[unsigned(((first_filter + k) * 9 + tap) * C + first + c)]
                    weights[unsigned((c * 9 + tap) * FILTERS + k)] = value
            # All threads read what each has loaded.
            cuda.syncthreads()
            for r in range(3):
                for i in range(WINDOW):
                    row[i] = inputs[unsigned(start + r * PITCH + i)]
                for s in range(3):
                    for k in range(FILTERS):
                        weight = weights[unsigned((part * 9 + r * 3 + s) * FILTERS + k)]
                        for i in range(PIXELS):
                            totals[i * FILTERS + k] += row[i + s] * weight
            # No thread may load the next channels while another still reads these.
            cuda.syncthreads()
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
                if has_bias:
                    total += b[unsigned(k)]
                # A NaN fails this comparison and stays a NaN.
                if relu and total <= np.float32(0):
                    total = np.float32(0)
                y[unsigned(((picture + h) * W + v) * K + k)] = total

    return conv2d_few_outputs_kernel
