"""Convolution of an upsampled map on the CPU, from the small map: one product, then sums.

A pixel of the small map is four of the upsampled one, and each tap multiplies all four by the same weight. So
P = x . W, (pixels, taps x filters), has every product once, and an output adds the nine of them that reach it. Along
one axis, an even output gets tap 0 of the pixel before it and taps 1 and 2 of its own pixel; an odd one taps 0 and 1 of
its own and tap 2 of the next. Both axes are added one after the other. Backward is the transpose: G sums the gradients
that a product reaches, dx = G . W^T and dw = x^T . G. The gradient arrives on the small map.

A piece of work is a group of pictures and a chunk of filters, whose products stay in the cache.
"""

import numpy as np
from numba import njit, prange

from common.cpu_blas import gemm
from common.cpu_pieces import take
from versions.v5_winograd_nhwc.cpu_lines import (
    PLAIN,
    add,
    add2,
    add3,
    clear,
    copy,
    copy_routed,
    finish_relu,
)  # fmt: skip
from versions.v5_winograd_nhwc.plan import LANES


@njit
def chunk_of(number, K):
    """The first filter of a chunk, and how many it has."""
    first = number * LANES
    return first, min(LANES, K - first)


@njit
def chunks_of(K):
    return (K + LANES - 1) // LANES


@njit
def packed_start(k, tap, K, C):
    """Where the weights (C,) of a filter and a tap begin in packed filters: chunk by chunk (9,lanes,C)."""
    first, lanes = chunk_of(k // LANES, K)
    return (first * 9 + tap * lanes + k - first) * C


@njit(parallel=True)
def pack_filters(counter, threads, w, packed):
    # w (K,9,C) -> packed (K*9*C,): chunk by chunk (9,lanes,C), so that the products of a tap lie together
    K, taps, C = w.shape
    counter[0] = 0
    for _ in prange(threads):
        k = take(counter)
        while k < K:
            for tap in range(taps):
                start = packed_start(k, tap, K, C)
                copy(packed[start : start + C], w[k, tap])
            k = take(counter)


@njit
def tap_line(products, j, tap, lanes):
    """The products of a pixel of a row (w, 9*lanes) with one tap."""
    return products[j, tap * lanes : (tap + 1) * lanes]


@njit
def gather_row(products, tap, lines):
    # products (w, 9*lanes), a row of pixels  lines (2w, lanes): what taps ``tap`` to ``tap`` + 2 give each column
    w, lanes = products.shape[0], lines.shape[1]
    for j in range(w):
        left, centre = tap_line(products, j, tap, lanes), tap_line(products, j, tap + 1, lanes)
        right = tap_line(products, j, tap + 2, lanes)
        # Outside the picture is nothing to add.
        if j > 0:
            add3(lines[2 * j], tap_line(products, j - 1, tap, lanes), centre, right)
        else:
            add2(lines[2 * j], centre, right)
        if j + 1 < w:
            add3(lines[2 * j + 1], left, centre, tap_line(products, j + 1, tap + 2, lanes))
        else:
            add2(lines[2 * j + 1], left, centre)


@njit
def gather_picture(products, lines, total, b, how, first, out, route):
    # products (h,w,9*lanes)  lines (3,h,2w,lanes)  total, b (lanes,)  out, route (2h,2w,K) from filter ``first`` on
    h, w, lanes = products.shape[0], products.shape[1], b.size
    for i in range(h):
        for r in range(3):
            gather_row(products[i], 3 * r, lines[r, i])
    for u in range(2 * h):
        i = u // 2
        for v in range(2 * w):
            if u % 2 and i + 1 < h:
                add3(total, lines[0, i, v], lines[1, i, v], lines[2, i + 1, v])
            elif u % 2:
                add2(total, lines[0, i, v], lines[1, i, v])
            elif i > 0:
                add3(total, lines[0, i - 1, v], lines[1, i, v], lines[2, i, v])
            else:
                add2(total, lines[1, i, v], lines[2, i, v])
            if how == PLAIN:
                add2(out[u, v, first : first + lanes], total, b)
            else:
                finish_relu(total, b, out[u, v, first : first + lanes], route[u, v, first : first + lanes])


@njit
def spread_picture(dout, route, how, first, lines, sums, gradients):
    # dout, route (2h,2w,K) from filter ``first`` on  lines (2w,lanes)  sums (2h,3,w,lanes)  gradients (h,w,9*lanes):
    # the transpose of ``gather_picture``
    h, w, lanes = gradients.shape[0], gradients.shape[1], lines.shape[1]
    for u in range(2 * h):
        for v in range(2 * w):
            values = dout[u, v, first : first + lanes]
            if how == PLAIN:
                copy(lines[v], values)
            else:
                copy_routed(lines[v], values, route[u, v, first : first + lanes], np.int32(0))
        for j in range(w):
            # Tap 0 reaches columns 2j + 1 and 2j + 2, tap 1 the pixel's own, tap 2 columns 2j - 1 and 2j.
            if j + 1 < w:
                add2(sums[u, 0, j], lines[2 * j + 1], lines[2 * j + 2])
            else:
                copy(sums[u, 0, j], lines[2 * j + 1])
            add2(sums[u, 1, j], lines[2 * j], lines[2 * j + 1])
            if j > 0:
                add2(sums[u, 2, j], lines[2 * j - 1], lines[2 * j])
            else:
                copy(sums[u, 2, j], lines[2 * j])
    for i in range(h):
        for j in range(w):
            for s in range(3):
                above, below = sums[2 * i, s, j], sums[2 * i + 1, s, j]
                if i + 1 < h:
                    add2(tap_line(gradients[i], j, s, lanes), below, sums[2 * i + 2, s, j])
                else:
                    copy(tap_line(gradients[i], j, s, lanes), below)
                add2(tap_line(gradients[i], j, 3 + s, lanes), above, below)
                if i > 0:
                    add2(tap_line(gradients[i], j, 6 + s, lanes), sums[2 * i - 1, s, j], above)
                else:
                    copy(tap_line(gradients[i], j, 6 + s, lanes), above)


@njit(parallel=True)
def taps_forward(counter, scratch, at_once, x, packed, b, how, out, route):
    # x (N,h,w,C)  packed (K*9*C,)  b (K,)  out, route (N,2h,2w,K): a piece is ``at_once`` pictures and a chunk
    N, h, w, C = x.shape
    K, P = b.size, h * w
    chunks = chunks_of(K)
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        piece = take(counter)
        while piece < (N + at_once - 1) // at_once * chunks:
            n = piece // chunks * at_once
            count = min(at_once, N - n)
            first, lanes = chunk_of(piece % chunks, K)
            products = scratch[t, : count * P * 9 * lanes]
            lines = scratch[t, products.size : products.size + 6 * P * lanes].reshape(3, h, 2 * w, lanes)
            total = scratch[t, products.size + lines.size : products.size + lines.size + lanes]
            gemm(count * P, 9 * lanes, C, x[n], C, False, packed[first * 9 * C :], C, True, products, 9 * lanes, False)
            for i in range(count):
                picture = products[i * P * 9 * lanes : (i + 1) * P * 9 * lanes].reshape(h, w, 9 * lanes)
                gather_picture(picture, lines, total, b[first : first + lanes], how, first, out[n + i], route[n + i])
            piece = take(counter)


@njit
def spread_group(dout, route, how, first, lanes, h, w, scratch):
    """The gradients of the products of some pictures, at the start of ``scratch``: (pictures, h*w, 9*lanes) flat."""
    P = h * w
    end = dout.shape[0] * P * 9 * lanes
    lines = scratch[end : end + 2 * w * lanes].reshape(2 * w, lanes)
    sums = scratch[end + lines.size : end + lines.size + 6 * P * lanes].reshape(2 * h, 3, w, lanes)
    for i in range(dout.shape[0]):
        picture = scratch[i * P * 9 * lanes : (i + 1) * P * 9 * lanes].reshape(h, w, 9 * lanes)
        spread_picture(dout[i], route[i], how, first, lines, sums, picture)
    return scratch[:end]


@njit(parallel=True)
def taps_backward_data(counter, scratch, at_once, dout, route, how, packed, dx):
    # dout, route (N,2h,2w,K)  packed (K*9*C,)  dx (N,h,w,C): a piece is ``at_once`` pictures
    N, h, w, C = dx.shape
    K, P = dout.shape[3], h * w
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        piece = take(counter)
        while piece < (N + at_once - 1) // at_once:
            n = piece * at_once
            last = min(N, n + at_once)
            for chunk in range(chunks_of(K)):
                first, lanes = chunk_of(chunk, K)
                gradients = spread_group(dout[n:last], route[n:last], how, first, lanes, h, w, scratch[t])
                rows, depth, filters = (last - n) * P, 9 * lanes, packed[first * 9 * C :]
                gemm(rows, C, depth, gradients, depth, False, filters, C, False, dx[n], C, chunk > 0)
            piece = take(counter)


@njit(parallel=True)
def taps_backward_filter(counter, scratch, at_once, x, dout, route, how, partials, bias_partials):
    # x (N,h,w,C)  dout, route (N,2h,2w,K)  partials (shares, K*9*C), each packed, and bias_partials (shares, K): the
    # sums over a share of the pictures; a piece is a share and a chunk
    N, h, w, C = x.shape
    K, P, shares = dout.shape[3], h * w, partials.shape[0]
    chunks = chunks_of(K)
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        piece = take(counter)
        while piece < shares * chunks:
            share = piece // chunks
            first, lanes = chunk_of(piece % chunks, K)
            partial, bias = partials[share, first * 9 * C :], bias_partials[share, first : first + lanes]
            clear(bias)
            begin, end = N * share // shares, N * (share + 1) // shares
            for n in range(begin, end, at_once):
                last = min(end, n + at_once)
                gradients = spread_group(dout[n:last], route[n:last], how, first, lanes, h, w, scratch[t])
                rows, depth = (last - n) * P, 9 * lanes
                gemm(depth, C, rows, gradients, depth, True, x[n], C, False, partial, C, n > begin)
                # The middle tap of a pixel meets each of its four outputs once.
                by_pixel = gradients.reshape(rows, depth)
                for i in range(rows):
                    add(bias, tap_line(by_pixel, i, 4, lanes))
            piece = take(counter)


@njit(parallel=True)
def add_shares(counter, threads, partials, bias_partials, dw, db):
    # partials (shares, K*9*C) packed, bias_partials (shares, K)  dw (K,9,C)  db (K,): added in the order of the shares
    K, taps, C = dw.shape
    counter[0] = 0
    for _ in prange(threads):
        k = take(counter)
        while k < K:
            for tap in range(taps):
                start = packed_start(k, tap, K, C)
                copy(dw[k, tap], partials[0, start : start + C])
                for share in range(1, partials.shape[0]):
                    add(dw[k, tap], partials[share, start : start + C])
            copy(db[k : k + 1], bias_partials[0, k : k + 1])
            for share in range(1, partials.shape[0]):
                add(db[k : k + 1], bias_partials[share, k : k + 1])
            k = take(counter)
