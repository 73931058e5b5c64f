"""V2 on the GPU: tiles in shared memory, outputs in registers.

The kernels, in the order to read them: ``gpu_convolution.py``, ``gpu_staging.py`` for how a tile gets into shared
memory, ``gpu_gradients.py``, and ``gpu_narrow.py`` for stages with one to three channels on one side. Functions build
a kernel for each shape of the network at its first use: with sizes known at compile time, divisions are shifts and
most guards disappear. ``plan.py`` has the tiles and chooses one for each stage. All kernels take flat arrays.
"""

from math import prod

from common.gpu import GpuBackend
from versions.v2_tiled_nhwc import plan
from versions.v2_tiled_nhwc.gpu_convolution import conv2d_kernel_for
from versions.v2_tiled_nhwc.gpu_gradients import bias_kernel_for, filter_kernel_for
from versions.v2_tiled_nhwc.gpu_narrow import few_channels_filter_kernel_for, few_outputs_kernel_for


class TiledGpu(GpuBackend):
    """V2's four convolution operations on the GPU."""

    layout = "NHWC"

    def prepare(self, architecture, batch_size):
        """Allocate the partial sums of the filter and bias gradients."""
        super().prepare(architecture, batch_size)
        shapes = plan.gpu_workspace(architecture, batch_size)
        self._partial_gradients = self.empty(shapes["partial gradients"])

    def conv2d_forward(self, x, w, b, y, relu):
        self._convolve(x, w, b, y, relu, flipped=False)

    def conv2d_backward_data(self, dy, w, dx):
        self._convolve(dy, w, w, dx, False, flipped=True)  # there is no bias, and the kernel reads none

    def _convolve(self, x, w, b, y, relu, *, flipped):
        (N, H, W, C), K = x.shape, y.shape[3]
        tile = plan.conv2d_tile(C, K, H, W)
        kernel_for = few_outputs_kernel_for if isinstance(tile, plan.FewOutputsTile) else conv2d_kernel_for
        kernel = kernel_for(tile=tile, height=H, width=W, channels=C, filters=K, flipped=flipped)
        grid = tile.pixel_tiles(N, H, W), -(-K // tile.filters)
        self.launch_grid(kernel, grid, (tile.threads,), *map(self.flat, (x, w, b, y)), relu)

    def conv2d_backward_filter(self, x, dy, dw):
        (N, H, W, C), K = x.shape, dy.shape[3]
        tile = plan.filter_tile(C, K, H, W)
        shares = plan.filter_shares(tile, N, H, W, C, K)
        x, dy, partials = (self.flat(buffer) for buffer in (x, dy, self._partial_gradients))
        if isinstance(tile, plan.FewChannelsTile):
            few, many, B, A = (x, dy, C, K) if C <= K else (dy, x, K, C)
            kernel = few_channels_filter_kernel_for(tile=tile, height=H, width=W, few=B, many=A, few_inputs=C <= K)
            grid = -(-B // tile.few), -(-A // tile.many), shares
            self.launch_grid(kernel, grid, (tile.threads,), few, many, partials, N)
        else:
            kernel = filter_kernel_for(tile=tile, height=H, width=W, channels=C, filters=K)
            grid = -(-C // tile.channels), -(-K // tile.filters), shares
            self.launch_grid(kernel, grid, (tile.threads,), x, dy, partials, N)
        self.sum_shares(partials, shares, dw)

    def conv2d_backward_bias(self, dy, db):
        K = dy.shape[3]
        pixels = prod(dy.shape[:3])
        shares = plan.bias_shares(pixels)
        threads = plan.SIZES.bias_threads
        kernel = bias_kernel_for(threads=threads, filters=K)
        partials = self.flat(self._partial_gradients)
        self.launch_grid(kernel, (-(-K // threads), shares), (threads,), self.flat(dy), partials, pixels)
        self.sum_shares(partials, shares, db)


make_backend = TiledGpu
