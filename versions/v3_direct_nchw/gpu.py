"""V3 on the GPU: planes are read directly, neighbouring lanes own neighbouring pixels, strips stay in registers.

The kernels are in ``gpu_convolution.py`` and ``gpu_gradients.py``. Functions build a kernel for each shape of the
network at its first use: with sizes known at compile time, divisions are shifts and most guards disappear.
``plan.py`` has the strips and chooses one for each stage. All kernels take flat arrays.
"""

from common.gpu import GpuBackend
from versions.v3_direct_nchw import plan
from versions.v3_direct_nchw.gpu_convolution import conv2d_kernel_for
from versions.v3_direct_nchw.gpu_gradients import bias_kernel_for, filter_kernel_for


class DirectGpu(GpuBackend):
    """V3's four convolution operations on the GPU."""

    layout = "NCHW"

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
        (N, C, H, W), K = x.shape, y.shape[1]
        strip = plan.conv2d_strip(K, H)
        kernel = conv2d_kernel_for(strip=strip, height=H, width=W, channels=C, filters=K, flipped=flipped)
        grid = strip.blocks(N, H, W), -(-K // strip.filters)
        self.launch_grid(kernel, grid, (strip.threads,), *map(self.flat, (x, w, b, y)), N, relu)

    def conv2d_backward_filter(self, x, dy, dw):
        (N, C, H, W), K = x.shape, dy.shape[1]
        strip, warp = plan.filter_strip(C, K), plan.SIZES.warp
        kernel = filter_kernel_for(strip=strip, warp=warp, height=H, width=W, channels=C, filters=K)
        shares = plan.filter_shares(strip, N, W, C, K)
        grid = -(-C // strip.block_channels(warp)), -(-K // strip.filters), shares
        x, dy, partials = (self.flat(buffer) for buffer in (x, dy, self._partial_gradients))
        self.launch_grid(kernel, grid, (strip.threads,), x, dy, partials, N)
        self.sum_shares(partials, shares, dw)

    def conv2d_backward_bias(self, dy, db):
        N, K, H, W = dy.shape
        shares = plan.bias_shares(N, K)
        threads = plan.SIZES.bias_threads
        kernel = bias_kernel_for(threads=threads, positions=H * W, filters=K)
        partials = self.flat(self._partial_gradients)
        self.launch_grid(kernel, (K, shares), (threads,), self.flat(dy), partials, N)
        self.sum_shares(partials, shares, db)


make_backend = DirectGpu
