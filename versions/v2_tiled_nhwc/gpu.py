"""V2 on the GPU: tiles in shared memory, outputs in registers.

Kernels are built by functions that take the tile's sizes, because shared and register arrays need sizes that the
compiler knows; ``plan.py`` has the sizes and says which tile a stage gets. All kernels see flat arrays.
"""

from math import prod

import numpy as np
from numba import cuda

from common.gpu import GpuBackend
from common.gpu_jit import ALIGNMENT, BLOCK_BITS, INDEX_BITS, THREAD_BITS, gpu_kernel, offset
from versions.v2_tiled_nhwc import plan

AT_ONCE = 4  # loads of a thread that are under way together


def make_conv2d_kernel(tile, turned):
    """Forward, or with filters ``turned`` backward data: block = pixels x output channels, stepping over input ones.

    Backward data is a convolution too, from dy to dx, with each window turned by 180 degrees and the roles of C and K
    exchanged; so C here counts the channels that are read, and K those that are written.
    """
    TH, TW, FILTERS, CHUNK = tile.rows, tile.columns, tile.filters, tile.chunk
    PIXELS, OUTPUTS, VECTOR = tile.thread_pixels, tile.thread_filters, tile.vector
    THREADS, PITCH, HALO, PLANE, BANK = tile.threads, tile.pitch, tile.halo_pixels, tile.plane, tile.bank
    LANES = FILTERS // OUTPUTS  # threads that share a run of pixels
    RUNS = TW // PIXELS  # runs of pixels in a row of the tile
    SPREAD = LANES * VECTOR  # from one group of VECTOR neighbouring filters of a thread to its next
    WINDOW = PIXELS + 2
    INPUT_LANES, WEIGHT_LANES = CHUNK, FILTERS if turned else CHUNK  # neighbours in memory, loaded by neighbours
    INPUT_ROWS, WEIGHT_ROWS = THREADS // INPUT_LANES, THREADS // WEIGHT_LANES
    INPUT_STEP, WEIGHT_STEP = AT_ONCE * INPUT_ROWS, AT_ONCE * WEIGHT_ROWS
    WEIGHTS = 9 * (CHUNK if turned else FILTERS)
    INPUT_FLOATS, WEIGHT_FLOATS, TOTALS = CHUNK * PLANE, CHUNK * 9 * BANK, PIXELS * OUTPUTS

    @gpu_kernel(registers=tile.registers)
    def conv2d_kernel(x, w, b, y, H, W, C, K, has_bias, relu):
        # x (N,H,W,C)  w (K,R,S,C), turned (C,R,S,K)  b (K,)  y (N,H,W,K), all flat
        # grid (tiles of N,H,W; tiles of K)  block (runs of pixels, groups of filters), the latter fastest
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
        # Threads that fill no whole row of lanes load nothing.
        first_pixel = t // INPUT_LANES if t < INPUT_LANES * INPUT_ROWS else HALO
        first_weight = t // WEIGHT_LANES if t < WEIGHT_LANES * WEIGHT_ROWS else WEIGHTS
        for j in range(OUTPUTS):
            k = first_filter + j // VECTOR * SPREAD + lane * VECTOR + j % VECTOR
            total = np.float32(0)
            # Tiles reach past the last filter.
            if has_bias and k < K:
                total = b[offset(k)]
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
                            value = x[offset(((picture + h) * W + v) * C + first + input_lane)]
                        inputs[offset(input_lane * PLANE + p)] = value
            for begin in range(first_weight, WEIGHTS, WEIGHT_STEP):
                for n in range(AT_ONCE):
                    i = (begin + n * WEIGHT_ROWS) & INDEX_BITS
                    # Lanes on whichever axis of w is contiguous, then on neighbours in shared memory.
                    tap = i % 9 if turned else i // FILTERS
                    c = i // 9 if turned else weight_lane
                    k = weight_lane if turned else i % FILTERS
                    # The last load can reach past the tile.
                    if i < WEIGHTS:
                        value = np.float32(0)
                        # Past the last channel or filter: zero.
                        if first + c < C and first_filter + k < K:
                            if turned:
                                value = w[offset(((first + c) * 9 + 8 - tap) * K + first_filter + k)]
                            else:
                                value = w[offset(((first_filter + k) * 9 + tap) * C + first + c)]
                        weights[offset((c * 9 + tap) * BANK + k)] = value
            # All threads read what each has loaded.
            cuda.syncthreads()
            for c in range(CHUNK):
                for r in range(3):
                    for i in range(WINDOW):
                        row[i] = inputs[offset(c * PLANE + start + r * PITCH + i)]
                    for s in range(3):
                        for j in range(OUTPUTS):
                            k = j // VECTOR * SPREAD + lane * VECTOR + j % VECTOR
                            column[j] = weights[offset((c * 9 + r * 3 + s) * BANK + k)]
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
                    # Written so that a NaN is not turned into zero.
                    if relu and total <= np.float32(0):
                        total = np.float32(0)
                    y[offset(corner + i * K + k)] = total

    return conv2d_kernel


def make_few_outputs_kernel(tile, turned):
    """Forward or backward data where the output has a channel or three: a block's threads split the input channels.

    A tile of filters would be mostly idle here. Instead each thread takes a run of pixels, all FILTERS outputs of them
    and one input channel in SLICES; the slices are added at the end, in their order. ``turned`` as above.
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

    @gpu_kernel(registers=tile.registers)
    def conv2d_few_outputs_kernel(x, w, b, y, H, W, C, K, has_bias, relu):
        # x (N,H,W,C)  w (K,R,S,C), turned (C,R,S,K)  b (K,)  y (N,H,W,K), all flat
        # grid (tiles of N,H,W; tiles of K)  block (channel slices, runs of pixels), the latter fastest
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
        # Lanes on neighbouring channels, which are neighbours in memory.
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
                            value = x[offset(((picture + h) * W + v) * C + first + lane)]
                        inputs[offset(lane * PLANE + p)] = value
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
                        if turned:
                            value = w[offset(((first + c) * 9 + 8 - tap) * K + first_filter + k)]
                        else:
                            value = w[offset(((first_filter + k) * 9 + tap) * C + first + c)]
                    weights[offset((c * 9 + tap) * FILTERS + k)] = value
            # All threads read what each has loaded.
            cuda.syncthreads()
            for r in range(3):
                for i in range(WINDOW):
                    row[i] = inputs[offset(start + r * PITCH + i)]
                for s in range(3):
                    for k in range(FILTERS):
                        weight = weights[offset((part * 9 + r * 3 + s) * FILTERS + k)]
                        for i in range(PIXELS):
                            totals[i * FILTERS + k] += row[i + s] * weight
            # No thread may load the next channels while another still reads these.
            cuda.syncthreads()
        for i in range(TOTALS):
            sums[offset((part * TILE_RUNS + run) * RUN_FLOATS + i)] = totals[i]
        # The sums of all slices have to be there before they are added.
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
                    total += sums[offset((piece * TILE_RUNS + i // TOTALS) * RUN_FLOATS + i % TOTALS)]
                if has_bias:
                    total += b[offset(k)]
                # Written so that a NaN is not turned into zero.
                if relu and total <= np.float32(0):
                    total = np.float32(0)
                y[offset(((picture + h) * W + v) * K + k)] = total

    return conv2d_few_outputs_kernel


def make_filter_kernel(tile):
    """Backward filter: block = filters x channels x nine taps, stepping over tiles of its share of the pixels."""
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

    @gpu_kernel(registers=tile.registers)
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
            # Lanes on neighbouring filters, then on neighbouring channels: neighbours in memory.
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
                            value = dy[offset(((picture + h) * W + v) * K + first_filter + k)]
                        gradients[offset(p * FILTERS + k)] = value
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
                            value = x[offset(((picture + h) * W + v) * C + first_channel + lane)]
                        inputs[offset(p * CHANNELS + lane)] = value
            # All threads read what each has loaded.
            cuda.syncthreads()
            for run in range(TILE_RUNS):
                pixel = run // RUNS * TW + run % RUNS * PIXELS
                corner = run // RUNS * PITCH + run % RUNS * PIXELS
                for r in range(3):
                    for i in range(WINDOW):
                        window[r * WINDOW + i] = inputs[offset((corner + r * PITCH + i) * CHANNELS + lane)]
                for i in range(PIXELS):
                    for j in range(OUTPUTS):
                        k = j // VECTOR * SPREAD + group * VECTOR + j % VECTOR
                        column[j] = gradients[offset((pixel + i) * FILTERS + k)]
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
                    partials[offset(((share * K + k) * 9 + tap) * C + c)] = totals[tap * OUTPUTS + j]

    return conv2d_backward_filter_kernel


def make_few_channels_filter_kernel(tile, few_inputs):
    """Backward filter where one side has a channel or three: lanes on the many channels of the other side.

    The few channels are staged with their halo and read by all lanes at once; each value of the other side is read from
    global memory once and meets all nine taps in registers. With few outputs the roles of x and dy are exchanged, which
    turns the window: tap t of x around dy is tap 8 - t of dy around x.
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

    @gpu_kernel(registers=tile.registers)
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
                        value = few[offset(((picture + h) * W + v) * B + first_few + b)]
                    staged[offset(p * FEW + b)] = value
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
                            values[i * OWN + j] = many[offset(((picture + h) * W + v + i) * A + a)]
                corner = run // RUNS * PITCH + run % RUNS * PIXELS
                for r in range(3):
                    for i in range(ROW_FLOATS):
                        window[r * ROW_FLOATS + i] = staged[offset((corner + r * PITCH) * FEW + i)]
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
                            partials[offset(corner + tap * B)] = totals[(tap * FEW + b) * OWN + j]
                    else:
                        corner = (share * B + first_few + b) * 9 * A + a
                        for tap in range(9):
                            partials[offset(corner + (8 - tap) * A)] = totals[(tap * FEW + b) * OWN + j]

    return conv2d_backward_filter_few_channels_kernel


def make_bias_kernel(threads):
    """Backward bias: lanes on neighbouring filters, a block's rows of lanes on neighbouring pixels."""
    THREADS = threads

    @gpu_kernel(registers=40)
    def conv2d_backward_bias_kernel(dy, partials, pixels, K):
        # dy (pixels,K)  partials (shares,K), both flat  grid (tiles of K, shares of the pixels)
        sums = cuda.shared.array(THREADS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        lanes = min(K, THREADS)
        rows = THREADS // lanes
        row = t // lanes
        k = (cuda.blockIdx.x & BLOCK_BITS) * THREADS + t % lanes
        share = cuda.blockIdx.y & BLOCK_BITS
        shares = cuda.gridDim.y & BLOCK_BITS
        total = np.float32(0)
        # Threads that fill no whole row, and those past the last filter, have nothing to add.
        if row < rows and k < K:
            for p in range(share * pixels // shares + row, (share + 1) * pixels // shares, rows):
                total += dy[offset(p * K + k)]
        sums[offset(t)] = total
        # The first row reads what the others wrote.
        cuda.syncthreads()
        if row == 0 and k < K:
            for i in range(1, rows):
                total += sums[offset(i * lanes + t)]
            partials[offset(share * K + k)] = total

    return conv2d_backward_bias_kernel


CONV2D_KERNELS = {name: make_conv2d_kernel(tile, False) for name, tile in plan.SIZES.conv2d.items()}
TURNED_KERNELS = {name: make_conv2d_kernel(tile, True) for name, tile in plan.SIZES.conv2d.items()}
few_outputs_kernel = make_few_outputs_kernel(plan.SIZES.few_outputs, False)
turned_few_outputs_kernel = make_few_outputs_kernel(plan.SIZES.few_outputs, True)
FILTER_KERNELS = {name: make_filter_kernel(tile) for name, tile in plan.SIZES.filter.items()}
few_inputs_filter_kernel = make_few_channels_filter_kernel(plan.SIZES.few_channels, True)
few_outputs_filter_kernel = make_few_channels_filter_kernel(plan.SIZES.few_channels, False)
conv2d_backward_bias_kernel = make_bias_kernel(plan.SIZES.bias_threads)


class TiledGpu(GpuBackend):
    """V2's four convolution operations on the GPU."""

    layout = "NHWC"

    def prepare(self, architecture, batch_size):
        """Allocate the partial sums of the gradients to filters and biases."""
        super().prepare(architecture, batch_size)
        shapes = plan.gpu_workspace(architecture, batch_size)
        self._partial_gradients = self.empty(shapes["partial gradients"])

    def conv2d_forward(self, x, w, b, y, relu):
        self._convolve(CONV2D_KERNELS, few_outputs_kernel, x, w, b, y, relu)

    def conv2d_backward_data(self, dy, w, dx):
        self._convolve(TURNED_KERNELS, turned_few_outputs_kernel, dy, w, None, dx, False)

    def _convolve(self, kernels, few_outputs, x, w, b, y, relu):
        (N, H, W, C), K = x.shape, y.shape[3]
        tile = plan.conv2d_tile(C, K, H, W)
        kernel = few_outputs if tile is plan.SIZES.few_outputs else kernels[tile.name]
        grid = tile.pixel_tiles(N, H, W), -(-K // tile.filters)
        has_bias = b is not None
        x, w, b, y = (self.flat(buffer) for buffer in (x, w, b if has_bias else w, y))
        self.launch_grid(kernel, grid, (tile.threads,), x, w, b, y, H, W, C, K, has_bias, relu)

    def conv2d_backward_filter(self, x, dy, dw):
        (N, H, W, C), K = x.shape, dy.shape[3]
        tile = plan.filter_tile(C, K, H, W)
        shares = plan.filter_shares(tile, N, H, W, C, K)
        x, dy, partials = (self.flat(buffer) for buffer in (x, dy, self._partial_gradients))
        if tile is not plan.SIZES.few_channels:
            kernel = FILTER_KERNELS[tile.name]
            grid = -(-C // tile.channels), -(-K // tile.filters), shares
            self.launch_grid(kernel, grid, (tile.threads,), x, dy, partials, N, H, W, C, K)
        else:
            few_inputs = C <= K
            kernel = few_inputs_filter_kernel if few_inputs else few_outputs_filter_kernel
            few, many, B, A = (x, dy, C, K) if few_inputs else (dy, x, K, C)
            grid = -(-B // tile.filters), -(-A // tile.channels), shares
            self.launch_grid(kernel, grid, (tile.threads,), few, many, partials, N, H, W, B, A)
        self.sum_shares(partials, shares, dw)

    def conv2d_backward_bias(self, dy, db):
        K = dy.shape[3]
        pixels = prod(dy.shape[:3])
        shares = plan.bias_shares(pixels)
        partials = self.flat(self._partial_gradients)
        grid = -(-K // plan.SIZES.bias_threads), shares
        self.launch_grid(
            conv2d_backward_bias_kernel, grid, (plan.SIZES.bias_threads,), self.flat(dy), partials, pixels, K
        )
        self.sum_shares(partials, shares, db)


make_backend = TiledGpu
