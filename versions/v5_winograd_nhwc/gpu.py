"""V5 on the GPU: transform, one cuBLAS call for all products of a part of the batch, transform back.

Every product is a strided batch over the 36 planes, or one large product where the map is upsampled. Sums that would
leave most of a large card idle are split into shares, which the kernel after them adds in a fixed order. The sum of a
gradient over a tile is one of its 36 transformed values, that at the point (1, 1), and over a small pixel's block it is
the gradient to the products of the middle tap. So the bias gradient is a sum over one plane.
"""

from common.architecture import TAPS, Architecture
from common.gpu import GpuBackend, Operand
from versions.v5_winograd_nhwc import gpu_plan
from versions.v5_winograd_nhwc.gpu_direct import direct_filter_kernel_for, direct_forward_kernel_for
from versions.v5_winograd_nhwc.gpu_transforms import (
    column_sums_kernel_for,
    filter_gradient_kernel_for,
    filter_transform_kernel_for,
    order_taps_kernel_for,
    output_transform_kernel_for,
    sum_taps_kernel_for,
    tap_sums_kernel_for,
    tile_transform_kernel_for,
)
from versions.v5_winograd_nhwc.plan import method, stage_plan, tiles
from versions.v5_winograd_nhwc.winograd import POINTS, PRODUCTS, TILE

SUM_POINT = POINTS.index(1) * (TILE + 1)  # where both axes are evaluated at 1, which adds up a tile
MIDDLE_TAP = 4


class WinogradGpu(GpuBackend):
    """V5's stages on the GPU, forward and backward."""

    layout = "NHWC"
    stage_plan = staticmethod(stage_plan)

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate the workspace, whose size is bounded."""
        super().prepare(architecture, batch_size)
        self._space = gpu_plan.scratch(architecture, batch_size)
        shapes = gpu_plan.gpu_workspace(architecture, batch_size).values()
        self._wide, self._narrow, self._filters, self._partials = map(self.empty, shapes)

    def stage_forward(self, stage, x, w, b, out, kept):
        route = kept.get("route", out)  # without a ReLU none is written
        forward = {"unfold": self._direct_forward, "winograd": self._winograd_forward, "taps": self._taps_forward}
        forward[method(stage)](stage, *map(self.flat, (x, w, b, out, route)), x.shape[0])

    def stage_backward(self, stage, x, w, dout, kept, dw, db, dx):
        route, n = kept.get("route", dout), x.shape[0]  # without a ReLU none is read
        x, w, dout, route, dw, db = map(self.flat, (x, w, dout, route, dw, db))
        dx = dx if dx is None else self.flat(dx)
        if method(stage) == "taps":
            self._taps_backward(stage, x, w, dout, route, dw, db, dx, n)
            return
        # The gradients to the parameters come first: dx may share memory with x.
        gradients = self._direct_gradients if method(stage) == "unfold" else self._winograd_gradients
        gradients(stage, x, dout, route, dw, db, n)
        if dx is not None:
            self._winograd_data(stage, w, dout, route, dx, n)

    # Winograd's algorithm -----------------------------------------------------------------------------------------

    def _winograd_forward(self, stage, x, w, b, out, route, n):
        c, k = stage.in_channels, stage.out_channels
        values, products = self._sides(stage)
        self._transform_filters(stage, w, flipped=False)
        finish = output_transform_kernel_for(
            height=stage.height, width=stage.width, filters=k, resample=stage.resample, bias=True
        )
        for first, count in gpu_plan.parts(stage, n, self._space):
            rows = count * tiles(stage)
            self._transform("input", stage, c, None, x, x, values, first, count)
            self.runtime.gemm(
                rows, k, c,
                Operand(values, stride=rows * c),
                Operand(self._filters, stride=k * c, transposed=True),
                Operand(products, stride=rows * k),
                batch=PRODUCTS,
            )  # fmt: skip
            self.launch(finish, rows * k, products, b, out, route, first, rows * k)

    def _winograd_data(self, stage, w, dout, route, dx, n):
        """The convolution of the gradient with the flipped filters."""
        c, k = stage.in_channels, stage.out_channels
        products, values = self._sides(stage)
        self._transform_filters(stage, w, flipped=True)
        finish = output_transform_kernel_for(
            height=stage.height, width=stage.width, filters=c, resample=None, bias=False
        )
        for first, count in gpu_plan.parts(stage, n, self._space):
            rows = count * tiles(stage)
            self._transform("input", stage, k, stage.resample, dout, route, values, first, count)
            self.runtime.gemm(
                rows, c, k,
                Operand(values, stride=rows * k),
                Operand(self._filters, stride=k * c),
                Operand(products, stride=rows * c),
                batch=PRODUCTS,
            )  # fmt: skip
            self.launch(finish, rows * c, products, dx, dx, dx, first, rows * c)

    def _winograd_gradients(self, stage, x, dout, route, dw, db, n):
        c, k = stage.in_channels, stage.out_channels
        values, gradients = self._sides(stage)
        finish = filter_gradient_kernel_for(filters=k, channels=c)
        for first, count in gpu_plan.parts(stage, n, self._space):
            rows = count * tiles(stage)
            self._transform("input", stage, c, None, x, x, values, first, count)
            self._transform("gradient", stage, k, stage.resample, dout, route, gradients, first, count)
            self._sum_columns(stage, gradients, SUM_POINT * rows * k, (k, 1), rows, db, first, count)
            shares = gpu_plan.filter_shares(stage, count, self._space)
            length = rows // shares
            self.runtime.gemm(
                k, c, length,
                Operand(gradients, stride=length * k, transposed=True),
                Operand(values, stride=length * c),
                Operand(self._partials, stride=k * c),
                batch=PRODUCTS * shares,
            )  # fmt: skip
            self.launch(finish, k * c, self._partials, shares, dw, first > 0)

    def _sides(self, stage):
        """The workspace for transformed inputs and for transformed outputs."""
        wide_input = stage.in_channels >= stage.out_channels
        return (self._wide, self._narrow) if wide_input else (self._narrow, self._wide)

    def _transform_filters(self, stage, w, *, flipped):
        k, c = stage.out_channels, stage.in_channels
        kernel = filter_transform_kernel_for(filters=k, channels=c, flipped=flipped)
        self.launch(kernel, k * c, w, self._filters)

    def _transform(self, kind, stage, channels, resample, source, route, transformed, first, count):
        kernel = tile_transform_kernel_for(
            kind=kind, height=stage.height, width=stage.width, channels=channels, resample=resample
        )
        tiles_of_picture = gpu_plan.small_pixels(stage) if kind == "taps" else tiles(stage)
        values = count * tiles_of_picture * channels
        self.launch(kernel, values, source, route, transformed, first, values)

    def _sum_columns(self, stage, matrix, start, strides, rows, db, first, count):
        """The bias gradient from ``rows`` rows of a matrix; ``strides`` are those of a row and of a column."""
        k = stage.out_channels
        shares = gpu_plan.bias_shares(stage, count, self._space)
        kernel = column_sums_kernel_for(columns=k, stride=strides[1])
        self.launch(kernel, shares * k, matrix, start, strides[0], rows, shares, self._partials)
        self.sum_shares(self._partials, shares, db, accumulate=first > 0)

    # Upsampled maps -----------------------------------------------------------------------------------------------

    def _taps_forward(self, stage, x, w, b, out, route, n):
        c, k, pixels = stage.in_channels, stage.out_channels, gpu_plan.small_pixels(stage)
        filters = self._ordered_filters(stage, w)
        finish = tap_sums_kernel_for(height=stage.height, width=stage.width, filters=k, resample=stage.resample)
        for first, count in gpu_plan.parts(stage, n, self._space):
            rows = count * pixels
            source = Operand(x, first * pixels * c)
            self.runtime.gemm(rows, TAPS * k, c, source, Operand(filters, transposed=True), Operand(self._wide))
            self.launch(finish, rows * k, self._wide, b, out, route, first, rows * k)

    def _taps_backward(self, stage, x, w, dout, route, dw, db, dx, n):
        c, k, pixels = stage.in_channels, stage.out_channels, gpu_plan.small_pixels(stage)
        tap, column = gpu_plan.tap_strides(k)
        filters = self._ordered_filters(stage, w) if dx is not None else w
        for first, count in gpu_plan.parts(stage, n, self._space):
            rows = count * pixels
            self._transform("taps", stage, k, stage.resample, dout, route, self._wide, first, count)
            self._sum_columns(stage, self._wide, MIDDLE_TAP * tap, (TAPS * k, column), rows, db, first, count)
            shares = gpu_plan.filter_shares(stage, count, self._space)
            length = rows // shares
            self.runtime.gemm(
                TAPS * k, c, length,
                Operand(self._wide, stride=length * TAPS * k, transposed=True),
                Operand(x, first * pixels * c, length * c),
                Operand(self._partials, stride=TAPS * k * c),
                batch=shares,
            )  # fmt: skip
            if gpu_plan.ordered(stage):
                kernel = sum_taps_kernel_for(filters=k, channels=c)
                self.launch(kernel, TAPS * k * c, self._partials, shares, dw, first > 0)
            else:
                self.sum_shares(self._partials, shares, dw, accumulate=first > 0)
            if dx is not None:
                self._taps_data(stage, filters, dx, first, rows, n)

    def _taps_data(self, stage, filters, dx, first, rows, n):
        """The gradient to the small map, from the gradients to its products, which are in the workspace."""
        c, k = stage.in_channels, stage.out_channels
        shares = gpu_plan.data_shares(stage, n, self._space)
        length = TAPS * k // shares
        offset = first * gpu_plan.small_pixels(stage) * c
        self.runtime.gemm(
            rows, c, length,
            Operand(self._wide, stride=length, row=TAPS * k),
            Operand(filters, stride=length * c),
            Operand(dx, offset) if shares == 1 else Operand(self._partials, stride=rows * c),
            batch=shares,
        )  # fmt: skip
        if shares > 1:
            self.sum_shares(self._partials, shares, dx)

    def _ordered_filters(self, stage, w):
        """The filters in the order of the nine products of a small pixel."""
        if not gpu_plan.ordered(stage):
            return w
        k, c = stage.out_channels, stage.in_channels
        self.launch(order_taps_kernel_for(filters=k, channels=c), TAPS * k * c, w, self._filters)
        return self._filters

    # Few channels -------------------------------------------------------------------------------------------------

    def _direct_forward(self, stage, x, w, b, out, route, n):
        filters = gpu_plan.DIRECT_THREADS * gpu_plan.DIRECT_FILTERS
        grid = gpu_plan.direct_grid(stage)
        arguments = (x, w, b, out, route, grid.number(n))
        self._direct(direct_forward_kernel_for, stage, grid.blocks(n), filters, *arguments)

    def _direct_gradients(self, stage, x, dout, route, dw, db, n):
        grid = gpu_plan.direct_grid(stage)
        number, shares = grid.number(n), grid.shares(n)
        arguments = (x, dout, route, number, shares, self._partials)
        self._direct(direct_filter_kernel_for, stage, shares, gpu_plan.DIRECT_THREADS, *arguments)
        self.sum_shares(self._partials, shares, dw)
        self.sum_shares(self._partials, shares, db, offset=shares * stage.weight_count)

    def _direct(self, build, stage, blocks, filters, *arguments):
        """Launch a kernel in ``blocks`` blocks for every so many filters."""
        grid = gpu_plan.direct_grid(stage)
        kernel = build(
            height=stage.height,
            width=stage.width,
            channels=stage.in_channels,
            filters=stage.out_channels,
            resample=stage.resample,
            pieces=(grid.rows, grid.pieces, grid.windows),
            threads=gpu_plan.DIRECT_THREADS,
        )
        groups = -(-stage.out_channels // filters)
        self.launch_grid(kernel, (blocks, groups), (gpu_plan.DIRECT_THREADS,), *arguments)


make_backend = WinogradGpu
