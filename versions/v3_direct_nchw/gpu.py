"""V3 on the GPU: planes are read directly, neighbouring lanes own neighbouring pixels, strips stay in registers.

Functions build the kernels for given strip sizes, because register arrays need sizes that are constant at compile time.
``plan.py`` has the sizes and chooses the strip for each stage. All kernels take flat arrays.
"""

import numpy as np
from numba import cuda

from common.gpu import GpuBackend
from common.gpu_jit import ALIGNMENT, BLOCK_BITS, INDEX_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v3_direct_nchw import plan

AT_ONCE = 4  # loads of a thread that are in flight together


def make_conv2d_kernel(strip, flipped):
    """Forward, or backward data if ``flipped``: a thread computes a strip of pixels for several filters.

    Backward data is a convolution from dy to dx with flipped filters: each window is rotated by 180 degrees, and C and
    K are exchanged. So C is the number of channels that the kernel reads, and K the number that it writes.
    """
    ROWS, FILTERS, CHUNK, THREADS = strip.rows, strip.filters, strip.chunk, strip.threads
    HALO_ROWS = ROWS + 2
    BANK = 9 * FILTERS  # weights of one input channel
    WEIGHTS = CHUNK * BANK
    STEP = AT_ONCE * THREADS
    TOTALS = ROWS * FILTERS

    @gpu_kernel(registers=strip.registers, ffma=0.25)
    def conv2d_kernel(x, w, b, y, N, H, W, C, K, has_bias, relu):
        # x (N,C,H,W)  w (K,C,R,S), flipped (C,K,R,S)  b (K,)  y (N,K,H,W), all flat
        # grid (blocks of strips; groups of K)  block (strips: columns fastest, then groups of rows, then pictures)
        weights = cuda.shared.array(WEIGHTS, np.float32, ALIGNMENT)  # (channel, tap, filter)
        totals = cuda.local.array(TOTALS, np.float32)
        column = cuda.local.array(HALO_ROWS, np.float32)
        taps = cuda.local.array(FILTERS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        strip_index = (cuda.blockIdx.x & BLOCK_BITS) * THREADS + t
        down = (H + ROWS - 1) // ROWS
        v = strip_index % W
        top = strip_index // W % down * ROWS
        n = strip_index // (W * down)
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        # Rows of the strip with its halo that are inside the picture; none for threads past the last picture.
        bottom = min(HALO_ROWS, H + 1 - top) if n < N else 0
        for j in range(FILTERS):
            total = np.float32(0)
            # The last group of filters can reach past K.
            if has_bias and first_filter + j < K:
                total = b[unsigned(first_filter + j)]
            for p in range(ROWS):
                totals[p * FILTERS + j] = total
        for first in range(0, C, CHUNK):
            # Neighbouring threads load neighbouring weights: taps fastest, then the next axis of w in memory.
            for begin in range(t, WEIGHTS, STEP):
                for load in range(AT_ONCE):
                    i = (begin + load * THREADS) & INDEX_BITS
                    tap = i % 9
                    c = i // BANK if flipped else i // 9 % CHUNK
                    k = i // 9 % FILTERS if flipped else i // (9 * CHUNK)
                    # The last load can reach past the group.
                    if i < WEIGHTS:
                        value = np.float32(0)
                        # Past the last channel or filter: zero.
                        if first + c < C and first_filter + k < K:
                            if flipped:
                                value = w[unsigned(((first + c) * K + first_filter + k) * 9 + 8 - tap)]
                            else:
                                value = w[unsigned(((first_filter + k) * C + first + c) * 9 + tap)]
                        weights[unsigned((c * 9 + tap) * FILTERS + k)] = value
            # All threads read what each has loaded.
            cuda.syncthreads()
            for c in range(min(CHUNK, C - first)):
                for s in range(3):
                    near = v + s - 1
                    above = ((n * C + first + c) * H + top - 1) * W + near
                    inside = np.int32(bottom if 0 <= near < W else 0)
                    for i in range(HALO_ROWS):
                        value = np.float32(0)
                        # Outside the picture is padding: zero.
                        if i < inside and (i > 0 or top > 0):
                            value = x[unsigned(above + i * W)]
                        column[i] = value
                    for r in range(3):
                        for j in range(FILTERS):
                            taps[j] = weights[unsigned((c * 9 + r * 3 + s) * FILTERS + j)]
                        for p in range(ROWS):
                            for j in range(FILTERS):
                                totals[p * FILTERS + j] += column[p + r] * taps[j]
            # No thread may load the next weights while another still reads these.
            cuda.syncthreads()
        # A NaN fails this comparison and stays a NaN.
        if relu:
            for i in range(TOTALS):
                if totals[i] <= np.float32(0):
                    totals[i] = np.float32(0)
        corner = ((n * K + first_filter) * H + top) * W + v
        plane = H * W
        # Strips can reach below the picture, blocks past the last picture, and the last group of filters past K.
        rows = np.int32(bottom - 1)
        filters = np.int32(min(FILTERS, K - first_filter))
        for j in range(FILTERS):
            for p in range(ROWS):
                if j < filters and p < rows:
                    y[unsigned(corner + j * plane + p * W)] = totals[p * FILTERS + j]

    return conv2d_kernel


def make_filter_kernel(strip):
    """Backward filter: lanes take columns of all pictures, warps groups of channels; lanes are added at the end."""
    ROWS, FILTERS, CHANNELS, THREADS = strip.rows, strip.filters, strip.channels, strip.threads
    WARP = plan.SIZES.warp
    WARPS = THREADS // WARP
    HALO_ROWS = ROWS + 2
    OUTPUTS = CHANNELS * 9  # per thread and filter
    WINDOW, TOTALS = CHANNELS * HALO_ROWS * 3, FILTERS * OUTPUTS
    PITCH = TOTALS | 1  # odd, so that the lanes write to different banks
    SUMS = THREADS * PITCH
    BLOCK_OUTPUTS = WARPS * TOTALS
    ROUNDS = -(-BLOCK_OUTPUTS // THREADS)

    @gpu_kernel(registers=strip.registers, ffma=0.25)
    def conv2d_backward_filter_kernel(x, dy, partials, N, H, W, C, K):
        # x (N,C,H,W)  dy (N,K,H,W)  partials (shares,K,C,R,S), all flat
        # grid (groups of C, groups of K, shares of the columns)  block (lanes: columns, warps: channels)
        sums = cuda.shared.array(SUMS, np.float32)  # (thread, filter, channel, tap)
        totals = cuda.local.array(TOTALS, np.float32)
        window = cuda.local.array(WINDOW, np.float32)
        gradients = cuda.local.array(FILTERS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        lane = t % WARP
        block_channel = (cuda.blockIdx.x & BLOCK_BITS) * (WARPS * CHANNELS)
        first_channel = block_channel + t // WARP * CHANNELS
        first_filter = (cuda.blockIdx.y & BLOCK_BITS) * FILTERS
        share = cuda.blockIdx.z & BLOCK_BITS
        shares = cuda.gridDim.z & BLOCK_BITS
        columns = N * W
        for i in range(TOTALS):
            totals[i] = np.float32(0)
        for index in range(share * columns // shares + lane, (share + 1) * columns // shares, WARP):
            v = index % W
            n = index // W
            for top in range(0, H, ROWS):
                bottom = H + 1 - top
                for c in range(CHANNELS):
                    for s in range(3):
                        side = v + s - 1
                        above = ((n * C + first_channel + c) * H + top - 1) * W + side
                        inside = np.int32(bottom if 0 <= side < W and first_channel + c < C else 0)
                        for i in range(HALO_ROWS):
                            value = np.float32(0)
                            # Outside the picture is padding, past the last channel nothing: zero.
                            if i < inside and (i > 0 or top > 0):
                                value = x[unsigned(above + i * W)]
                            window[(c * HALO_ROWS + i) * 3 + s] = value
                for p in range(ROWS):
                    corner = ((n * K + first_filter) * H + top + p) * W + v
                    given = np.int32(K - first_filter if p + 1 < bottom else 0)
                    for j in range(FILTERS):
                        value = np.float32(0)
                        # Past the picture's lower border or the last filter: zero.
                        if j < given:
                            value = dy[unsigned(corner + j * H * W)]
                        gradients[j] = value
                    for c in range(CHANNELS):
                        for r in range(3):
                            for s in range(3):
                                near = window[(c * HALO_ROWS + p + r) * 3 + s]
                                for j in range(FILTERS):
                                    totals[(j * CHANNELS + c) * 9 + r * 3 + s] += near * gradients[j]
        for i in range(TOTALS):
            sums[unsigned(t * PITCH + i)] = totals[i]
        # The sums of all lanes must be stored before they are added.
        cuda.syncthreads()
        for turn in range(ROUNDS):
            i = turn * THREADS + t
            own = i % TOTALS
            k = first_filter + own // OUTPUTS
            c = block_channel + i // TOTALS * CHANNELS + own % OUTPUTS // 9
            # The last round can reach past the block's outputs, the last group past the channels or the filters.
            if i < BLOCK_OUTPUTS and c < C and k < K:
                total = np.float32(0)
                for other in range(WARP):
                    total += sums[unsigned((i // TOTALS * WARP + other) * PITCH + own)]
                partials[unsigned(((share * K + k) * C + c) * 9 + own % 9)] = total

    return conv2d_backward_filter_kernel


def make_bias_kernel(threads):
    """Backward bias: a block sums one filter's planes, lanes on neighbouring pixels, then adds by repeated halving."""
    THREADS = threads
    LEVELS = THREADS.bit_length() - 1

    @gpu_kernel(registers=64)
    def conv2d_backward_bias_kernel(dy, partials, N, P, K):
        # dy (N,K,P)  partials (shares,K), both flat  grid (K, shares of the pictures)
        sums = cuda.shared.array(THREADS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        k = cuda.blockIdx.x & BLOCK_BITS
        share = cuda.blockIdx.y & BLOCK_BITS
        shares = cuda.gridDim.y & BLOCK_BITS
        total = np.float32(0)
        for n in range(share * N // shares, (share + 1) * N // shares):
            for p in range(t, P, THREADS):
                total += dy[unsigned((n * K + k) * P + p)]
        sums[unsigned(t)] = total
        for level in range(LEVELS):
            half = THREADS >> (level + 1)
            # The sums of the upper half must be complete.
            cuda.syncthreads()
            if t < half:
                sums[unsigned(t)] += sums[unsigned(t + half)]
        if t == 0:
            partials[unsigned(share * K + k)] = sums[0]

    return conv2d_backward_bias_kernel


CONV2D_KERNELS = {name: make_conv2d_kernel(strip, False) for name, strip in plan.SIZES.conv2d.items()}
FLIPPED_KERNELS = {name: make_conv2d_kernel(strip, True) for name, strip in plan.SIZES.conv2d.items()}
FILTER_KERNELS = {name: make_filter_kernel(strip) for name, strip in plan.SIZES.filter.items()}
conv2d_backward_bias_kernel = make_bias_kernel(plan.SIZES.bias_threads)


class DirectGpu(GpuBackend):
    """V3's four convolution operations on the GPU."""

    layout = "NCHW"

    def prepare(self, architecture, batch_size):
        """Allocate the partial sums of the filter and bias gradients."""
        super().prepare(architecture, batch_size)
        shapes = plan.gpu_workspace(architecture, batch_size)
        self._partial_gradients = self.empty(shapes["partial gradients"])

    def conv2d_forward(self, x, w, b, y, relu):
        self._convolve(CONV2D_KERNELS, x, w, b, y, relu)

    def conv2d_backward_data(self, dy, w, dx):
        self._convolve(FLIPPED_KERNELS, dy, w, None, dx, False)

    def _convolve(self, kernels, x, w, b, y, relu):
        (N, C, H, W), K = x.shape, y.shape[1]
        strip = plan.conv2d_strip(K, H)
        grid = strip.blocks(N, H, W), -(-K // strip.filters)
        has_bias = b is not None
        x, w, b, y = (self.flat(buffer) for buffer in (x, w, b if has_bias else w, y))
        self.launch_grid(kernels[strip.name], grid, (strip.threads,), x, w, b, y, N, H, W, C, K, has_bias, relu)

    def conv2d_backward_filter(self, x, dy, dw):
        (N, C, H, W), K = x.shape, dy.shape[1]
        strip = plan.filter_strip(C, K)
        shares = plan.filter_shares(strip, N, W, C, K)
        grid = -(-C // strip.block_channels), -(-K // strip.filters), shares
        x, dy, partials = (self.flat(buffer) for buffer in (x, dy, self._partial_gradients))
        self.launch_grid(FILTER_KERNELS[strip.name], grid, (strip.threads,), x, dy, partials, N, H, W, C, K)
        self.sum_shares(partials, shares, dw)

    def conv2d_backward_bias(self, dy, db):
        N, K, H, W = dy.shape
        shares = plan.bias_shares(N, K)
        partials = self.flat(self._partial_gradients)
        block = (plan.SIZES.bias_threads,)
        self.launch_grid(conv2d_backward_bias_kernel, (K, shares), block, self.flat(dy), partials, N, H * W, K)
        self.sum_shares(partials, shares, db)


make_backend = DirectGpu
