"""How a block of V2 copies a tile of a picture, with its border of one pixel, into shared memory.

A copy has two steps. All values of a thread are loaded into registers first, and then stored: so the loads are in
flight together instead of each waiting for its own store, and the block waits at a barrier in between only once.

::

      halo of 8 x 16 pixels      LANES neighbouring lanes take neighbouring channels of a pixel,
    s|m m m ... m|s              because they are contiguous in memory. The groups of lanes
    s|m m m ... m|s              take neighbouring pixels m of a row; what one thread loads
    s|m m m ... m|s              next lies a constant distance further on, so that addresses
    s|m m m ... m|s              need no arithmetic. The columns s on either side, of which
    s|m m m ... m|s              some may be outside the picture, are left for the end.

The functions are compiled into the kernels that call them.
"""

from functools import cache

import numpy as np
from numba import cuda

from common.gpu_jit import unsigned


@cache
def halo_staging(*, tile, lanes: int, channel_step: int, pixel_step: int, height: int, width: int, channels: int):
    """Two device functions, ``load`` and ``store``, and the number of floats that a thread holds between them.

    ``tile`` has rows, columns and threads. Channel c of pixel (row, column) of the halo goes to ``channel_step * c +
    pixel_step * (row * (columns + 2) + column)``, for ``lanes`` channels from the first one on.
    """
    H, W, C, LANES, CHANNEL_STEP, PIXEL_STEP = height, width, channels, lanes, channel_step, pixel_step
    TW, PITCH, HALO_ROWS = tile.columns, tile.columns + 2, tile.rows + 2
    PIXELS = tile.threads // LANES  # that the block loads at once
    COLUMNS = min(TW, PIXELS)
    ROWS = PIXELS // COLUMNS
    DOWN, ACROSS = -(-HALO_ROWS // ROWS), -(-TW // COLUMNS)
    SIDES = -(-2 * HALO_ROWS // PIXELS)
    HELD = DOWN * ACROSS + SIDES
    # Where sizes divide, these are true and the compiler drops the guard.
    ALL_LANES, ALL_PIXELS = tile.threads % LANES == 0, PIXELS % COLUMNS == 0
    ALL_ROWS, ALL_COLUMNS, ALL_SIDES = HALO_ROWS % ROWS == 0, TW % COLUMNS == 0, 2 * HALO_ROWS % PIXELS == 0
    ALL_CHANNELS, ALL_ACROSS = C % LANES == 0, W % TW == 0

    @cuda.jit(device=True, inline="always")
    def load(x, held, picture, top, left, first, t):
        # x (N,H,W,C) flat  held (HELD,)  picture: n*H  first: the first channel
        lane = t % LANES
        pixel = t // LANES
        # Past the last channel: zero. Threads beyond the last whole pixel load nothing.
        present = (ALL_LANES or pixel < PIXELS) and (ALL_CHANNELS or first + lane < C)
        for i in range(DOWN):
            row = i * ROWS + pixel // COLUMNS
            h = top + row - 1
            # Outside the picture is padding: zero. The last turn can reach past the tile.
            inside = present and (ALL_PIXELS or pixel < ROWS * COLUMNS) and (ALL_ROWS or row < HALO_ROWS) and 0 <= h < H
            for j in range(ACROSS):
                column = j * COLUMNS + pixel % COLUMNS
                v = left + column
                value = np.float32(0)
                if inside and (ALL_COLUMNS or column < TW) and (ALL_ACROSS or v < W):
                    value = x[unsigned(((picture + h) * W + v) * C + first + lane)]
                held[i * ACROSS + j] = value
        for i in range(SIDES):
            side = i * PIXELS + pixel
            h = top + side // 2 - 1
            v = left - 1 + side % 2 * (TW + 1)
            value = np.float32(0)
            # As above.
            if present and (ALL_SIDES or side < 2 * HALO_ROWS) and 0 <= v < W and 0 <= h < H:
                value = x[unsigned(((picture + h) * W + v) * C + first + lane)]
            held[DOWN * ACROSS + i] = value

    @cuda.jit(device=True, inline="always")
    def store(held, staged, t):
        # staged: the shared array
        pixel = t // LANES
        start = t % LANES * CHANNEL_STEP
        present = ALL_LANES or pixel < PIXELS
        for i in range(DOWN):
            row = i * ROWS + pixel // COLUMNS
            inside = present and (ALL_PIXELS or pixel < ROWS * COLUMNS) and (ALL_ROWS or row < HALO_ROWS)
            for j in range(ACROSS):
                column = j * COLUMNS + pixel % COLUMNS
                # As in ``load``.
                if inside and (ALL_COLUMNS or column < TW):
                    staged[unsigned(start + (row * PITCH + 1 + column) * PIXEL_STEP)] = held[i * ACROSS + j]
        for i in range(SIDES):
            side = i * PIXELS + pixel
            # As in ``load``.
            if present and (ALL_SIDES or side < 2 * HALO_ROWS):
                place = side // 2 * PITCH + side % 2 * (TW + 1)
                staged[unsigned(start + place * PIXEL_STEP)] = held[DOWN * ACROSS + i]

    return load, store, HELD
