"""V5 on the CPU: which method computes a stage, and its phases in order. The loops are in ``cpu_*.py``."""

import numpy as np

from common.architecture import TAPS, Architecture
from common.backend import Precision
from common.cpu import CpuBackend
from versions.v5_winograd_nhwc.cpu_lines import PLAIN, POOLED, ROUTED
from versions.v5_winograd_nhwc.cpu_taps import (
    add_shares,
    pack_filters,
    taps_backward_data,
    taps_backward_filter,
    taps_forward,
)  # fmt: skip
from versions.v5_winograd_nhwc.cpu_unfold import add_unfolded, unfold_backward_filter, unfold_forward
from versions.v5_winograd_nhwc.cpu_winograd import (
    accumulate_products,
    bias_gradient,
    filter_gradient,
    multiply_tiles,
    transform_back,
    transform_filters,
    transform_tiles,
)  # fmt: skip
from versions.v5_winograd_nhwc.plan import (
    filter_shares,
    method,
    padded,
    pictures_at_once,
    stage_plan,
    tiles,
    workspace,
)  # fmt: skip
from versions.v5_winograd_nhwc.winograd import PRODUCTS

FOLLOWS = {None: PLAIN, "upsample": ROUTED, "maxpool": POOLED}


class WinogradCpu(CpuBackend):
    """V5's stages on the CPU."""

    layout = "NHWC"

    def __init__(self, *, precision: Precision = "fp32", threads: int | None = None) -> None:
        """See CpuBackend."""
        super().__init__(precision=precision, threads=threads)
        self._counter = np.zeros(1, np.int64)
        self._no_bias = np.empty(0, np.float32)

    def prepare(self, architecture: Architecture, batch_size: int) -> None:
        """Allocate the workspace."""
        super().prepare(architecture, batch_size)
        shapes = workspace(architecture, batch_size, "cpu", self.threads)
        self._scratch, self._filters, self._tiles, self._products, self._partials = map(self.empty, shapes.values())
        self._scratch[...] = 0  # lanes beyond the last channel are computed too

    def stage_plan(self, stage, n):
        return stage_plan(stage, n)

    def stage_forward(self, stage, x, w, b, out, kept):
        how, route, work = FOLLOWS[stage.resample], _route(kept, out), (self._counter, self._scratch)
        if method(stage) == "unfold":
            unfold_forward(*work, x, w.reshape(len(w), -1), b, how, out, route)
        elif method(stage) == "taps":
            taps_forward(*work, pictures_at_once(stage, len(x)), x, self._packed(w), b, how, out, route)
        else:
            self._convolve(stage, x, route, PLAIN, w, out, route, b, how)

    def stage_backward(self, stage, x, w, dout, kept, dw, db, dx):
        how, route, work = FOLLOWS[stage.resample], _route(kept, dout), (self._counter, self._scratch)
        if method(stage) == "unfold":
            partials = self._shares(stage, len(x), dw.size + db.size)
            unfold_backward_filter(*work, x, dout, route, how, partials)
            add_unfolded(partials, dw.reshape(-1), db)
        elif method(stage) == "taps":
            together, packed = pictures_at_once(stage, len(x)), self._packed(w)
            partials = self._shares(stage, len(x), dw.size)
            bias_partials = self._partials[partials.size : partials.size + len(partials) * db.size]
            bias_partials = bias_partials.reshape(len(partials), -1)
            taps_backward_filter(*work, together, x, dout, route, how, partials, bias_partials)
            add_shares(self._counter, self.threads, partials, bias_partials, dw.reshape(len(w), TAPS, -1), db)
            if dx is not None:
                taps_backward_data(*work, together, dout, route, how, packed, dx)
            return
        else:
            self._filter_gradient(stage, x, dout, route, how, dw)
            rows = (-1, *dout.shape[2:])
            bias_gradient(*work, dout.reshape(rows), route.reshape(rows) if route.size else route[0], how, db)
        if dx is not None:
            # The convolution of the gradient with flipped filters.
            self._convolve(stage, dout, route, how, w, dx, route, self._no_bias, PLAIN, flip=True)

    def _convolve(self, stage, source, path, read, w, target, route, b, how, *, flip=False):
        """Winograd's algorithm from ``source``, read through ``path``, to ``target``; backward data with ``flip``."""
        filters = self._filters[: PRODUCTS * padded(w[:, 0, 0].size)].reshape(PRODUCTS, -1)
        transform_filters(self._counter, self._scratch, w, flip, filters)
        ends = stage.in_channels, stage.out_channels
        depth, width = reversed(ends) if flip else ends
        for part, rows in _groups(stage, len(source)):
            tiled, products = _rows(self._tiles, rows * depth), _rows(self._products, rows * width)
            self._transform(stage, depth, source[part], path[part], read, tiled, gradient=False)
            multiply_tiles(self._counter, self.threads, tiled, filters, not flip, rows, depth, width, products)
            shape = (stage.height, stage.width, width)
            outputs = _flat(target[part]), _flat(route[part])
            transform_back(self._counter, self._scratch, products, b, how, shape, *outputs)

    def _filter_gradient(self, stage, x, dout, route, how, dw):
        C, K = stage.in_channels, stage.out_channels
        sums = self._filters[: PRODUCTS * padded(C * K)].reshape(PRODUCTS, -1)
        for number, (part, rows) in enumerate(_groups(stage, len(x))):
            tiled, gradients = _rows(self._tiles, rows * C), _rows(self._products, rows * K)
            self._transform(stage, C, x[part], route[part], PLAIN, tiled, gradient=False)
            self._transform(stage, K, dout[part], route[part], how, gradients, gradient=True)
            accumulate_products(self._counter, self.threads, gradients, tiled, rows, K, C, sums, number > 0)
        filter_gradient(self._counter, self._scratch, sums, dw)

    def _transform(self, stage, channels, source, path, how, tiled, *, gradient):
        shape = (stage.height, stage.width, channels)
        transform_tiles(self._counter, self._scratch, _flat(source), _flat(path), how, gradient, shape, tiled)

    def _packed(self, w):
        """The filters as the products of an upsampled stage take them."""
        packed = self._filters[: w.size]
        pack_filters(self._counter, self.threads, w.reshape(len(w), TAPS, -1), packed)
        return packed

    def _shares(self, stage, n, size):
        """Room for the sums over each share of a batch of n."""
        shares = filter_shares(stage, n)
        return self._partials[: shares * size].reshape(shares, size)


def _route(kept, like):
    """The kept route; an empty array of as many pictures if there is none."""
    return kept["route"] if "route" in kept else np.empty((len(like), 0, 0, 0), np.uint8)


def _groups(stage, n):
    """The pictures that go through the phases together, and how many tiles they have."""
    together = pictures_at_once(stage, n)
    return [
        (slice(first, first + together), min(together, n - first) * tiles(stage)) for first in range(0, n, together)
    ]


def _rows(buffer, floats):
    """A part of a workspace buffer as one row a product."""
    return buffer[: PRODUCTS * padded(floats)].reshape(PRODUCTS, -1)


def _flat(pictures):
    return pictures.reshape(len(pictures), -1)


make_backend = WinogradCpu
