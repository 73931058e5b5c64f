"""Stages with few channels, on the GPU: the products of V1, with everything that is used again on the chip.

A filter has at most 27 weights, and they stay in the registers of a thread. The lanes of a warp own neighbouring
filters and need the same values of the picture, which they read from shared memory all at once. A block takes a piece
of a row of 2x2 windows: that is what the pooling needs, so the full-size output never exists.

In the gradient to the filters a thread reads a window's gradient and route, and only the place where the gradient goes
contributes: 27 multiply-adds instead of 108. Lanes then read at most four different places of the picture at a time,
which lie in different banks of shared memory.
"""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import BLOCK_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v5_winograd_nhwc.gpu_ends import writer_for
from versions.v5_winograd_nhwc.gpu_lines import device
from versions.v5_winograd_nhwc.gpu_plan import DIRECT_FILTERS
from versions.v5_winograd_nhwc.plan import NOWHERE
from versions.v5_winograd_nhwc.winograd import TILE

AT_ONCE = 4  # windows whose gradients are loaded together


@cache
def _patch_loader_for(*, height: int, width: int, channels: int, windows: int, threads: int):
    """A device function that fills the patch of a piece: four rows of its columns and one on each side."""
    H, W, C, T = height, width, channels, threads
    ROW = (2 * windows + 2) * C
    VALUES = 4 * ROW

    @device
    def load_patch(x, picture, top, left, t, patch):
        # x (N,H,W,C)  patch (4,2*windows+2,C) shared
        start = ((picture * H + top - 1) * W + left - 1) * C
        for j in range(t, VALUES, T):
            row = j // ROW
            column = j % ROW
            value = np.float32(0)
            if 0 <= top - 1 + row < H and 0 <= (left - 1) * C + column < W * C:
                value = x[unsigned(start + row * (W * C) + column)]
            patch[unsigned(j)] = value

    return load_patch


@cache
def direct_forward_kernel_for(
    *, height: int, width: int, channels: int, filters: int, resample: str | None, pieces: tuple[int, int, int], threads
):
    """Convolution, bias, ReLU and pooling: a thread owns two filters, and takes one piece after another.

    ``pieces`` are the rows of windows of a picture, the pieces of a row, and the windows of a piece.
    """
    C, K, T, F, N = channels, filters, threads, DIRECT_FILTERS, TILE
    ROWS, PIECES, WINDOWS = pieces
    WEIGHTS, LINE, COLUMNS = 9 * channels, 3 * channels, 2 * WINDOWS + 2
    BANK, PATCH, OWN = T * F * WEIGHTS, 4 * COLUMNS * channels, F * WEIGHTS
    load_patch = _patch_loader_for(height=height, width=width, channels=C, windows=WINDOWS, threads=T)
    write = writer_for(height=height, width=width, filters=K, resample=resample, side=2)

    @device
    def add_row(patch, weights, window, row, tile1, tile2):
        # One loop over all weights would be too long for the compiler to unroll.
        for j in range(LINE):
            at = (2 * window + row * COLUMNS) * C + j
            for place in range(4):
                value = patch[unsigned(at + (place // 2 * COLUMNS + place % 2) * C)]
                tile1[place // 2 * N + place % 2] += value * weights[2 * (row * LINE + j)]
                tile2[place // 2 * N + place % 2] += value * weights[2 * (row * LINE + j) + 1]

    @gpu_kernel(registers=128, variant=resample or "", ffma=0.65)
    def direct_forward_kernel(x, w, b, out, route, number):
        # x (N,H,W,C)  w (K,9*C)  out, route as the stage writes them; number: pieces of all pictures
        bank = cuda.shared.array(BANK, np.float32)
        patch = cuda.shared.array(PATCH, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        block = cuda.blockIdx.x & BLOCK_BITS
        k0 = (cuda.blockIdx.y & BLOCK_BITS) * (T * F)
        for j in range(t, BANK, T):
            value = np.float32(0)
            # The last block has more threads than filters are left.
            if k0 * WEIGHTS + j < K * WEIGHTS:
                value = w[unsigned(k0 * WEIGHTS + j)]
            bank[unsigned(j)] = value
        # All read weights that others have loaded.
        cuda.syncthreads()
        weights = cuda.local.array(OWN, np.float32)
        for j in range(WEIGHTS):
            weights[2 * j] = bank[unsigned(t * WEIGHTS + j)]
            weights[2 * j + 1] = bank[unsigned((T + t) * WEIGHTS + j)]
        k1 = k0 + t
        k2 = k1 + T
        bias1 = b[unsigned(k1)] if k1 < K else np.float32(0)
        bias2 = b[unsigned(k2)] if k2 < K else np.float32(0)
        tile1 = cuda.local.array(8, np.float32)
        tile2 = cuda.local.array(8, np.float32)
        for piece in range(block, number, cuda.gridDim.x & BLOCK_BITS):
            picture = piece // (ROWS * PIECES)
            top = piece // PIECES % ROWS * 2
            left = piece % PIECES * (2 * WINDOWS)
            # All have read the patch of the piece before.
            cuda.syncthreads()
            load_patch(x, picture, top, left, t, patch)
            # All read the patch.
            cuda.syncthreads()
            for window in range(WINDOWS):
                for place in range(4):
                    tile1[place // 2 * N + place % 2] = np.float32(0)
                    tile2[place // 2 * N + place % 2] = np.float32(0)
                add_row(patch, weights, window, 0, tile1, tile2)
                add_row(patch, weights, window, 1, tile1, tile2)
                add_row(patch, weights, window, 2, tile1, tile2)
                # Threads without a filter have only helped to load.
                if k1 < K:
                    write(tile1, bias1, out, route, picture, top, left + 2 * window, k1)
                if k2 < K:
                    write(tile2, bias2, out, route, picture, top, left + 2 * window, k2)

    return direct_forward_kernel


@cache
def direct_filter_kernel_for(
    *, height: int, width: int, channels: int, filters: int, resample: str | None, pieces: tuple[int, int, int], threads
):
    """The gradients to filters and biases, summed over a share of the pieces: a thread owns a filter."""
    H, W, C, K, T = height, width, channels, filters, threads
    ROWS, PIECES, WINDOWS = pieces
    POOLED, RELU = resample == "maxpool", resample is not None
    WEIGHTS, COLUMNS, AHEAD = 9 * channels, 2 * WINDOWS + 2, AT_ONCE
    BANK, PATCH = T * WEIGHTS, 4 * COLUMNS * channels
    # What a thread reads: a value for each window, or for each of its four places.
    PLACES = 1 if POOLED else 4
    READS = -(-WINDOWS * PLACES // AHEAD) * AHEAD
    OUT_H, OUT_W = (H // 2, W // 2) if POOLED else (H, W)
    SIDE = 1 if POOLED else 2
    load_patch = _patch_loader_for(height=H, width=W, channels=C, windows=WINDOWS, threads=T)

    @gpu_kernel(registers=112, variant=resample or "", ffma=0.4)
    def direct_filter_kernel(x, dout, route, number, shares, partials):
        # x (N,H,W,C)  dout, route as the stage writes them  partials (shares,K,9*C), then (shares,K)
        bank = cuda.shared.array(BANK, np.float32)
        patch = cuda.shared.array(PATCH, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        share = cuda.blockIdx.x & BLOCK_BITS
        k0 = (cuda.blockIdx.y & BLOCK_BITS) * T
        k = k0 + t
        totals = cuda.local.array(WEIGHTS, np.float32)
        for j in range(WEIGHTS):
            totals[j] = np.float32(0)
        bias = np.float32(0)
        gradients = cuda.local.array(AHEAD, np.float32)
        places = cuda.local.array(AHEAD, np.int32)
        for piece in range(share, number, shares):
            picture = piece // (ROWS * PIECES)
            top = piece // PIECES % ROWS * 2
            left = piece % PIECES * (2 * WINDOWS)
            load_patch(x, picture, top, left, t, patch)
            # All read the patch.
            cuda.syncthreads()
            # Threads without a filter only help to load.
            if k < K:
                start = ((picture * OUT_H + top // 2 * SIDE) * OUT_W + left // 2 * SIDE) * K + k
                for first in range(0, READS, AHEAD):
                    for a in range(AHEAD):
                        window = (first + a) // PLACES
                        place = (first + a) % PLACES
                        row = place // 2
                        column = window * SIDE + place % 2
                        value = np.float32(0)
                        # Neither past the piece nor past the picture.
                        if window < WINDOWS and top // 2 * SIDE + row < OUT_H and left // 2 * SIDE + column < OUT_W:
                            at = unsigned(start + (row * OUT_W + column) * K)
                            value = dout[at]
                            if POOLED:
                                place = np.int32(route[at])
                                if place == NOWHERE:
                                    value = np.float32(0)
                            elif RELU and np.int32(route[at]) == NOWHERE:
                                value = np.float32(0)
                        gradients[a] = value
                        # Any place inside the window will do where nothing is added.
                        places[a] = (place // 2 % 2 * COLUMNS + place % 2 + min(window, WINDOWS - 1) * 2) * C
                    for a in range(AHEAD):
                        bias += gradients[a]
                        for j in range(WEIGHTS):
                            at = places[a] + j // (3 * C) * (COLUMNS * C) + j % (3 * C)
                            totals[j] += gradients[a] * patch[unsigned(at)]
            # The next piece overwrites the patch.
            cuda.syncthreads()
        if k < K:
            partials[unsigned(shares * (K * WEIGHTS) + share * K + k)] = bias
        for j in range(WEIGHTS):
            bank[unsigned(t * WEIGHTS + j)] = totals[j]
        # Through shared memory, so that neighbouring threads store neighbouring values.
        cuda.syncthreads()
        for j in range(t, BANK, T):
            if k0 * WEIGHTS + j < K * WEIGHTS:
                partials[unsigned((share * K + k0) * WEIGHTS + j)] = bank[unsigned(j)]

    return direct_filter_kernel
