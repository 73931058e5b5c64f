"""V2 on the GPU: tiles in shared memory, outputs in registers.

Functions build the kernels for given tile sizes, because shared and register arrays need sizes that are constant at
compile time: ``gpu_convolution.py`` for forward and backward data, ``gpu_filter.py`` for the filter gradient.
``plan.py`` has the sizes and chooses the tile for each stage. All kernels take flat arrays.
"""

from math import prod

import numpy as np
from numba import cuda

from common.gpu import GpuBackend
from common.gpu_jit import BLOCK_BITS, THREAD_BITS, gpu_kernel, unsigned
from versions.v2_tiled_nhwc import plan
from versions.v2_tiled_nhwc.gpu_convolution import make_conv2d_kernel, make_few_outputs_kernel
from versions.v2_tiled_nhwc.gpu_filter import make_few_channels_filter_kernel, make_filter_kernel


def make_bias_kernel(threads):
    """Backward bias: neighbouring lanes sum neighbouring filters, the rows of lanes neighbouring pixels."""
    THREADS = threads

    @gpu_kernel(registers=40)
    def conv2d_backward_bias_kernel(dy, partials, pixels, K):
        # dy (pixels,K)  partials (shares,K), both flat  grid (tiles of K, shares of the pixels)
        sums = cuda.shared.array(THREADS, np.float32)
        t = cuda.threadIdx.x & THREAD_BITS
        lanes = min(K, THREADS)
        rows = THREADS // lanes
        row = t // lanes
        k = (cuda.blockIdx.x & BLOCK_BITS) * THREADS + t % lanes
        share = cuda.blockIdx.y & BLOCK_BITS
        shares = cuda.gridDim.y & BLOCK_BITS
        total = np.float32(0)
        # Threads beyond the last whole row and past the last filter add nothing.
        if row < rows and k < K:
            for p in range(share * pixels // shares + row, (share + 1) * pixels // shares, rows):
                total += dy[unsigned(p * K + k)]
        sums[unsigned(t)] = total
        # The first row reads what the others wrote.
        cuda.syncthreads()
        if row == 0 and k < K:
            for i in range(1, rows):
                total += sums[unsigned(i * lanes + t)]
            partials[unsigned(share * K + k)] = total

    return conv2d_backward_bias_kernel


CONV2D_KERNELS = {name: make_conv2d_kernel(tile, False) for name, tile in plan.SIZES.conv2d.items()}
FLIPPED_KERNELS = {name: make_conv2d_kernel(tile, True) for name, tile in plan.SIZES.conv2d.items()}
few_outputs_kernel = make_few_outputs_kernel(plan.SIZES.few_outputs, False)
flipped_few_outputs_kernel = make_few_outputs_kernel(plan.SIZES.few_outputs, True)
FILTER_KERNELS = {name: make_filter_kernel(tile) for name, tile in plan.SIZES.filter.items()}
few_inputs_filter_kernel = make_few_channels_filter_kernel(plan.SIZES.few_channels, True)
few_outputs_filter_kernel = make_few_channels_filter_kernel(plan.SIZES.few_channels, False)
conv2d_backward_bias_kernel = make_bias_kernel(plan.SIZES.bias_threads)


class TiledGpu(GpuBackend):
    """V2's four convolution operations on the GPU."""

    layout = "NHWC"

    def prepare(self, architecture, batch_size):
        """Allocate the partial sums of the filter and bias gradients."""
        super().prepare(architecture, batch_size)
        shapes = plan.gpu_workspace(architecture, batch_size)
        self._partial_gradients = self.empty(shapes["partial gradients"])

    def conv2d_forward(self, x, w, b, y, relu):
        self._convolve(CONV2D_KERNELS, few_outputs_kernel, x, w, b, y, relu)

    def conv2d_backward_data(self, dy, w, dx):
        self._convolve(FLIPPED_KERNELS, flipped_few_outputs_kernel, dy, w, None, dx, False)

    def _convolve(self, kernels, few_outputs, x, w, b, y, relu):
        (N, H, W, C), K = x.shape, y.shape[3]
        tile = plan.conv2d_tile(C, K, H, W)
        kernel = few_outputs if tile is plan.SIZES.few_outputs else kernels[tile.name]
        grid = tile.pixel_tiles(N, H, W), -(-K // tile.filters)
        has_bias = b is not None
        x, w, b, y = (self.flat(buffer) for buffer in (x, w, b if has_bias else w, y))
        self.launch_grid(kernel, grid, (tile.threads,), x, w, b, y, H, W, C, K, has_bias, relu)

    def conv2d_backward_filter(self, x, dy, dw):
        (N, H, W, C), K = x.shape, dy.shape[3]
        tile = plan.filter_tile(C, K, H, W)
        shares = plan.filter_shares(tile, N, H, W, C, K)
        x, dy, partials = (self.flat(buffer) for buffer in (x, dy, self._partial_gradients))
        if tile is not plan.SIZES.few_channels:
            kernel = FILTER_KERNELS[tile.name]
            grid = -(-C // tile.channels), -(-K // tile.filters), shares
            self.launch_grid(kernel, grid, (tile.threads,), x, dy, partials, N, H, W, C, K)
        else:
            few_inputs = C <= K
            kernel = few_inputs_filter_kernel if few_inputs else few_outputs_filter_kernel
            few, many, B, A = (x, dy, C, K) if few_inputs else (dy, x, K, C)
            grid = -(-B // tile.filters), -(-A // tile.channels), shares
            self.launch_grid(kernel, grid, (tile.threads,), few, many, partials, N, H, W, B, A)
        self.sum_shares(partials, shares, dw)

    def conv2d_backward_bias(self, dy, db):
        K = dy.shape[3]
        pixels = prod(dy.shape[:3])
        shares = plan.bias_shares(pixels)
        partials = self.flat(self._partial_gradients)
        grid = -(-K // plan.SIZES.bias_threads), shares
        self.launch_grid(
            conv2d_backward_bias_kernel, grid, (plan.SIZES.bias_threads,), self.flat(dy), partials, pixels, K
        )
        self.sum_shares(partials, shares, db)


make_backend = TiledGpu
