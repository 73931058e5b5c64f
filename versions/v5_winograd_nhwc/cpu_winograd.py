"""Winograd's algorithm on the CPU: transforms in vectors over channels, and 36 products of BLAS.

A group of pictures goes through three phases, each in small pieces: tiles are transformed (a piece is a row of tiles of
a picture), multiplied (a piece is one of the 36 products), and transformed back. Between the phases the tiles lie in
the workspace, small enough for the last cache. All sums have a fixed order, whichever thread computes them.
"""

import numpy as np
from numba import njit, prange

from common.cpu_blas import gemm
from common.cpu_pieces import take
from versions.v5_winograd_nhwc.cpu_lines import (
    PLAIN,
    POOLED,
    ROUTED,
    add,
    add2,
    add_passed,
    clear,
    copy,
    copy_routed,
    finish_pool,
    finish_relu,
)  # fmt: skip
from versions.v5_winograd_nhwc.cpu_transforms import (
    transform_filter,
    transform_filter_gradient,
    transform_gradient,
    transform_input,
    transform_output,
)  # fmt: skip
from versions.v5_winograd_nhwc.plan import LANES
from versions.v5_winograd_nhwc.winograd import OUTPUTS, PRODUCTS, TAPS, TILE


@njit
def line(s, place, lanes):
    """The channels at one place of the scratch array."""
    return s[place * LANES : place * LANES + lanes]


@njit
def load_tile(s, lanes, source, route, how, top, left, size, first, shape):
    # ``size`` x ``size`` values of a picture (H,W,C) from (top, left) and channel ``first`` on, those outside it zero.
    # Where a gradient was pooled or rectified (``how``), source and route have the shape of the output.
    H, W, C = shape
    for i in range(size):
        for j in range(size):
            h, v, target = top + i, left + j, line(s, i * TILE + j, lanes)
            if h < 0 or h >= H or v < 0 or v >= W:
                clear(target)
            elif how == POOLED:
                start = (h // 2 * (W // 2) + v // 2) * C + first
                wanted = np.int32(h % 2 * 2 + v % 2)
                copy_routed(target, source[start : start + lanes], route[start : start + lanes], wanted)
            elif how == ROUTED:
                start = (h * W + v) * C + first
                copy_routed(target, source[start : start + lanes], route[start : start + lanes], np.int32(0))
            else:
                start = (h * W + v) * C + first
                copy(target, source[start : start + lanes])


@njit
def store_tile(s, lanes, b, out, route, how, top, left, first, shape):
    # The 4x4 values of a tile that are inside the picture (H,W,K), with their bias, rectified and pooled by ``how``
    H, W, K = shape
    step = 2 if how == POOLED else 1
    for i in range(0, min(OUTPUTS, H - top), step):
        for j in range(0, min(OUTPUTS, W - left), step):
            start = ((top + i) // step * (W // step) + (left + j) // step) * K + first
            target, place = out[start : start + lanes], i * TILE + j
            values = line(s, place, lanes)
            if how == POOLED:
                right, below = line(s, place + 1, lanes), line(s, place + TILE, lanes)
                path = route[start : start + lanes]
                finish_pool(values, right, below, line(s, place + TILE + 1, lanes), b, target, path)
            elif how == ROUTED:
                finish_relu(values, b, target, route[start : start + lanes])
            elif b.size > 0:
                add2(target, values, b)
            else:
                copy(target, values)


@njit
def scatter(s, lanes, tiles, start):
    # s (36,LANES) flat -> tiles (36, any) from ``start`` on
    for p in range(PRODUCTS):
        copy(tiles[p, start : start + lanes], line(s, p, lanes))


@njit
def collect(s, lanes, tiles, start):
    for p in range(PRODUCTS):
        copy(line(s, p, lanes), tiles[p, start : start + lanes])


@njit
def tile_counts(H, W):
    return (H + OUTPUTS - 1) // OUTPUTS, (W + OUTPUTS - 1) // OUTPUTS


@njit(parallel=True)
def transform_tiles(counter, scratch, source, route, how, gradient, shape, tiles):
    # source, route (N, values of a picture)  shape (H,W,C)  tiles (36, N*tiles*C): B^T d B of 6x6 tiles, or with
    # ``gradient`` A d A^T of 4x4 tiles
    H, W, C = shape
    down, across = tile_counts(H, W)
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        s = scratch[t]
        piece = take(counter)
        while piece < source.shape[0] * down:
            picture, top = piece // down, piece % down * OUTPUTS
            for column in range(across):
                left, start = column * OUTPUTS, (piece * across + column) * C
                for c in range(0, C, LANES):
                    lanes = min(LANES, C - c)
                    values, path = source[picture], route[picture]
                    if gradient:
                        load_tile(s, lanes, values, path, how, top, left, OUTPUTS, c, shape)
                        transform_gradient(s)
                    else:
                        load_tile(s, lanes, values, path, how, top - 1, left - 1, TILE, c, shape)
                        transform_input(s)
                    scatter(s, lanes, tiles, start + c)
            piece = take(counter)


@njit(parallel=True)
def multiply_tiles(counter, threads, tiles, filters, transpose, rows, C, K, out):
    # tiles (36, T*C)  filters (36, K*C): (K,C) with ``transpose``, else (C,K)  out (36, T*K): the first ``rows`` tiles
    counter[0] = 0
    for _ in prange(threads):
        p = take(counter)
        while p < PRODUCTS:
            gemm(rows, K, C, tiles[p], C, False, filters[p], C if transpose else K, transpose, out[p], K, False)
            p = take(counter)


@njit(parallel=True)
def accumulate_products(counter, threads, gradients, tiles, rows, K, C, sums, accumulate):
    # gradients (36, T*K)  tiles (36, T*C)  sums (36, K*C): the products of the first ``rows`` tiles, added up
    counter[0] = 0
    for _ in prange(threads):
        p = take(counter)
        while p < PRODUCTS:
            gemm(K, C, rows, gradients[p], K, True, tiles[p], C, False, sums[p], C, accumulate)
            p = take(counter)


@njit(parallel=True)
def transform_back(counter, scratch, tiles, b, how, shape, out, route):
    # tiles (36, N*tiles*K)  b (K,) or (0,)  shape (H,W,K)  out, route (N, values of a picture): A^T m A, then the bias
    # and what ``how`` says
    H, W, K = shape
    down, across = tile_counts(H, W)
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        s = scratch[t]
        piece = take(counter)
        while piece < out.shape[0] * down:
            picture, top = piece // down, piece % down * OUTPUTS
            for column in range(across):
                start = (piece * across + column) * K
                for k in range(0, K, LANES):
                    lanes = min(LANES, K - k)
                    collect(s, lanes, tiles, start + k)
                    transform_output(s)
                    values, path, bias = out[picture], route[picture], b[k : k + lanes]
                    store_tile(s, lanes, bias, values, path, how, top, column * OUTPUTS, k, shape)
            piece = take(counter)


@njit(parallel=True)
def transform_filters(counter, scratch, w, flip, transformed):
    # w (K,3,3,C) -> transformed (36, K*C): G g G^T, with ``flip`` of the filters rotated by 180 degrees
    K, C = w.shape[0], w.shape[3]
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        s = scratch[t]
        k = take(counter)
        while k < K:
            for c in range(0, C, LANES):
                lanes = min(LANES, C - c)
                for r in range(TAPS):
                    for q in range(TAPS):
                        source = w[k, TAPS - 1 - r, TAPS - 1 - q] if flip else w[k, r, q]
                        copy(line(s, r * TILE + q, lanes), source[c : c + lanes])
                transform_filter(s)
                scatter(s, lanes, transformed, k * C + c)
            k = take(counter)


@njit(parallel=True)
def filter_gradient(counter, scratch, sums, dw):
    # sums (36, K*C) -> dw (K,3,3,C): G^T s G
    K, C = dw.shape[0], dw.shape[3]
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        s = scratch[t]
        k = take(counter)
        while k < K:
            for c in range(0, C, LANES):
                lanes = min(LANES, C - c)
                collect(s, lanes, sums, k * C + c)
                transform_filter_gradient(s)
                for r in range(TAPS):
                    for q in range(TAPS):
                        copy(dw[k, r, q, c : c + lanes], line(s, r * TILE + q, lanes))
            k = take(counter)


@njit(parallel=True)
def bias_gradient(counter, scratch, dout, route, how, db):
    # dout, route (rows, values of a row, K)  db (K,): a piece is ``LANES`` filters, summed over the rows in order
    rows, columns, K = dout.shape
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        piece = take(counter)
        while piece < (K + LANES - 1) // LANES:
            first = piece * LANES
            last = min(K, first + LANES)
            # One sum a row first: adding short sums has a smaller rounding error than one long sum.
            total, row = scratch[t, : last - first], scratch[t, LANES : LANES + last - first]
            clear(total)
            for i in range(rows):
                clear(row)
                for j in range(columns):
                    if how == PLAIN:
                        add(row, dout[i, j, first:last])
                    else:
                        add_passed(row, dout[i, j, first:last], route[i, j, first:last])
                add(total, row)
            copy(db[first:last], total)
            piece = take(counter)
