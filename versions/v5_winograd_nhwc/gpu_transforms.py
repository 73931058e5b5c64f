"""The kernels around the products: a thread owns a tile of one channel, and its neighbours own the next channels.

    ======================== ================================= ===================================================
    kernel                   reads                             writes
    ======================== ================================= ===================================================
    tile_transform_kernel    pictures, or gradients through    36 planes (tiles, channels), one for each product;
                             ReLU and pooling                  nine values a small pixel if the map is upsampled
    filter_transform_kernel  w                                 36 planes (K,C)
    output_transform_kernel  36 planes (tiles, channels)       the output and its route, or the gradient to x
    filter_gradient_kernel   36 planes (K,C) in shares         dw
    tap_sums_kernel          nine products a small pixel       the output and its route
    ======================== ================================= ===================================================

Each loads its whole tile before it stores the first value, so that all loads are on their way together, and keeps it in
registers in between. All arrays are flat, and the sizes of a stage are constants.
"""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import BLOCK_BITS, gpu_kernel, unsigned
from versions.v5_winograd_nhwc.gpu_ends import reader_for, writer_for
from versions.v5_winograd_nhwc.gpu_lines import transform_for
from versions.v5_winograd_nhwc.gpu_plan import REACHING, TAP_GRADIENTS, tap_strides
from versions.v5_winograd_nhwc.winograd import A_T, B_T, G_WHOLE, OUTPUTS, PRODUCTS, SCALE, TILE, transposed


@cache
def tile_transform_kernel_for(*, kind: str, height: int, width: int, channels: int, resample: str | None):
    """Transform tiles of pictures, or of gradients that come through ReLU and pooling as ``resample`` says.

    ::

        kind         tile             matrix    planes
        "input"      6x6 around 4x4   B^T       36, of (tiles, channels)
        "gradient"   4x4              A         36, of (tiles, channels)
        "taps"       4x4 around 2x2   pair sums 9 values a small pixel and channel, as ``tap_strides`` orders them
    """
    H, W, C = height, width, channels
    matrix, SIDE, BORDER, SHIFT = {
        "input": (B_T, TILE, 1, OUTPUTS),
        "gradient": (transposed(A_T), OUTPUTS, 0, OUTPUTS),
        "taps": (TAP_GRADIENTS, 4, 1, 2),
    }[kind]
    ROWS, COLUMNS = -(-H // SHIFT), -(-W // SHIFT)
    LINES, N, PLANES = len(matrix), TILE, kind != "taps"
    TAP, CHANNEL = tap_strides(C)
    read = reader_for(height=H, width=W, channels=C, resample=resample, side=SIDE, border=BORDER)
    transform = transform_for(matrix)

    @gpu_kernel(registers=96, variant=", ".join(filter(None, (kind, resample))))
    def tile_transform_kernel(source, route, transformed, first, values):
        # source, route: pictures from ``first`` on  transformed (36,values) or (pixels,9,C) or (pixels,C,9)
        # values: tiles of this part, times C
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < values:
            tile = cuda.local.array(PRODUCTS, np.float32)
            place = i // C
            c = i % C
            picture = first + place // (ROWS * COLUMNS)
            top = place // COLUMNS % ROWS * SHIFT
            left = place % COLUMNS * SHIFT
            read(source, route, picture, top, left, c, tile)
            transform(tile)
            start = i if PLANES else place * (9 * C) + c * CHANNEL
            step = values if PLANES else TAP
            for row in range(LINES):
                for column in range(LINES):
                    transformed[unsigned(start + (row * LINES + column) * step)] = tile[row * N + column]

    return tile_transform_kernel


@cache
def output_transform_kernel_for(*, height: int, width: int, filters: int, resample: str | None, bias: bool):
    """From 36 planes of products to a 4x4 piece of the output, which ends as the stage does."""
    H, W, K, BIAS = height, width, filters, bias
    ROWS, COLUMNS = -(-H // OUTPUTS), -(-W // OUTPUTS)
    transform = transform_for(A_T)
    write = writer_for(height=H, width=W, filters=K, resample=resample, side=OUTPUTS)

    @gpu_kernel(registers=96, variant=", ".join(filter(None, (bias and "bias", resample))))
    def output_transform_kernel(products, b, out, route, first, values):
        # products (36,values)  out, route: pictures from ``first`` on; values: tiles of this part, times K
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < values:
            tile = cuda.local.array(PRODUCTS, np.float32)
            for p in range(PRODUCTS):
                tile[p] = products[unsigned(p * values + i)]
            transform(tile)
            place = i // K
            picture = first + place // (ROWS * COLUMNS)
            top = place // COLUMNS % ROWS * OUTPUTS
            left = place % COLUMNS * OUTPUTS
            added = b[unsigned(i % K)] if BIAS else np.float32(0)
            write(tile, added, out, route, picture, top, left, i % K)

    return output_transform_kernel


@cache
def filter_transform_kernel_for(*, filters: int, channels: int, flipped: bool):
    """G g G^T of every filter and channel, of the window rotated by 180 degrees if ``flipped``."""
    K, C, N = filters, channels, TILE
    transform = transform_for(G_WHOLE)

    @gpu_kernel(registers=80, variant="flipped" if flipped else "")
    def filter_transform_kernel(w, transformed):
        # w (K,9,C)  transformed (36,K,C)
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < K * C:
            tile = cuda.local.array(PRODUCTS, np.float32)
            start = i // C * (9 * C) + i % C
            for tap in range(9):
                tile[tap // 3 * N + tap % 3] = w[unsigned(start + (8 - tap if flipped else tap) * C)]
            transform(tile)
            for p in range(PRODUCTS):
                transformed[unsigned(p * (K * C) + i)] = SCALE * tile[p]

    return filter_transform_kernel


@cache
def filter_gradient_kernel_for(*, filters: int, channels: int):
    """G^T S G, with S the sum of the shares of the products."""
    K, C, N = filters, channels, TILE
    transform = transform_for(transposed(G_WHOLE))

    @gpu_kernel(registers=128)
    def filter_gradient_kernel(products, shares, dw, accumulate):
        # products (36,shares,K,C)  dw (K,9,C), added to what is there if ``accumulate``
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < K * C:
            tile = cuda.local.array(PRODUCTS, np.float32)
            for p in range(PRODUCTS):
                tile[p] = np.float32(0)
            for share in range(shares):
                for p in range(PRODUCTS):
                    tile[p] += products[unsigned((p * shares + share) * (K * C) + i)]
            transform(tile)
            start = i // C * (9 * C) + i % C
            for tap in range(9):
                at = unsigned(start + tap * C)
                value = SCALE * tile[tap // 3 * N + tap % 3]
                dw[at] = value + dw[at] if accumulate else value

    return filter_gradient_kernel


@cache
def tap_sums_kernel_for(*, height: int, width: int, filters: int, resample: str | None):
    """From nine products of each small pixel to the outputs on an upsampled map.

    A thread owns a small pixel's 2x2 outputs and loads the 25 products that reach them.
    """
    H, W, K, N = height, width, filters, TILE
    SMALL_H, SMALL_W = H // 2, W // 2
    TAP, FILTER = tap_strides(K)
    transform = transform_for(REACHING)
    write = writer_for(height=H, width=W, filters=K, resample=resample, side=2)

    @gpu_kernel(registers=80, variant=resample or "")
    def tap_sums_kernel(products, b, out, route, first, values):
        # products (pixels,9,K) or (pixels,K,9), of the small map  out, route: pictures from ``first`` on
        # values: pixels of this part, times K
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < values:
            tile = cuda.local.array(PRODUCTS, np.float32)
            pixel = i // K
            k = i % K
            h = pixel // SMALL_W % SMALL_H
            v = pixel % SMALL_W
            start = pixel * (9 * K) + k * FILTER
            for j in range(25):
                # Places 0..4 along an axis are those of REACHING.
                row = j // 5 // 4 - (4 - j // 5) // 4
                column = j % 5 // 4 - (4 - j % 5) // 4
                tap = (j // 5 - 1 - row) * 3 + j % 5 - 1 - column
                value = np.float32(0)
                if 0 <= h + row < SMALL_H and 0 <= v + column < SMALL_W:
                    value = products[unsigned(start + (row * SMALL_W + column) * (9 * K) + tap * TAP)]
                tile[j // 5 * N + j % 5] = value
            transform(tile)
            write(tile, b[unsigned(k)], out, route, first + pixel // (SMALL_H * SMALL_W), h * 2, v * 2, k)

    return tap_sums_kernel


@cache
def order_taps_kernel_for(*, filters: int, channels: int):
    """Copy filters so that those of a tap lie together: a thread per weight."""
    K, C = filters, channels

    @gpu_kernel(registers=32)
    def order_taps_kernel(w, ordered):
        # w (K,9,C)  ordered (9,K,C)
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < K * C * 9:
            ordered[unsigned(i)] = w[unsigned((i // C % K * 9 + i // (K * C)) * C + i % C)]

    return order_taps_kernel


@cache
def sum_taps_kernel_for(*, filters: int, channels: int):
    """Add shares of a filter gradient whose taps lie together, in a fixed order: a thread per weight."""
    K, C = filters, channels

    @gpu_kernel(registers=40)
    def sum_taps_kernel(partials, shares, dw, accumulate):
        # partials (shares,9,K,C)  dw (K,9,C), added to what is there if ``accumulate``
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < K * C * 9:
            total = np.float32(0)
            for share in range(shares):
                total += partials[unsigned(share * (K * C * 9) + i)]
            at = unsigned((i // C % K * 9 + i // (K * C)) * C + i % C)
            dw[at] = total + dw[at] if accumulate else total

    return sum_taps_kernel


@cache
def column_sums_kernel_for(*, columns: int, stride: int):
    """The first pass of a bias gradient: sums of the columns of a matrix, for each share of its rows."""
    K, STRIDE = columns, stride

    @gpu_kernel(registers=40)
    def column_sums_kernel(matrix, start, row, rows, shares, partials):
        # matrix from ``start`` on: rows of K values, a row ``row`` and a value ``STRIDE`` floats after the one before
        # partials (shares,K)
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < shares * K:
            column = start + i % K * STRIDE
            total = np.float32(0)
            for j in range(i // K, rows, shares):
                total += matrix[unsigned(column + j * row)]
            partials[unsigned(i)] = total

    return column_sums_kernel
