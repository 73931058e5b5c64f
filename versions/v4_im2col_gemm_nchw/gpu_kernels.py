"""V4's own kernels on the GPU: unfold, fold, and what follows a product. cuBLAS does the rest.

A plane is a channel of a picture, H x W values that lie together. The planes of a part of the batch follow one
another, so most kernels need to know neither pictures nor channels. All arrays are flat.
"""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import BLOCK_BITS, gpu_kernel, unsigned


@cache
def im2col_kernel_for(*, height: int, width: int):
    """Unfold planes into nine shifted copies of each: a thread owns a position and writes its nine values."""
    H, W, P = height, width, height * width

    @gpu_kernel(registers=40)
    def im2col_kernel(x, start, columns, planes):
        # x (planes,P) from ``start`` on  columns (planes,9,P)
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < planes * P:
            p = i % P
            h = p // W
            v = p % W
            target = i // P * (9 * P) + p
            values = cuda.local.array(9, np.float32)
            # All nine are loaded before the first is stored, so that they are on their way together.
            for tap in range(9):
                row = h + tap // 3 - 1
                column = v + tap % 3 - 1
                value = np.float32(0)
                # Outside the picture is padding: zero.
                if 0 <= row < H and 0 <= column < W:
                    value = x[unsigned(start + i + (tap // 3 - 1) * W + tap % 3 - 1)]
                values[tap] = value
            for tap in range(9):
                columns[unsigned(target + tap * P)] = values[tap]

    return im2col_kernel


@cache
def finish_kernel_for(*, height: int, width: int, filters: int, folded: bool, bias: bool, resample: str | None):
    """What follows a product: fold its columns if ``folded``, add the bias, apply ReLU, pool or upsample.

    ::

        resample      a thread owns                     and writes
        None          a value of y                      that value
        "upsample"    a value of y                      that value, and its 2x2 block of out
        "maxpool"     a 2x2 window of y                 its four values, and one value of out

    Folding is the transpose of im2col: a value of y is the sum of nine values of the columns, in a fixed order.
    """
    H, W, K = height, width, filters
    SIDE = 2 if resample == "maxpool" else 1  # of a thread's window
    VALUES = SIDE * SIDE
    ROWS, COLUMNS, P = H // SIDE, W // SIDE, H * W

    variant = ", ".join(filter(None, ("fold" if folded else "product", bias and "bias", resample)))

    @gpu_kernel(registers=64, variant=variant)
    def finish_kernel(columns, b, y, out, start, start_out, planes, relu):
        # columns (planes,9,P), read if folded  b (K,), read if there is a bias
        # y (planes,H,W) from ``start`` on; it holds the product if not folded  out from ``start_out`` on
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < planes * (ROWS * COLUMNS):
            values = cuda.local.array(VALUES, np.float32)
            plane = i // (ROWS * COLUMNS)
            top = i // COLUMNS % ROWS * SIDE
            left = i % COLUMNS * SIDE
            corner = plane * P + top * W + left
            added = b[unsigned(plane % K)] if bias else np.float32(0)
            for j in range(VALUES):
                h = top + j // SIDE
                v = left + j % SIDE
                total = added
                if folded:
                    for tap in range(9):
                        row = h + 1 - tap // 3
                        column = v + 1 - tap % 3
                        # Only positions inside the picture have columns.
                        if 0 <= row < H and 0 <= column < W:
                            total += columns[unsigned((plane * 9 + tap) * P + row * W + column)]
                else:
                    total += y[unsigned(start + corner + j // SIDE * W + j % SIDE)]
                # A NaN fails this comparison and stays a NaN.
                if relu and total <= np.float32(0):
                    total = np.float32(0)
                y[unsigned(start + corner + j // SIDE * W + j % SIDE)] = total
                values[j] = total
            if resample == "maxpool":
                best = values[0]
                for j in range(1, VALUES):
                    # A NaN differs from itself. Once it is the best, no value compares larger.
                    if values[j] > best or values[j] != values[j]:
                        best = values[j]
                out[unsigned(start_out + i)] = best
            if resample == "upsample":
                block = start_out + plane * (4 * P) + top * (4 * W) + left * 2
                for j in range(4):
                    out[unsigned(block + j // 2 * (2 * W) + j % 2)] = values[0]

    return finish_kernel


@cache
def flip_filters_kernel_for(*, filters: int, channels: int):
    """Exchange K and C and rotate each window by 180 degrees: a thread per weight. It is its own inverse."""
    K, C = filters, channels

    @gpu_kernel(registers=32)
    def flip_filters_kernel(w, flipped):
        # w (K,C,9)  flipped (C,K,9)
        i = cuda.grid(1) & BLOCK_BITS
        # The grid is rounded up to whole blocks.
        if i < K * C * 9:
            tap = i % 9
            k = i // 9 % K
            c = i // (9 * K)
            flipped[unsigned(i)] = w[unsigned((k * C + c) * 9 + 8 - tap)]

    return flip_filters_kernel
