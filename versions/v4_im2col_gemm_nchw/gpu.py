"""V4 on the GPU: unfold a part of the batch, one cuBLAS product for each picture of the part, fold.

The column matrix of a picture is (rows, positions), and a picture is a (channels, positions) matrix as it lies in
memory. So every product is a strided batch over the pictures of a part: in forward and backward data all share the
filters (stride 0); in the filter gradient each picture gives a gradient of its own, so that the products fill a large
card, and a second kernel adds these in a fixed order. Bias, ReLU and pooling or upsampling follow a product in one
kernel. The bias gradient is two matrix-vector products with ones, the first over positions, the second over pictures.
"""

from math import prod

import numpy as np

from common.architecture import TAPS, Architecture
from common.gpu import GpuBackend, Operand
from versions.v4_im2col_gemm_nchw.gpu_kernels import finish_kernel_for, flip_filters_kernel_for, im2col_kernel_for
from versions.v4_im2col_gemm_nchw.plan import fuses_resampling, parts, workspace


class Im2colGemmGpu(GpuBackend):
    """V4's four convolution operations on the GPU, and a forward pass that ends with pooling or upsampling."""

    layout = "NCHW"

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate the workspace, whose size is bounded."""
        super().prepare(architecture, batch_size)
        shapes = workspace(architecture, batch_size, "gpu", 1)
        self._columns = self.empty(shapes["columns"])
        self._flipped = self.empty(shapes["flipped filters"])
        self._flipped_gradient = self.empty(shapes["flipped filter gradient"])
        self._bias_sums = self.empty(shapes["bias partial sums"])
        self._ones = self.upload(np.ones(shapes["ones"], np.float32))

    def stage_forward(self, stage, x, w, b, out, kept):
        if not fuses_resampling(stage):
            super().stage_forward(stage, x, w, b, out, kept)
            return
        self._convolve(x, w, b, kept.get("y", out), stage.relu, out=out, resample=stage.resample)

    def conv2d_forward(self, x, w, b, y, relu):
        self._convolve(x, w, b, y, relu)

    def conv2d_backward_data(self, dy, w, dx):
        # dx is the convolution of dy with the flipped filters.
        self._convolve(dy, w, None, dx, False)

    def conv2d_backward_filter(self, x, dy, dw):
        flip = x.shape[1] > dy.shape[1]
        narrow, wide = (dy, x) if flip else (x, dy)
        N, C, H, W = narrow.shape
        K, P = wide.shape[1], H * W
        gradient = self._flipped_gradient if flip else dw
        columns, weights = TAPS * C * P, TAPS * C * K  # of a picture
        for first, count in self._split(N, columns + weights):
            self._unfold(narrow, first, count)
            partials = count * columns  # the gradients of the pictures are stored after the columns
            self.runtime.gemm(
                K,
                TAPS * C,
                P,
                Operand(wide, first * K * P, K * P),
                Operand(self._columns, stride=columns, transposed=True),
                Operand(self._columns, partials, weights),
                batch=count,
            )
            self.sum_shares(self._columns, count, gradient, offset=partials, size=weights, accumulate=first > 0)
        if flip:
            self._flip(self._flipped_gradient, K, C, dw)

    def conv2d_backward_bias(self, dy, db):
        N, K, H, W = dy.shape
        ones = Operand(self._ones)
        # (N*K, H*W) . (H*W), then (N, K)^T . (N)
        self.runtime.gemv(N * K, H * W, Operand(dy), ones, Operand(self._bias_sums))
        self.runtime.gemv(K, N, Operand(self._bias_sums, transposed=True), ones, Operand(db))

    def _convolve(self, source, w, b, target, relu, *, out=None, resample=None):
        """Convolve source (N,C,H,W) into target (N,K,H,W); b is None for backward data, with w (C,K,3,3) flipped.

        With ``resample``, ``out`` is the target pooled or upsampled.
        """
        N, C, H, W = source.shape
        K, P, transposed = target.shape[1], H * W, b is None
        unfold = C < K or (C == K and not transposed)
        bank = w
        if unfold == transposed:
            # w is stored for folding and needed for unfolding, or the other way round.
            self._flip(w, w.shape[0], w.shape[1], self._flipped)
            bank = self._flipped
        finish = finish_kernel_for(
            height=H, width=W, filters=K, folded=not unfold, bias=not transposed, resample=resample
        )
        outputs = target if out is None else out
        rows = TAPS * min(C, K)
        for first, count in self._split(N, rows * P):
            columns, pictures = Operand(self._columns, stride=rows * P), Operand(source, first * C * P, C * P)
            if unfold:
                self._unfold(source, first, count)
                product = Operand(target, first * K * P, K * P)
                self.runtime.gemm(K, P, rows, Operand(bank), columns, product, batch=count)
            else:
                self.runtime.gemm(rows, P, C, Operand(bank, transposed=True), pictures, columns, batch=count)
            # Backward data by unfolding ends with the product.
            if not (unfold and transposed):
                threads = count * K * P // (4 if resample == "maxpool" else 1)
                self.launch(
                    finish,
                    threads,
                    self._columns,
                    self._ones if transposed else b,
                    self.flat(target),
                    self.flat(outputs),
                    first * K * P,
                    first * prod(outputs.shape[1:]),
                    count * K,
                    relu,
                )

    def _unfold(self, pictures, first, count):
        """Write the column matrices of ``count`` pictures from the ``first`` one on."""
        _, C, H, W = pictures.shape
        kernel = im2col_kernel_for(height=H, width=W)
        planes, positions = count * C, H * W
        start = first * C * positions
        self.launch(kernel, planes * positions, self.flat(pictures), start, self._columns, planes)

    def _flip(self, w, filters, channels, flipped):
        kernel = flip_filters_kernel_for(filters=filters, channels=channels)
        self.launch(kernel, filters * channels * TAPS, self.flat(w), self.flat(flipped))

    def _split(self, pictures, floats):
        """Parts of the batch for which the workspace suffices, at ``floats`` for each picture."""
        return parts(pictures, max(1, prod(self._columns.shape) // floats))


make_backend = Im2colGemmGpu
