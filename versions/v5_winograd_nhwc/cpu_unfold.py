"""Convolution of few channels on the CPU: im2col and a product for a few rows at a time.

Bias, ReLU and pooling follow while the product is in the cache, so that an output of full size is never in memory.
Backward, the gradient of those rows is spread out again from what they were pooled to. A piece of work is a block of
rows; the filter gradient is summed by shares of the blocks, and the shares are added in order.
"""

import numpy as np
from numba import njit, prange

from common.cpu_blas import gemm
from common.cpu_pieces import take
from versions.v5_winograd_nhwc.cpu_lines import (
    PLAIN,
    POOLED,
    add,
    add2,
    add_passed,
    clear,
    copy,
    copy_routed,
    finish_pool,
    finish_relu,
)  # fmt: skip
from versions.v5_winograd_nhwc.plan import BLOCK_ROWS


@njit
def unfold(x, top, bottom, columns):
    # x (H,W,C)  columns ((bottom-top)*W, 9*C): for each position of the rows its window, zero outside the picture
    H, W, C = x.shape
    for h in range(top, bottom):
        for v in range(W):
            window = columns[(h - top) * W + v]
            for r in range(3):
                for s in range(3):
                    target = window[(r * 3 + s) * C : (r * 3 + s + 1) * C]
                    i, j = h + r - 1, v + s - 1
                    if i < 0 or i >= H or j < 0 or j >= W:
                        clear(target)
                    else:
                        copy(target, x[i, j])


@njit
def finish_rows(y, top, b, how, out, route):
    # y (rows,W,K)  out, route: those of the picture, pooled or not
    rows, W = y.shape[0], y.shape[1]
    if how == POOLED:
        for i in range(0, rows, 2):
            for v in range(0, W, 2):
                target, path = out[(top + i) // 2, v // 2], route[(top + i) // 2, v // 2]
                finish_pool(y[i, v], y[i, v + 1], y[i + 1, v], y[i + 1, v + 1], b, target, path)
    else:
        for i in range(rows):
            for v in range(W):
                if how == PLAIN:
                    add2(out[top + i, v], y[i, v], b)
                else:
                    finish_relu(y[i, v], b, out[top + i, v], route[top + i, v])


@njit
def spread_rows(dout, route, how, top, dy):
    # dout, route: those of the picture, pooled or not  dy (rows,W,K)
    rows, W = dy.shape[0], dy.shape[1]
    for i in range(rows):
        for v in range(W):
            if how == POOLED:
                h, j = (top + i) // 2, v // 2
                copy_routed(dy[i, v], dout[h, j], route[h, j], np.int32((top + i) % 2 * 2 + v % 2))
            elif how == PLAIN:
                copy(dy[i, v], dout[top + i, v])
            else:
                copy_routed(dy[i, v], dout[top + i, v], route[top + i, v], np.int32(0))


@njit
def blocks_of(H):
    return (H + BLOCK_ROWS - 1) // BLOCK_ROWS


@njit(parallel=True)
def unfold_forward(counter, scratch, x, w, b, how, out, route):
    # x (N,H,W,C)  w (K,9*C)  b (K,)  out, route (N,H,W,K) or pooled
    N, H, W, C = x.shape
    K, depth, blocks = b.size, 9 * C, blocks_of(H)
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        piece = take(counter)
        while piece < N * blocks:
            n, top = piece // blocks, piece % blocks * BLOCK_ROWS
            bottom = min(H, top + BLOCK_ROWS)
            rows = (bottom - top) * W
            columns, y = scratch[t, : rows * depth], scratch[t, rows * depth : rows * (depth + K)]
            unfold(x[n], top, bottom, columns.reshape(rows, depth))
            gemm(rows, K, depth, columns, depth, False, w, depth, True, y, K, False)
            finish_rows(y.reshape(bottom - top, W, K), top, b, how, out[n], route[n])
            piece = take(counter)


@njit(parallel=True)
def unfold_backward_filter(counter, scratch, x, dout, route, how, partials):
    # x (N,H,W,C)  dout, route (N,H,W,K) or pooled  partials (shares, K*(9*C+1)): the gradients to the filters (K,9*C)
    # and then to the biases (K,), summed over a share of the blocks
    N, H, W, C = x.shape
    K, depth, blocks, shares = dout.shape[3], 9 * C, blocks_of(H), partials.shape[0]
    counter[0] = 0
    for t in prange(scratch.shape[0]):
        share = take(counter)
        while share < shares:
            partial, bias = partials[share, : K * depth], partials[share, K * depth :]
            clear(bias)
            begin = N * blocks * share // shares
            for block in range(begin, N * blocks * (share + 1) // shares):
                n, top = block // blocks, block % blocks * BLOCK_ROWS
                bottom = min(H, top + BLOCK_ROWS)
                rows = (bottom - top) * W
                columns, dy = scratch[t, : rows * depth], scratch[t, rows * depth : rows * (depth + K)]
                unfold(x[n], top, bottom, columns.reshape(rows, depth))
                spread_rows(dout[n], route[n], how, top, dy.reshape(bottom - top, W, K))
                gemm(K, depth, rows, dy, K, True, columns, depth, False, partial, depth, block > begin)
                step = 2 if how == POOLED else 1
                for h in range(top // step, bottom // step):
                    for v in range(W // step):
                        if how == PLAIN:
                            add(bias, dout[n, h, v])
                        else:
                            add_passed(bias, dout[n, h, v], route[n, h, v])
            share = take(counter)


@njit
def add_unfolded(partials, dw, db):
    # partials (shares, K*(9*C+1))  dw (K*9*C,)  db (K,): added in the order of the shares
    copy(dw, partials[0, : dw.size])
    copy(db, partials[0, dw.size :])
    for share in range(1, partials.shape[0]):
        add(dw, partials[share, : dw.size])
        add(db, partials[share, dw.size :])
