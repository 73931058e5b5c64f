"""Backends that are wrong, one mistake each: the checker is checked against them.

They stand on ``PlainBackend``, a right one made of the reference's own operations rounded to float32, so that the
mistake named in the class is the only one.
"""

import numpy as np

from common import reference
from common.cpu import CpuBackend


class PlainBackend(CpuBackend):
    """Right: the reference's operations, rounded to float32."""

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
    """Right: like a GPU, it only queues work, and ``synchronize`` has it done."""

    OPERATIONS = (
        "conv2d_forward",
        "conv2d_backward_data",
        "conv2d_backward_filter",
        "conv2d_backward_bias",
        "gather_batch",
        "maxpool_forward",
        "relu_maxpool_backward",
        "upsample_forward",
        "relu_upsample_backward",
        "mse_loss",
        "sgd",
    )

    def __init__(self, **options):
        super().__init__(**options)
        self.queue = []
        for name in self.OPERATIONS:
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
    """One NaN among right values."""

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
    """Asks what is positive, which a NaN is not."""

    def conv2d_forward(self, x, w, b, y, relu):
        exact = reference.conv2d_forward(x, w, b)
        y[...] = np.where(exact > 0, exact, 0) if relu else exact


class SpreadsNaN(PlainBackend):
    """Right for numbers; a NaN in one picture reaches the next one."""

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
    """Right results, but the input is scaled on the way."""

    def conv2d_backward_data(self, dy, w, dx):
        super().conv2d_backward_data(dy, w, dx)
        dy *= np.float32(1.5)


class AccumulatesGradients(PlainBackend):
    """Adds to what was there instead of overwriting it."""

    def conv2d_backward_filter(self, x, dy, dw):
        dw += reference.conv2d_backward_filter(x, dy).astype(np.float32)


class FlipsTheWindow(PlainBackend):
    """A convolution in the mathematicians' sense instead of a cross-correlation."""

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
    """Within the tolerance, but not the same bits twice, though it says so."""

    calls = 0

    def conv2d_backward_bias(self, dy, db):
        super().conv2d_backward_bias(dy, db)
        self.calls += 1
        db *= np.float32(1 + (self.calls % 2) * 2.0**-23)


class StopsAfterSomePictures(PlainBackend):
    """Convolves the first five pictures of a batch only: right wherever the checker's small shapes look."""

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


RIGHT = (PlainBackend, DeferredBackend)
WRONG = tuple(
    value
    for value in list(globals().values())
    if isinstance(value, type) and issubclass(value, PlainBackend) and value not in RIGHT
)
