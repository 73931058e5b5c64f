"""Winograd's transforms in registers: a matrix times a tile, axis by axis, for one channel in one thread.

The tile is a local array of 6 x 6 floats that the thread owns. All loops have constant lengths, so that the compiler
unrolls them and every element of the array is a register.
"""

from functools import cache

import numpy as np
from numba import cuda

from common.device import in_simulator
from versions.v5_winograd_nhwc.winograd import TILE, Matrix, combinations


def device(function):
    """Compile into each kernel that calls it; the simulator calls it as it is, which is faster."""
    return function if in_simulator() else cuda.jit(device=True, inline="always")(function)


@cache
def transform_for(matrix: Matrix):
    """A device function that replaces tile X, a local array of 36, by ``matrix`` . X . ``matrix``^T, in its corner.

    Row i and column j of X are at 6 * i + j. ``matrix`` has up to 6 columns, and 2, 3, 4 or 6 rows.
    """
    ROWS, COLUMNS, N = len(matrix), len(matrix[0]), TILE
    multiply = _multiply_for(matrix)

    @cuda.jit(device=True, inline="always")  # in the simulator too, where it gives the function its ``cuda``
    def transform(tile):
        line = cuda.local.array(N, np.float32)
        for j in range(COLUMNS):
            for i in range(COLUMNS):
                line[i] = tile[i * N + j]
            multiply(line, tile, j, N)
        for i in range(ROWS):
            for j in range(COLUMNS):
                line[j] = tile[i * N + j]
            multiply(line, tile, i * N, 1)

    return transform


def _multiply_for(matrix: Matrix):
    """A device function that writes ``matrix`` . line into every ``step``-th place of a tile."""
    first, second, third, fourth, fifth, sixth = (*combinations(matrix, device), *[None] * (TILE - len(matrix)))

    @device
    def multiply2(line, tile, start, step):
        tile[start] = first(line)
        tile[start + step] = second(line)

    @device
    def multiply3(line, tile, start, step):
        multiply2(line, tile, start, step)
        tile[start + 2 * step] = third(line)

    @device
    def multiply4(line, tile, start, step):
        multiply3(line, tile, start, step)
        tile[start + 3 * step] = fourth(line)

    @device
    def multiply6(line, tile, start, step):
        multiply4(line, tile, start, step)
        tile[start + 4 * step] = fifth(line)
        tile[start + 5 * step] = sixth(line)

    return {2: multiply2, 3: multiply3, 4: multiply4, 6: multiply6}[len(matrix)]
