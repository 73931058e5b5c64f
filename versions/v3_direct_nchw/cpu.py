"""V3 on the CPU: direct convolution on planes, vectors along W, the nine taps of three filters unrolled.

A picture is copied once into a thread's scratch memory, plane by plane, in rows of W + 1 values: the zero in front of
each row is also the right border of the row above. In this form a plane is one long line and tap (r, s) is a shift by
r * (W+1) + s. The whole plane is one loop without branches, whose vectors are full even if rows are short. The values
that the loop computes in front of each row and after the last row are not stored.

Forward, and backward data with flipped filters: a thread keeps the output lines of three filters in L1 and adds the
channels to them one by one. With AVX-512 the 27 weights of a channel stay in registers, and each shifted vector of x
is used for three filters. The output lines are rounded up to whole vectors: a loop for the rest would keep the weights
in registers a second time, as scalars. Vectors that do not fit into registers are spilled to the stack. Its alignment
differs between processes; a vector that crosses a cache line is slow, and so whole processes were slow (Mytkowicz et
al., "Producing Wrong Data Without Doing Anything Obviously Wrong!", 2009).

Backward filter: the same nine shifts, multiplied by the output gradients of two filters and summed along the line into
eighteen sums in vector registers. A thread processes whole pictures; the filter gradients of the threads are added in
the order of the threads.
"""

import numpy as np
from numba import njit, prange

from common.architecture import TAPS, Architecture
from common.cpu import CpuBackend
from common.cpu_kernels import SUM_MATH, add_partials, flip_filters
from common.device import VECTOR
from versions.v3_direct_nchw import workspace


@njit
def pad_picture(x, lines):
    # x (C,H,W)  lines (C,(H+2)*(W+1)+2), flat: rows of W+1, a zero in front of each, a row of zeros above and below,
    # and two more zeros for the windows of the last positions
    C, H, W = x.shape
    pitch = W + 1
    plane = (H + 2) * pitch + 2
    for i in range(C * plane):
        lines[i] = np.float32(0)
    for c in range(C):
        for h in range(H):
            source, target = x[c, h], lines[c * plane + (h + 1) * pitch + 1 :]
            for v in range(W):
                target[v] = source[v]


@njit(fastmath=SUM_MATH)
def add_channels(lines, channels, plane, pitch, first, second, third, vectors, totals):
    # lines: padded planes, rows of `pitch`  first, second, third (channels*9,): the weights of three filters
    # totals (3,vectors*VECTOR), flat: totals[k,i] += the sum over c, r and s of filter k's [c,r,s] * line c's
    # [i + r*pitch + s]
    length = vectors * VECTOR  # a product, so that the compiler sees that no remainder loop is needed
    first_total, second_total, third_total = totals[:length], totals[length : 2 * length], totals[2 * length :]
    for channel in range(channels):
        p, q, t = first[channel * TAPS :], second[channel * TAPS :], third[channel * TAPS :]
        p0, p1, p2, p3, p4, p5, p6, p7, p8 = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8]
        q0, q1, q2, q3, q4, q5, q6, q7, q8 = q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], q[8]
        t0, t1, t2, t3, t4, t5, t6, t7, t8 = t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8]
        a = lines[channel * plane :]
        b, c = a[pitch:], a[2 * pitch :]
        for i in range(length):
            # One x at a time: 27 weights, three sums and this x are 31 vectors; AVX-512 has 32 registers.
            x = a[i]
            y0, y1, y2 = first_total[i] + p0 * x, second_total[i] + q0 * x, third_total[i] + t0 * x
            x = a[i + 1]
            y0, y1, y2 = y0 + p1 * x, y1 + q1 * x, y2 + t1 * x
            x = a[i + 2]
            y0, y1, y2 = y0 + p2 * x, y1 + q2 * x, y2 + t2 * x
            x = b[i]
            y0, y1, y2 = y0 + p3 * x, y1 + q3 * x, y2 + t3 * x
            x = b[i + 1]
            y0, y1, y2 = y0 + p4 * x, y1 + q4 * x, y2 + t4 * x
            x = b[i + 2]
            y0, y1, y2 = y0 + p5 * x, y1 + q5 * x, y2 + t5 * x
            x = c[i]
            y0, y1, y2 = y0 + p6 * x, y1 + q6 * x, y2 + t6 * x
            x = c[i + 1]
            y0, y1, y2 = y0 + p7 * x, y1 + q7 * x, y2 + t7 * x
            x = c[i + 2]
            y0, y1, y2 = y0 + p8 * x, y1 + q8 * x, y2 + t8 * x
            first_total[i], second_total[i], third_total[i] = y0, y1, y2


@njit
def forward_picture(x, w, b, y, relu, lines, scratch):
    # x (C,H,W)  w (K,C,R,S)  b (K,) or (0,)  y (K,H,W)  lines: C padded planes and VECTOR more floats
    C, H, W = x.shape
    K = y.shape[0]
    pitch = W + 1
    vectors = (H * pitch + VECTOR - 1) // VECTOR
    length = vectors * VECTOR
    pad_picture(x, lines)
    weights = w.reshape(w.size)
    totals = scratch[: 3 * length]
    for k in range(0, K, 3):
        # If fewer than three filters are left, the last one is computed again and not stored.
        first = weights[k * C * TAPS :]
        second = weights[min(k + 1, K - 1) * C * TAPS :]
        third = weights[min(k + 2, K - 1) * C * TAPS :]
        for i in range(3):
            start = b[min(k + i, K - 1)] if b.size > 0 else np.float32(0)
            for place in range(length):
                totals[i * length + place] = start
        add_channels(lines, C, (H + 2) * pitch + 2, pitch, first, second, third, vectors, totals)
        for i in range(min(3, K - k)):
            for h in range(H):
                row, total = y[k + i, h], totals[i * length + h * pitch :]
                for v in range(W):
                    # A NaN fails this comparison and stays a NaN.
                    row[v] = np.float32(0) if relu and total[v] <= np.float32(0) else total[v]


@njit(parallel=True)
def conv2d_forward_kernel(x, w, b, y, relu, lines, scratch):
    # x (N,C,H,W)  w (K,C,R,S)  b (K,) or (0,)  y (N,K,H,W)  lines, scratch (threads, floats)
    N = x.shape[0]
    threads = lines.shape[0]
    for t in prange(threads):
        for n in range(N * t // threads, N * (t + 1) // threads):
            forward_picture(x[n], w, b, y[n], relu, lines[t], scratch[t])


@njit(fastmath=SUM_MATH)
def add_tap_sums(lines, channels, pitch, dy, next_filter, length, dw, next_gradient):
    # lines: padded planes, rows of `pitch`  dy (length,), zero after each row; the second filter's at `next_filter`
    # dw (channels*9,), the second filter's at `next_gradient`: dw[k,c,r,s] += the sum over i of
    # dy[k,i] * line c[i + r*pitch + s]
    plane = length + 2 * pitch + 2
    first, second = dy, dy[next_filter:]
    for channel in range(channels):
        a = lines[channel * plane :]
        b, c = a[pitch:], a[2 * pitch :]
        sums = dw[channel * TAPS :]
        p0 = p1 = p2 = p3 = p4 = p5 = p6 = p7 = p8 = np.float32(0)
        q0 = q1 = q2 = q3 = q4 = q5 = q6 = q7 = q8 = np.float32(0)
        # No stores in this loop, so the eighteen sums stay in registers.
        for i in range(length):
            f, g = first[i], second[i]
            a0, a1, a2 = a[i], a[i + 1], a[i + 2]
            b0, b1, b2 = b[i], b[i + 1], b[i + 2]
            c0, c1, c2 = c[i], c[i + 1], c[i + 2]
            p0 += f * a0
            p1 += f * a1
            p2 += f * a2
            p3 += f * b0
            p4 += f * b1
            p5 += f * b2
            p6 += f * c0
            p7 += f * c1
            p8 += f * c2
            q0 += g * a0
            q1 += g * a1
            q2 += g * a2
            q3 += g * b0
            q4 += g * b1
            q5 += g * b2
            q6 += g * c0
            q7 += g * c1
            q8 += g * c2
        sums[0] += p0
        sums[1] += p1
        sums[2] += p2
        sums[3] += p3
        sums[4] += p4
        sums[5] += p5
        sums[6] += p6
        sums[7] += p7
        sums[8] += p8
        if next_gradient > 0:
            other = sums[next_gradient:]
            other[0] += q0
            other[1] += q1
            other[2] += q2
            other[3] += q3
            other[4] += q4
            other[5] += q5
            other[6] += q6
            other[7] += q7
            other[8] += q8


@njit
def backward_filter_picture(x, dy, lines, gradients, dw):
    # x (C,H,W)  dy (K,H,W)  dw (K*C*9 or more,): this picture is added to it  lines: C padded planes
    C, H, W = x.shape
    K = dy.shape[0]
    pitch = W + 1
    length = H * pitch
    pad_picture(x, lines)
    for k in range(0, K, 2):
        for i in range(min(2, K - k)):
            for h in range(H):
                source, target = dy[k + i, h], gradients[i * length + h * pitch :]
                for v in range(W):
                    target[v] = source[v]
                # The place of the border between two rows: a zero gradient adds nothing to the sum.
                target[W] = np.float32(0)
        next_filter = length if k + 1 < K else 0
        next_gradient = C * TAPS if k + 1 < K else 0
        add_tap_sums(lines, C, pitch, gradients, next_filter, length, dw[k * C * TAPS :], next_gradient)


@njit(parallel=True)
def conv2d_backward_filter_kernel(x, dy, lines, scratch, partials):
    # x (N,C,H,W)  dy (N,K,H,W)  lines, scratch, partials (threads, floats)
    N = x.shape[0]
    threads = lines.shape[0]
    for t in prange(threads):
        for i in range(partials.shape[1]):
            partials[t, i] = np.float32(0)
        for n in range(N * t // threads, N * (t + 1) // threads):
            backward_filter_picture(x[n], dy[n], lines[t], scratch[t], partials[t])


@njit(parallel=True, fastmath=SUM_MATH)
def conv2d_backward_bias_kernel(dy, db):
    # dy (N,K,H,W)  db (K,)
    N, K, H, W = dy.shape
    for k in prange(K):
        total = np.float32(0)
        for n in range(N):
            # One sum per plane first: adding short sums has a smaller rounding error than one long sum.
            values = dy[n, k].reshape(H * W)
            plane = np.float32(0)
            for i in range(H * W):
                plane += values[i]
            total += plane
        db[k] = total


class DirectCpu(CpuBackend):
    """V3's four convolution operations on the CPU."""

    layout = "NCHW"

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate flipped filters and, for each thread, a padded picture, output planes and a filter gradient."""
        super().prepare(architecture, batch_size)
        shapes = workspace(architecture, batch_size, "cpu", self.threads)
        self._no_bias = self.empty((0,))
        self._flipped = self.empty(shapes["flipped filters"])
        self._lines = self.empty(shapes["padded pictures"])
        self._scratch = self.empty(shapes["output planes"])
        self._partials = self.empty(shapes["filter gradient parts"])

    def conv2d_forward(self, x, w, b, y, relu):
        conv2d_forward_kernel(x, w, b, y, relu, self._lines, self._scratch)

    def conv2d_backward_data(self, dy, w, dx):
        # dx is the convolution of dy with the flipped filters.
        K, C, R, S = w.shape
        flipped = self._flipped[: w.size].reshape(C, K, R, S)
        flip_filters(w, flipped)
        conv2d_forward_kernel(dy, flipped, self._no_bias, dx, False, self._lines, self._scratch)

    def conv2d_backward_filter(self, x, dy, dw):
        conv2d_backward_filter_kernel(x, dy, self._lines, self._scratch, self._partials)
        add_partials(self._partials, dw.reshape(dw.size))

    def conv2d_backward_bias(self, dy, db):
        conv2d_backward_bias_kernel(dy, db)


make_backend = DirectCpu
