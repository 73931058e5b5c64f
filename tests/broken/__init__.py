"""Wrong backends with one mistake each; the checker must find all of them.

They derive from ``PlainBackend``, a correct backend that rounds the reference's results to float32. So the mistake in
the name of a class is its only one.
"""

from dataclasses import replace

import numpy as np

from common import reference
from common.cpu import CpuBackend
from common.operations import METHODS
from versions.v5_winograd_nhwc import winograd


class PlainBackend(CpuBackend):
    """Correct: the reference's operations, rounded to float32."""

    layout = "NCHW"

    def conv2d_forward(self, x, w, b, y, relu):
        exact = reference.conv2d_forward(x, w, b)
        y[...] = reference.relu(exact) if relu else exact

    def conv2d_backward_data(self, dy, w, dx):
        dx[...] = reference.conv2d_backward_data(dy, w)

    def conv2d_backward_filter(self, x, dy, dw):
        dw[...] = reference.conv2d_backward_filter(x, dy)

    def conv2d_backward_bias(self, dy, db):
        db[...] = reference.conv2d_backward_bias(dy)


class DeferredBackend(PlainBackend):
    """Correct: like a GPU, it only queues operations, and ``synchronize`` runs them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.queue = []
        for name in METHODS:
            setattr(self, name, self._deferred(getattr(self, name)))

    def _deferred(self, operation):
        return lambda *arguments: self.queue.append((operation, arguments))

    def synchronize(self):
        while self.queue:
            operation, arguments = self.queue.pop(0)
            operation(*arguments)


class ForgetsToSynchronise(DeferredBackend):
    """Returns before the work is done."""

    def synchronize(self):
        pass


class ReturnsZeros(PlainBackend):
    def conv2d_forward(self, x, w, b, y, relu):
        y[...] = 0


class LeavesMemoryUnwritten(PlainBackend):
    """Never writes the last row of the last picture."""

    def conv2d_backward_data(self, dy, w, dx):
        exact = reference.conv2d_backward_data(dy, w)
        dx[:-1] = exact[:-1]
        dx[-1, :, :-1] = exact[-1, :, :-1]


class ReturnsNaN(PlainBackend):
    """One NaN among correct values."""

    def conv2d_backward_filter(self, x, dy, dw):
        super().conv2d_backward_filter(x, dy, dw)
        dw[-1, -1, 1, 1] = np.nan


class SkipsTheBorder(PlainBackend):
    """Pads the result instead of the picture."""

    def conv2d_forward(self, x, w, b, y, relu):
        super().conv2d_forward(x, w, b, y, relu)
        y[:, :, 0] = y[:, :, -1] = 0
        y[:, :, :, 0] = y[:, :, :, -1] = 0


class ReluDropsNaN(PlainBackend):
    """Selects the positive values; a NaN becomes zero."""

    def conv2d_forward(self, x, w, b, y, relu):
        exact = reference.conv2d_forward(x, w, b)
        y[...] = np.where(exact > 0, exact, 0) if relu else exact


class SpreadsNaN(PlainBackend):
    """Correct for finite numbers; a NaN in one picture reaches the others."""

    def conv2d_forward(self, x, w, b, y, relu):
        super().conv2d_forward(x, w, b, y, relu)
        y[...] += 0 * x.sum()


class DropsTheBias(PlainBackend):
    def conv2d_forward(self, x, w, b, y, relu):
        super().conv2d_forward(x, w, np.zeros_like(b), y, relu)


class DropsTheBiasGradient(PlainBackend):
    def conv2d_backward_bias(self, dy, db):
        db[...] = 0


class SpoilsItsInput(PlainBackend):
    """Correct results, but the input is overwritten."""

    def conv2d_backward_data(self, dy, w, dx):
        super().conv2d_backward_data(dy, w, dx)
        dy *= np.float32(1.5)


class AccumulatesGradients(PlainBackend):
    """Adds to the previous content instead of overwriting it."""

    def conv2d_backward_filter(self, x, dy, dw):
        dw += reference.conv2d_backward_filter(x, dy).astype(np.float32)


class FlipsTheWindow(PlainBackend):
    """A convolution with flipped filters instead of a cross-correlation."""

    def conv2d_forward(self, x, w, b, y, relu):
        super().conv2d_forward(x, w[:, :, ::-1, ::-1], b, y, relu)


class IgnoresRelu(PlainBackend):
    def conv2d_forward(self, x, w, b, y, relu):
        super().conv2d_forward(x, w, b, y, False)


class RoutesTiesToTheLast(PlainBackend):
    """The last maximum of a window gets the gradient."""

    def relu_maxpool_backward(self, y, dout, dy):
        dy[...] = reference.relu_maxpool_backward(y[:, :, ::-1, ::-1], dout[:, :, ::-1, ::-1])[:, :, ::-1, ::-1]


class RoundsToHalf(PlainBackend):
    """Computes in float16 where float32 was asked for."""

    def conv2d_forward(self, x, w, b, y, relu):
        super().conv2d_forward(x.astype(np.float16), w.astype(np.float16), b, y, relu)


class ScalesTheLossWrongly(PlainBackend):
    """Forgets to divide the gradient by the batch."""

    def mse_loss(self, prediction, target, gradient, losses, step):
        super().mse_loss(prediction, target, gradient, losses, step)
        gradient *= np.float32(len(target))


class DiffersFromRunToRun(PlainBackend):
    """Within the tolerance, but two runs differ in bits, although it calls itself deterministic."""

    calls = 0

    def conv2d_backward_bias(self, dy, db):
        super().conv2d_backward_bias(dy, db)
        self.calls += 1
        db *= np.float32(1 + (self.calls % 2) * 2.0**-23)


class StopsAfterSomePictures(PlainBackend):
    """Convolves only the first five pictures of a batch: correct for the checker's small shapes."""

    def conv2d_forward(self, x, w, b, y, relu):
        super().conv2d_forward(x[:5], w, b, y[:5], relu)
        y[5:] = 0


class LeavesPicturesOutOfTheGradient(PlainBackend):
    """The filter gradient forgets the last picture of a large batch."""

    def conv2d_backward_filter(self, x, dy, dw):
        last = len(x) - (len(x) > 5)
        super().conv2d_backward_filter(x[:last], dy[:last], dw)


class UpdatesSomeParameters(PlainBackend):
    """Plain SGD, for the first thousand parameters."""

    def sgd(self, parameters, gradients, learning_rate):
        super().sgd(parameters[:1000], gradients[:1000], learning_rate)


class UpdatesGroupsOfFour(PlainBackend):
    """Plain SGD without the values that fill no group of four."""

    def sgd(self, parameters, gradients, learning_rate):
        whole = len(parameters) // 4 * 4
        super().sgd(parameters[:whole], gradients[:whole], learning_rate)


class GathersWholeBatches(PlainBackend):
    """Starts where a whole batch starts."""

    def gather_batch(self, images, order, start, x):
        super().gather_batch(images, order, start // len(x) * len(x), x)


class GathersFromTheFirstQuarter(PlainBackend):
    """Never starts later than after a quarter of the pictures."""

    def gather_batch(self, images, order, start, x):
        super().gather_batch(images, order, min(start, len(order) // 4), x)


class PoolsInHalf(PlainBackend):
    """Rounds the maxima to float16."""

    def maxpool_forward(self, y, out):
        super().maxpool_forward(y, out)
        out[...] = out.astype(np.float16)


class UpsamplesInHalf(PlainBackend):
    """Rounds to float16."""

    def upsample_forward(self, y, out):
        super().upsample_forward(y, out)
        out[...] = out.astype(np.float16)


class FusesPoolingWithoutTheLastValue(PlainBackend):
    """Its fused stage pools three of four values; its separate pooling is right."""

    def stage_forward(self, stage, x, w, b, out, kept):
        super().stage_forward(stage, x, w, b, out, kept)
        if stage.resample == "maxpool":
            y = kept["y"]
            out[...] = np.maximum(np.maximum(y[:, :, ::2, ::2], y[:, :, ::2, 1::2]), y[:, :, 1::2, ::2])


class FusesPoolingThatDropsNaN(PlainBackend):
    """Its fused stage pools with a maximum that ignores NaN; its separate pooling is right."""

    def stage_forward(self, stage, x, w, b, out, kept):
        super().stage_forward(stage, x, w, b, out, kept)
        if stage.resample == "maxpool":
            n, k, h, v = out.shape
            out[...] = np.fmax.reduce(
                kept["y"].reshape(n, k, h, 2, v, 2).transpose(0, 1, 2, 4, 3, 5).reshape(n, k, h, v, 4), -1
            )


class FusesUpsamplingShifted(PlainBackend):
    """Its fused stage upsamples one pixel too far to the right; its separate upsampling is right."""

    def stage_forward(self, stage, x, w, b, out, kept):
        super().stage_forward(stage, x, w, b, out, kept)
        if stage.resample == "upsample":
            out[...] = np.roll(out, 1, axis=3)


class BreaksItsWorkspace(PlainBackend):
    """Right once after ``prepare``; then its filter gradient forgets a row."""

    fresh = False

    def prepare(self, architecture, batch_size):
        super().prepare(architecture, batch_size)
        self.fresh = True

    def conv2d_backward_data(self, dy, w, dx):
        super().conv2d_backward_data(dy, w, dx)
        self.fresh = False

    def conv2d_backward_filter(self, x, dy, dw):
        super().conv2d_backward_filter(x, dy, dw)
        if not self.fresh:
            dw[:, :, 0] = 0


class WinogradBackend(PlainBackend):
    """Correct: Winograd's algorithm in float64, rounded to float32. It has whole stages only, with their own bound."""

    whole_stages = True
    a_t, g, b_t = (np.array(matrix, float) for matrix in (winograd.A_T, winograd.G_WHOLE, winograd.B_T))

    def stage_plan(self, stage, n):
        return replace(super().stage_plan(stage, n), error_factor=winograd.error_factor())

    def tile(self, padded, top, left):
        """The 6x6 tile of a padded batch (N,C,H+2,W+2), zero where it stands out over the edge."""
        found = padded[:, :, top : top + 6, left : left + 6]
        return np.pad(found, [(0, 0), (0, 0), (0, 6 - found.shape[2]), (0, 6 - found.shape[3])])

    def conv2d_forward(self, x, w, b, y, relu):
        u = self.g @ w.astype(float) @ self.g.T / winograd.DENOMINATOR**2
        padded = np.pad(x.astype(float), [(0, 0), (0, 0), (1, 1), (1, 1)])
        exact = np.empty(y.shape)
        for top in range(0, y.shape[2], 4):
            for left in range(0, y.shape[3], 4):
                v = self.b_t @ self.tile(padded, top, left) @ self.b_t.T
                target = exact[:, :, top : top + 4, left : left + 4]
                outputs = self.a_t @ np.einsum("kcij,ncij->nkij", u, v) @ self.a_t.T
                target[...] = outputs[:, :, : target.shape[2], : target.shape[3]]
        exact += b[:, None, None]
        y[...] = reference.relu(exact) if relu else exact


class WrongInterpolationPoint(WinogradBackend):
    """Reads the outputs at 3 instead of at 2."""

    a_t = np.array(winograd.matrices((0, 1, -1, 3, -2))[0], float)


class TileThatWraps(WinogradBackend):
    """Past the right edge a tile goes on at the left edge of the next row."""

    def tile(self, padded, top, left):
        found = super().tile(padded, top, left)
        beyond = left + 6 - padded.shape[3]
        if beyond >= 0:
            rows = min(5, padded.shape[2] - top - 1)
            found[:, :, :rows, 5 - beyond] = padded[:, :, top + 1 : top + 1 + rows, 1]
        return found


RIGHT = (PlainBackend, DeferredBackend, WinogradBackend)
WRONG = tuple(
    value
    for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, PlainBackend) and value not in RIGHT
)
