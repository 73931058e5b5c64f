"""V2 on the CPU: the tiling of the GPU version, with caches as shared memory and vector registers as the thread's tile.

A block is a few rows of a picture and at most ``CHANNELS`` channels. It is copied once into a thread's scratch memory
with its zero border, in the order of the sums: for each pixel column the three rows under the window, so that the 3x3
window of any pixel is one contiguous run of 9 * channels values. After that there is no branch for the border. Filters
are packed into runs of the same order once per call. The block stays in the L2 cache while all filters are applied to
it, and a few filters stay in L1 while they are applied to all pixels of the block.

Two register tiles do all the arithmetic and use each loaded value several times:

- ``dot_tile``: 4 pixels x 4 filters, sixteen sums in vector registers, vectors along the window. It is used for the
  convolution with many channels, forward and, with flipped filters, backward data.
- ``add_products``: adds 8 vectors, each times a factor, to each of 3 rows of the result; the 3 x 8 factors stay in
  registers. It is used for the filter gradient (rows: filters; vectors: the windows of 8 pixels). With few channels a
  window is too short to fill vectors, so vectors run along the filters instead, in forward (rows: pixels; vectors:
  packed filters) and in the filter gradient (rows: positions in the window; vectors: output gradients of 8 pixels).
"""

import numpy as np
from numba import njit, prange

from common.architecture import TAPS, Architecture
from common.cpu import CpuBackend
from common.cpu_kernels import SUM_MATH, add_partials
from common.device import VECTOR
from versions.v2_tiled_nhwc import CPU_CHANNELS as CHANNELS
from versions.v2_tiled_nhwc import CPU_ROWS as ROWS
from versions.v2_tiled_nhwc import workspace

# With at most this many channels a window (9 * C values) is short, so vectors run along the filters.
FEW_CHANNELS = 7


@njit
def fill_block(x, h0, rows, c0, channels, block):
    # x (H,W,C)  block (rows,W+2,3,channels), flat: [h,v,r,c] = x[h0+h+r-1, v-1, c0+c], zero outside the picture
    H, W, _ = x.shape
    for i in range(rows * (W + 2) * 3):
        h, v, r = i // (3 * (W + 2)), i // 3 % (W + 2), i % 3
        target = block[i * channels :]
        inside = 1 <= v <= W and 1 <= h0 + h + r <= H
        # The source is clamped to the picture, so that one loop serves both cases.
        source = x[min(max(h0 + h + r - 1, 0), H - 1), min(max(v - 1, 0), W - 1), c0:]
        for c in range(channels):
            target[c] = source[c] if inside else np.float32(0)


@njit(fastmath=SUM_MATH)
def dot_tile(x, x_first, x_step, x_last, w, w_first, w_step, w_last, length, sums):
    # x, w flat: four runs of `length` in each  sums (16,): sums[4*p+k] = run p of x . run k of w
    # Past the last run the last one is used again; its sums are not stored by the caller.
    xa, xb = x[x_first:], x[min(x_first + x_step, x_last) :]
    xc, xd = x[min(x_first + 2 * x_step, x_last) :], x[min(x_first + 3 * x_step, x_last) :]
    wa, wb = w[w_first:], w[min(w_first + w_step, w_last) :]
    wc, wd = w[min(w_first + 2 * w_step, w_last) :], w[min(w_first + 3 * w_step, w_last) :]
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
    s8 = s9 = s10 = s11 = s12 = s13 = s14 = s15 = np.float32(0)
    # No stores in this loop, so the sixteen sums stay in registers: 16 multiply-adds for 8 loads.
    for i in range(length):
        x0, x1, x2, x3 = xa[i], xb[i], xc[i], xd[i]
        w0, w1, w2, w3 = wa[i], wb[i], wc[i], wd[i]
        s0 += x0 * w0
        s1 += x0 * w1
        s2 += x0 * w2
        s3 += x0 * w3
        s4 += x1 * w0
        s5 += x1 * w1
        s6 += x1 * w2
        s7 += x1 * w3
        s8 += x2 * w0
        s9 += x2 * w1
        s10 += x2 * w2
        s11 += x2 * w3
        s12 += x3 * w0
        s13 += x3 * w1
        s14 += x3 * w2
        s15 += x3 * w3
    sums[0], sums[1], sums[2], sums[3] = s0, s1, s2, s3
    sums[4], sums[5], sums[6], sums[7] = s4, s5, s6, s7
    sums[8], sums[9], sums[10], sums[11] = s8, s9, s10, s11
    sums[12], sums[13], sums[14], sums[15] = s12, s13, s14, s15


@njit(fastmath=SUM_MATH)
def add_products(a, x, first, step, last, length, rows):
    # a (24,)  x flat: eight runs of `length`  rows (3*length,): rows[i] += the sum over m of a[8*i+m] * run m of x
    # Past the last run the last one is used again, with a factor of zero.
    x0, x1 = x[first:], x[min(first + step, last) :]
    x2, x3 = x[min(first + 2 * step, last) :], x[min(first + 3 * step, last) :]
    x4, x5 = x[min(first + 4 * step, last) :], x[min(first + 5 * step, last) :]
    x6, x7 = x[min(first + 6 * step, last) :], x[min(first + 7 * step, last) :]
    a0, a1, a2, a3, a4, a5, a6, a7 = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    b0, b1, b2, b3, b4, b5, b6, b7 = a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]
    c0, c1, c2, c3, c4, c5, c6, c7 = a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23]
    row_a, row_b, row_c = rows[:length], rows[length : 2 * length], rows[2 * length :]
    whole = length // VECTOR * VECTOR
    for i in range(whole):
        row_a[i] += (
            a0 * x0[i] + a1 * x1[i] + a2 * x2[i] + a3 * x3[i] + a4 * x4[i] + a5 * x5[i] + a6 * x6[i] + a7 * x7[i]
        )
        row_b[i] += (
            b0 * x0[i] + b1 * x1[i] + b2 * x2[i] + b3 * x3[i] + b4 * x4[i] + b5 * x5[i] + b6 * x6[i] + b7 * x7[i]
        )
        row_c[i] += (
            c0 * x0[i] + c1 * x1[i] + c2 * x2[i] + c3 * x3[i] + c4 * x4[i] + c5 * x5[i] + c6 * x6[i] + c7 * x7[i]
        )
    # The factors are read again: kept until here, they would take registers from the vectors above.
    for i in range(whole, length):
        for k in range(3):
            f = a[8 * k :]
            rows[k * length + i] += (
                f[0] * x0[i]
                + f[1] * x1[i]
                + f[2] * x2[i]
                + f[3] * x3[i]
                + f[4] * x4[i]
                + f[5] * x5[i]
                + f[6] * x6[i]
                + f[7] * x7[i]
            )


@njit
def pack_filters(w, flip, across, packed):
    # w (K,R,S,C)  packed, flat: for each block of channels (K,S,R,channels), each filter in the order of fill_block,
    # or, with `across`, (S*R*C rounded up to a multiple of eight, K)
    # With `flip` the filters of backward data: K and C exchanged, each window rotated by 180 degrees.
    K, R, S, C = w.shape
    if flip:
        K, C = C, K
    for k in range(K):
        for i in range(R * S):
            r, s = i // S, i % S
            for c in range(C):
                c0 = c // CHANNELS * CHANNELS
                channels = min(CHANNELS, C - c0)
                place = TAPS * c0 * K + (k * TAPS + s * R + r) * channels + c - c0
                if across:
                    place = ((s * R + r) * C + c) * K + k
                packed[place] = w[c, R - 1 - r, S - 1 - s, k] if flip else w[k, r, s, c]
    if across:
        for i in range(w.size, -(-TAPS * C // 8) * 8 * K):
            packed[i] = np.float32(0)


@njit
def forward_band(x, h0, w, b, y, relu, block, sums):
    # x (H,W,C)  w packed  b (K,) or (0,)  y (H,W,K): writes its rows h0 to h0 + ROWS
    H, W, C = x.shape
    K = y.shape[2]
    rows = min(ROWS, H - h0)
    for c0 in range(0, C, CHANNELS):
        channels = min(CHANNELS, C - c0)
        fill_block(x, h0, rows, c0, channels, block)
        step, run = 3 * channels, TAPS * channels
        filters = w[TAPS * c0 * K :]
        for k in range(0, K, 4):
            for h in range(rows):
                windows = block[h * (W + 2) * step :]
                for v in range(0, W, 4):
                    dot_tile(windows, v * step, step, (W - 1) * step, filters, k * run, run, (K - 1) * run, run, sums)
                    for i in range(min(4, W - v)):
                        pixel = y[h0 + h, v + i]
                        for j in range(min(4, K - k)):
                            total = sums[4 * i + j]
                            if c0 > 0:
                                total += pixel[k + j]
                            elif b.size > 0:
                                total += b[k + j]
                            # A NaN fails this comparison and stays a NaN.
                            if relu and c0 + channels == C and total <= np.float32(0):
                                total = np.float32(0)
                            pixel[k + j] = total


@njit
def forward_band_few_channels(x, h0, w, b, y, relu, block, scratch):
    # x (H,W,C)  w packed across  b (K,) or (0,)  y (H,W,K): writes its rows h0 to h0 + ROWS
    H, W, C = x.shape
    K = y.shape[2]
    rows = min(ROWS, H - h0)
    fill_block(x, h0, rows, 0, C, block)
    run = TAPS * C
    factors, tile = scratch[:24], scratch[24:]
    for h in range(rows):
        for v in range(0, W, 3):
            for k in range(K):
                start = b[k] if b.size > 0 else np.float32(0)
                tile[k] = start
                tile[K + k] = start
                tile[2 * K + k] = start
            for e in range(0, run, 8):
                for i in range(24):
                    factors[i] = np.float32(0)
                for i in range(min(3, W - v)):
                    window = block[(h * (W + 2) + v + i) * 3 * C + e :]
                    for m in range(min(8, run - e)):
                        factors[8 * i + m] = window[m]
                add_products(factors, w, e * K, K, (e + 7) * K, K, tile)
            for i in range(min(3, W - v)):
                pixel, totals = y[h0 + h, v + i], tile[i * K :]
                for k in range(K):
                    pixel[k] = np.float32(0) if relu and totals[k] <= np.float32(0) else totals[k]


@njit(parallel=True)
def conv2d_forward_kernel(x, w, b, y, relu, blocks, tiles):
    # x (N,H,W,C)  w packed  b (K,) or (0,)  y (N,H,W,K)  blocks, tiles (threads, scratch)
    N, H, _, C = x.shape
    threads = blocks.shape[0]
    bands = -(-H // ROWS)
    for t in prange(threads):
        for i in range(N * bands * t // threads, N * bands * (t + 1) // threads):
            n, h0 = i // bands, i % bands * ROWS
            if C <= FEW_CHANNELS:
                forward_band_few_channels(x[n], h0, w, b, y[n], relu, blocks[t], tiles[t])
            else:
                forward_band(x[n], h0, w, b, y[n], relu, blocks[t], tiles[t])


@njit
def backward_filter_band(x, h0, dy, block, factors, gradient):
    # x (H,W,C)  dy (H,W,K)  gradient, flat: rows h0 to h0 + ROWS of dy are added to it. Its order is that of packed
    # filters, with K rounded up to a multiple of three or, with few channels, packed across
    H, W, C = x.shape
    K = dy.shape[2]
    few = C <= FEW_CHANNELS
    rows = min(ROWS, H - h0)
    for c0 in range(0, C, CHANNELS):
        channels = min(CHANNELS, C - c0)
        fill_block(x, h0, rows, c0, channels, block)
        step, run = 3 * channels, TAPS * channels
        # Three rows of the gradient at a time: filters or, with few channels, positions in the window.
        count, length = (run, K) if few else (K, run)
        for j in range(0, count, 3):
            target = gradient[TAPS * c0 * (-(-K // 3) * 3) + j * length :]
            for h in range(rows):
                pixels = dy[h0 + h].reshape(W * K)
                windows = block[h * (W + 2) * step :]
                for v in range(0, W, 8):
                    for i in range(24):
                        factors[i] = np.float32(0)
                    for m in range(min(8, W - v)):
                        values = windows[(v + m) * step + j :] if few else pixels[(v + m) * K + j :]
                        for i in range(min(3, count - j)):
                            factors[8 * i + m] = values[i]
                    source = pixels if few else windows
                    reach = K if few else step
                    add_products(factors, source, v * reach, reach, (W - 1) * reach, length, target)


@njit(parallel=True)
def conv2d_backward_filter_kernel(x, dy, blocks, tiles, partials):
    # x (N,H,W,C)  dy (N,H,W,K)  blocks, tiles, partials (threads, scratch)
    N, H, _, _ = x.shape
    threads = blocks.shape[0]
    bands = -(-H // ROWS)
    for t in prange(threads):
        for i in range(partials.shape[1]):
            partials[t, i] = np.float32(0)
        for i in range(N * bands * t // threads, N * bands * (t + 1) // threads):
            n, h0 = i // bands, i % bands * ROWS
            backward_filter_band(x[n], h0, dy[n], blocks[t], tiles[t], partials[t])


@njit
def unpack_gradient(partials, dw):
    # partials (threads, scratch) as backward_filter_band leaves them  dw (K,R,S,C)
    K, R, S, C = dw.shape
    padded = -(-K // 3) * 3
    for k in range(K):
        for i in range(R * S):
            r, s = i // S, i % S
            for c in range(C):
                c0 = c // CHANNELS * CHANNELS
                channels = min(CHANNELS, C - c0)
                place = TAPS * c0 * padded + (k * TAPS + s * R + r) * channels + c - c0
                if C <= FEW_CHANNELS:
                    place = ((s * R + r) * C + c) * K + k
                # Always in the order of the threads.
                total = np.float32(0)
                for t in range(partials.shape[0]):
                    total += partials[t, place]
                dw[k, r, s, c] = total


@njit(parallel=True)
def conv2d_backward_bias_kernel(dy, partials):
    # dy (N,H,W,K)  partials (threads, at least K)
    N, H, W, K = dy.shape
    threads = partials.shape[0]
    pixels = dy.reshape(N * H * W, K)
    for t in prange(threads):
        for k in range(K):
            partials[t, k] = np.float32(0)
        for i in range(N * H * W * t // threads, N * H * W * (t + 1) // threads):
            for k in range(K):
                partials[t, k] += pixels[i, k]


class TiledCpu(CpuBackend):
    """V2's four convolution operations on the CPU."""

    layout = "NHWC"

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate packed filters and, for each thread, a block, a tile and a partial filter gradient."""
        super().prepare(architecture, batch_size)
        shapes = workspace(architecture, batch_size, "cpu", self.threads)
        self._no_bias = self.empty((0,))
        self._packed = self.empty(shapes["packed filters"])
        self._blocks = self.empty(shapes["blocks"])
        self._tiles = self.empty(shapes["tiles"])
        self._partials = self.empty(shapes["filter gradient parts"])

    def conv2d_forward(self, x, w, b, y, relu):
        self._convolve(x, w, b, y, relu, flip=False)

    def conv2d_backward_data(self, dy, w, dx):
        # dx is the convolution of dy with the flipped filters.
        self._convolve(dy, w, self._no_bias, dx, relu=False, flip=True)

    def conv2d_backward_filter(self, x, dy, dw):
        conv2d_backward_filter_kernel(x, dy, self._blocks, self._tiles, self._partials)
        unpack_gradient(self._partials, dw)

    def conv2d_backward_bias(self, dy, db):
        conv2d_backward_bias_kernel(dy, self._tiles)
        add_partials(self._tiles, db)

    def _convolve(self, source, w, b, target, relu, *, flip):
        few = source.shape[3] <= FEW_CHANNELS
        pack_filters(w, flip, few, self._packed)
        conv2d_forward_kernel(source, self._packed, b, target, relu, self._blocks, self._tiles)


make_backend = TiledCpu
