"""Where V5's kernels meet the picture: reading a gradient through ReLU and pooling, and writing an output with them.

Both ends work on a piece of a picture in one thread, for one channel: a square of values in a local array whose rows
are six floats apart. ``resample`` is that of the stage. The route of a value, a byte, says where its gradient goes: the
place 0..3 of the first maximum in its pooling window, 0 where nothing is pooled, or ``NOWHERE``. All loads and stores
are guarded: a piece may stand out over the edge of the picture, where a gradient is zero.
"""

from functools import cache

import numpy as np

from common.gpu_jit import unsigned
from versions.v5_winograd_nhwc.gpu_lines import device
from versions.v5_winograd_nhwc.plan import NOWHERE
from versions.v5_winograd_nhwc.winograd import TILE


@cache
def reader_for(*, height: int, width: int, channels: int, resample: str | None, side: int, border: int):
    """A device function that loads a square of ``side`` from row ``top - border`` and column ``left - border`` on.

    With ``resample`` None it loads what lies in ``source`` (N,H,W,C). Otherwise it gives the gradient to the output of
    a convolution, from that after ReLU and pooling: ``source`` and its ``route`` are (N,H,W,C), or (N,H/2,W/2,C) with
    "maxpool". ``top`` and ``left`` are even then.
    """
    H, W, C, SIDE, BORDER, N = height, width, channels, side, border, TILE
    POOLED_H, POOLED_W = H // 2, W // 2
    WINDOWS = SIDE // 2 + BORDER  # along an axis

    @device
    def read(source, route, picture, top, left, c, tile):
        start = ((picture * H + top) * W + left) * C + c
        for i in range(SIDE):
            for j in range(SIDE):
                value = np.float32(0)
                if 0 <= top - BORDER + i < H and 0 <= left - BORDER + j < W:
                    value = source[unsigned(start + ((i - BORDER) * W + j - BORDER) * C)]
                tile[i * N + j] = value

    @device
    def read_rectified(source, route, picture, top, left, c, tile):
        start = ((picture * H + top) * W + left) * C + c
        for i in range(SIDE):
            for j in range(SIDE):
                value = np.float32(0)
                place = NOWHERE
                if 0 <= top - BORDER + i < H and 0 <= left - BORDER + j < W:
                    at = unsigned(start + ((i - BORDER) * W + j - BORDER) * C)
                    value = source[at]
                    place = np.int32(route[at])
                tile[i * N + j] = value if place != NOWHERE else np.float32(0)

    @device
    def read_pooled(source, route, picture, top, left, c, tile):
        above = top // 2 - BORDER
        before = left // 2 - BORDER
        start = ((picture * POOLED_H + above) * POOLED_W + before) * C + c
        for i in range(WINDOWS):
            for j in range(WINDOWS):
                value = np.float32(0)
                place = NOWHERE
                if 0 <= above + i < POOLED_H and 0 <= before + j < POOLED_W:
                    at = unsigned(start + (i * POOLED_W + j) * C)
                    value = source[at]
                    place = np.int32(route[at])
                for part in range(4):
                    row = 2 * i - BORDER + part // 2
                    column = 2 * j - BORDER + part % 2
                    if 0 <= row < SIDE and 0 <= column < SIDE:
                        tile[row * N + column] = value if place == part else np.float32(0)

    return {None: read, "upsample": read_rectified, "maxpool": read_pooled}[resample]


@cache
def writer_for(*, height: int, width: int, filters: int, resample: str | None, side: int):
    """A device function that adds a bias, applies ReLU, pools, and stores a square of ``side`` and its route.

    With ``resample`` None there is no ReLU and no route. Only "maxpool" changes the size of what is stored: nothing is
    upsampled. ``side``, ``top`` and ``left`` are even.
    """
    H, W, K, SIDE, N = height, width, filters, side, TILE
    POOLED_H, POOLED_W = H // 2, W // 2
    RELU = resample is not None

    @device
    def write(tile, added, out, route, picture, top, left, k):
        start = ((picture * H + top) * W + left) * K + k
        for i in range(SIDE):
            for j in range(SIDE):
                if top + i < H and left + j < W:
                    total = tile[i * N + j] + added
                    at = unsigned(start + (i * W + j) * K)
                    if RELU:
                        route[at] = 0 if total > np.float32(0) else NOWHERE
                        # A NaN fails this comparison and stays a NaN.
                        if total <= np.float32(0):
                            total = np.float32(0)
                    out[at] = total

    @device
    def write_pooled(tile, added, out, route, picture, top, left, k):
        start = ((picture * POOLED_H + top // 2) * POOLED_W + left // 2) * K + k
        for i in range(SIDE // 2):
            for j in range(SIDE // 2):
                if top // 2 + i < POOLED_H and left // 2 + j < POOLED_W:
                    best = tile[2 * i * N + 2 * j]
                    place = 0
                    for part in range(1, 4):
                        value = tile[(2 * i + part // 2) * N + 2 * j + part % 2]
                        # Strictly larger: of equal values the first one gets the gradient. A NaN differs from itself.
                        # Once it is the best, no value compares larger.
                        if value > best or value != value:
                            best = value
                            place = part
                    best += added
                    at = unsigned(start + (i * POOLED_W + j) * K)
                    route[at] = place if best > np.float32(0) else NOWHERE
                    # A NaN fails this comparison and stays a NaN.
                    if best <= np.float32(0):
                        best = np.float32(0)
                    out[at] = best

    return write_pooled if resample == "maxpool" else write
