"""One operation of a training step, made ready to be called and checked: the same case for the checker and the clock.

A case fills the outputs with NaN, calls the operation once or as often as a timing needs, and then compares what the
outputs hold with the float64 reference, and the inputs with what they were. Inputs are random, with a mean away from
zero so that a wrong border or a missing bias cannot hide among cancelling terms.

A batch can repeat a few distinct pictures in random order. The reference then computes only those few, and every value
of every picture is still compared; a sum over the batch is the sum over the distinct pictures, each as often as it
occurs. Each picture of the batch has memory of its own, so caches gain nothing from the repetition.

Operations that the network runs in place (the gradients through pooling and upsampling, the loss's gradient) write to a
buffer of their own here: in place they would find other inputs at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common import reference
from common.architecture import TAPS, Architecture, Stage
from common.backend import Backend, Buffer, activation_shape, filter_shape, from_canonical, to_canonical
from common.checks import EXACT, UNIT_ROUNDOFF, Check, check_close, check_that, sum_tolerance
from common.operations import WHOLE_STEP, Operation, OperationWork

DISTINCT = 4  # pictures that a timed batch repeats
LEARNING_RATE = 2.0**-10  # about the default, 0.001, and exact in float32
INPUTS = "inputs"  # name of the check that no input changed
LOSSES, LOSS_STEP = 4, 2  # length of the buffer of losses, and the index of this step


@dataclass(frozen=True)
class Case:
    """Something to check or to time."""

    call: Callable[[], None]
    """Does it once; on a GPU it is only queued."""
    poison: Callable[[], None]
    """Fills every output with NaN."""
    check: Callable[[], list[Check]]
    """Waits, and judges what the calls since ``poison`` have left."""
    read: Callable[[], list[np.ndarray]] = list
    """Copies the outputs; nothing where they differ from call to call."""


def operation_case(
    backend: Backend,
    architecture: Architecture,
    work: OperationWork,
    batch_size: int,
    rng: np.random.Generator,
    *,
    distinct: int = DISTINCT,
    prepare: bool = True,
) -> Case:
    """Prepare ``backend`` for the network, and the operands of one of its operations for ``batch_size`` pictures.

    Without ``prepare`` the backend keeps the workspace that it was given for the same network and batch before.
    Raises ValueError for an operation that the network does not have.
    """
    stages = {stage.name: stage for stage in architecture.stages}
    operands = _Operands(backend, batch_size, min(distinct, batch_size), rng)
    if prepare:
        backend.prepare(architecture, batch_size)
    if work.stage == WHOLE_STEP and work.operation in _STEP_CASES:
        return _STEP_CASES[work.operation](operands, architecture)
    if work.stage in stages and work.operation in _STAGE_CASES:
        return _STAGE_CASES[work.operation](operands, stages[work.stage])
    raise ValueError(f"{work.id} is no operation of this network")


class _Operands:
    """Makes operands, and remembers those that must not change."""

    def __init__(self, backend: Backend, batch_size: int, distinct: int, rng: np.random.Generator) -> None:
        self.backend = backend
        self.rng = rng
        # Every distinct picture comes at least once.
        self.which = rng.permutation(
            np.concatenate([np.arange(distinct), rng.integers(0, distinct, batch_size)])[:batch_size]
        )
        """The distinct picture that each picture of the batch repeats."""
        self.counts = np.bincount(self.which, minlength=distinct).astype(np.float64)
        self._inputs: list[tuple[Buffer, np.ndarray, np.ndarray | None]] = []

    def normal(self, shape: tuple[int, ...], mean: float = 0.0) -> np.ndarray:
        """Random float32."""
        return self.rng.standard_normal(shape, np.float32) + np.float32(mean)

    def batch(self, shape: tuple[int, int, int], mean: float = 0.0) -> tuple[np.ndarray, Buffer]:
        """Distinct random pictures (D, C, H, W), and a batch of them on the device."""
        return self._batch_of(self.normal((len(self.counts), *shape), mean))

    def rectified(self, shape: tuple[int, int, int]) -> tuple[np.ndarray, Buffer]:
        """Like ``batch``, but what a ReLU could give; half of the pooling windows are rounded, so maxima are equal."""
        channels, height, width = shape
        base = np.maximum(self.normal((len(self.counts), *shape)), 0)
        rounded = self.rng.random((len(self.counts), channels, -(-height // 2), -(-width // 2))) < 0.5
        rounded = rounded.repeat(2, axis=2).repeat(2, axis=3)[:, :, :height, :width]
        return self._batch_of(np.where(rounded, np.round(4 * base) / 4, base))

    def _batch_of(self, base: np.ndarray) -> tuple[np.ndarray, Buffer]:
        laid = from_canonical(base, self.backend.layout)
        buffer = self.backend.upload(laid[self.which])
        self._inputs.append((buffer, laid, self.which))
        return base, buffer

    def given(self, array: np.ndarray) -> Buffer:
        """An input on the device as it is: filters in the backend's layout, a vector, bytes."""
        buffer = self.backend.upload(array)
        self._inputs.append((buffer, array, None))
        return buffer

    def filters(self, stage: Stage) -> tuple[np.ndarray, Buffer]:
        """Random filters, canonical and on the device."""
        w = self.normal((stage.out_channels, stage.in_channels, 3, 3), 0.2)
        return w, self.given(from_canonical(w, self.backend.layout))

    def activations(self, channels: int, height: int, width: int) -> Buffer:
        """An output buffer for the batch."""
        return self.backend.empty(activation_shape(self.backend.layout, len(self.which), channels, height, width))

    def case(self, call: Callable[[], None], outputs: Sequence[Buffer], judge: Callable[[], list[Check]]) -> Case:
        """Put the case together, its outputs poisoned; ``judge`` compares them."""

        def poison() -> None:
            self.backend.synchronize()
            for buffer in outputs:
                self.backend.write(buffer, np.full(buffer.shape, np.nan, np.float32))

        def read() -> list[np.ndarray]:
            self.backend.synchronize()
            return [self.backend.read(buffer) for buffer in outputs]

        def check() -> list[Check]:
            self.backend.synchronize()
            return [*judge(), self._check_inputs()]

        poison()
        return Case(call, poison, check, read)

    def check_batch(
        self, name: str, buffer: Buffer, expected: np.ndarray, tolerance: np.ndarray | float
    ) -> list[Check]:
        """Compare each picture of a batch with the distinct one that it has to be."""
        return [check_batch(name, self.backend, buffer, expected, tolerance, self.which)]

    def _check_inputs(self) -> Check:
        changed = sum(not self._kept(*entry) for entry in self._inputs)
        return check_that(INPUTS, not changed, f"{changed} of {len(self._inputs)} inputs changed")

    def _kept(self, buffer: Buffer, array: np.ndarray, which: np.ndarray | None) -> bool:
        now = self.backend.read(buffer)
        if which is None:
            return np.array_equal(now, array)
        return all(np.array_equal(picture, array[i]) for picture, i in zip(now, which, strict=True))


def check_batch(
    name: str,
    backend: Backend,
    buffer: Buffer,
    expected: np.ndarray,
    tolerance: np.ndarray | float,
    which: np.ndarray,
) -> Check:
    """Compare a batch on the device with ``expected[which]``, canonical, a picture at a time to save memory."""
    tolerance = np.broadcast_to(tolerance, expected.shape)
    worst = 0.0
    for n, (picture, i) in enumerate(zip(backend.read(buffer), which, strict=True)):
        actual = to_canonical(picture[None], backend.layout)
        check = check_close(name, actual, expected[i : i + 1], tolerance[i : i + 1])
        if not check.passed:
            return replace(check, detail=f"picture {n}: {check.detail}")
        worst = max(worst, check.worst)
    return Check(name, True, worst)


# Operations of a stage ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Convolution:
    """The operands of a stage's convolution on the device, and what it has to give."""

    operands: tuple[Buffer, Buffer, Buffer]
    """x, w and b."""
    y: Buffer
    expected: Callable[[], tuple[np.ndarray, np.ndarray]]
    """y, after the ReLU if the stage has one, and its tolerance."""


def _convolution(operands: _Operands, stage: Stage) -> _Convolution:
    x, x_buffer = operands.batch((stage.in_channels, stage.height, stage.width), 0.3)
    w, w_buffer = operands.filters(stage)
    b = operands.normal((stage.out_channels,))
    b_buffer = operands.given(b)
    y = operands.activations(stage.out_channels, stage.height, stage.width)

    def expected() -> tuple[np.ndarray, np.ndarray]:
        exact = reference.conv2d_forward(x, w, b)
        magnitude = reference.conv2d_forward(abs(x), abs(w), abs(b))
        tolerance = sum_tolerance(TAPS * stage.in_channels + 1, magnitude, operands.backend.precision)
        return (reference.relu(exact) if stage.relu else exact), tolerance

    return _Convolution((x_buffer, w_buffer, b_buffer), y, expected)


def _forward(operands: _Operands, stage: Stage) -> Case:
    convolution = _convolution(operands, stage)
    y, name = convolution.y, "forward, ReLU" if stage.relu else "forward"
    return operands.case(
        lambda: operands.backend.conv2d_forward(*convolution.operands, y, stage.relu),
        [y],
        lambda: operands.check_batch(name, y, *convolution.expected()),
    )


def _stage_forward(operands: _Operands, stage: Stage) -> Case:
    """A stage as a whole, whether the version fuses it or not: what it pools or upsamples is what it has written."""
    backend, convolution = operands.backend, _convolution(operands, stage)
    y = convolution.y
    out = operands.activations(stage.out_channels, stage.out_height, stage.out_width) if stage.resample else y
    resampled = {"maxpool": reference.maxpool_forward, "upsample": reference.upsample_forward}
    name = f"stage forward, {stage.resample}"

    def judge() -> list[Check]:
        checks = operands.check_batch(f"{name}: y", y, *convolution.expected())
        if stage.resample:
            written, actual = (to_canonical(backend.read(buffer), backend.layout) for buffer in (y, out))
            checks.append(check_close(name, actual, resampled[stage.resample](written), EXACT))
        return checks

    return operands.case(
        lambda: backend.stage_forward(stage, *convolution.operands, y, out),
        [y, out] if stage.resample else [y],
        judge,
    )


def _backward_data(operands: _Operands, stage: Stage) -> Case:
    backend = operands.backend
    dy, dy_buffer = operands.batch((stage.out_channels, stage.height, stage.width), 0.1)
    w, w_buffer = operands.filters(stage)
    dx = operands.activations(stage.in_channels, stage.height, stage.width)

    def judge() -> list[Check]:
        magnitude = reference.conv2d_backward_data(abs(dy), abs(w))
        tolerance = sum_tolerance(TAPS * stage.out_channels, magnitude, backend.precision)
        return operands.check_batch("backward data", dx, reference.conv2d_backward_data(dy, w), tolerance)

    return operands.case(lambda: backend.conv2d_backward_data(dy_buffer, w_buffer, dx), [dx], judge)


def _backward_filter(operands: _Operands, stage: Stage) -> Case:
    backend = operands.backend
    x, x_buffer = operands.batch((stage.in_channels, stage.height, stage.width), 0.3)
    dy, dy_buffer = operands.batch((stage.out_channels, stage.height, stage.width), 0.1)
    dw = backend.empty(filter_shape(backend.layout, stage.out_channels, stage.in_channels))

    def judge() -> list[Check]:
        weighted = dy * operands.counts[:, None, None, None]
        magnitude = reference.conv2d_backward_filter(abs(x), abs(weighted))
        tolerance = sum_tolerance(len(operands.which) * stage.height * stage.width, magnitude, backend.precision)
        actual = to_canonical(backend.read(dw), backend.layout)
        return [check_close("backward filter", actual, reference.conv2d_backward_filter(x, weighted), tolerance)]

    return operands.case(lambda: backend.conv2d_backward_filter(x_buffer, dy_buffer, dw), [dw], judge)


def _backward_bias(operands: _Operands, stage: Stage) -> Case:
    backend = operands.backend
    dy, dy_buffer = operands.batch((stage.out_channels, stage.height, stage.width), 0.1)
    db = backend.empty((stage.out_channels,))

    def judge() -> list[Check]:
        weighted = dy * operands.counts[:, None, None, None]
        length = len(operands.which) * stage.height * stage.width
        tolerance = sum_tolerance(length, reference.conv2d_backward_bias(abs(weighted)), backend.precision)
        return [check_close("backward bias", backend.read(db), reference.conv2d_backward_bias(weighted), tolerance)]

    return operands.case(lambda: backend.conv2d_backward_bias(dy_buffer, db), [db], judge)


def _maxpool(operands: _Operands, stage: Stage) -> Case:
    y, y_buffer = operands.rectified((stage.out_channels, stage.height, stage.width))
    out = operands.activations(stage.out_channels, stage.out_height, stage.out_width)
    return operands.case(
        lambda: operands.backend.maxpool_forward(y_buffer, out),
        [out],
        lambda: operands.check_batch("max-pool", out, reference.maxpool_forward(y), EXACT),
    )


def _maxpool_backward(operands: _Operands, stage: Stage) -> Case:
    y, y_buffer = operands.rectified((stage.out_channels, stage.height, stage.width))
    dout, dout_buffer = operands.batch((stage.out_channels, stage.out_height, stage.out_width))
    dy = operands.activations(stage.out_channels, stage.height, stage.width)
    return operands.case(
        lambda: operands.backend.relu_maxpool_backward(y_buffer, dout_buffer, dy),
        [dy],
        lambda: operands.check_batch("max-pool backward, ties", dy, reference.relu_maxpool_backward(y, dout), EXACT),
    )


def _upsample(operands: _Operands, stage: Stage) -> Case:
    y, y_buffer = operands.rectified((stage.out_channels, stage.height, stage.width))
    out = operands.activations(stage.out_channels, stage.out_height, stage.out_width)
    return operands.case(
        lambda: operands.backend.upsample_forward(y_buffer, out),
        [out],
        lambda: operands.check_batch("upsample", out, reference.upsample_forward(y), EXACT),
    )


def _upsample_backward(operands: _Operands, stage: Stage) -> Case:
    y, y_buffer = operands.rectified((stage.out_channels, stage.height, stage.width))
    dout, dout_buffer = operands.batch((stage.out_channels, stage.out_height, stage.out_width))
    dy = operands.activations(stage.out_channels, stage.height, stage.width)

    def judge() -> list[Check]:
        exact = reference.relu_upsample_backward(y, dout.astype(np.float64))
        tolerance = sum_tolerance(4, reference.relu_upsample_backward(np.ones_like(y), abs(dout)))
        return operands.check_batch("upsample backward", dy, exact, tolerance)

    return operands.case(lambda: operands.backend.relu_upsample_backward(y_buffer, dout_buffer, dy), [dy], judge)


# Operations of the step -----------------------------------------------------------------------------------------------


def _gather(operands: _Operands, architecture: Architecture) -> Case:
    """A batch out of more than four times as many pictures, in random order, from a start between two batches."""
    backend, n = operands.backend, len(operands.which)
    start, count = 2 * n + 1, 4 * n + 1
    images = operands.rng.integers(0, 256, (count, *architecture.input_shape), np.uint8)
    order = operands.rng.permutation(count).astype(np.int32)
    images_buffer, order_buffer = operands.given(images), operands.given(order)
    x = operands.activations(*architecture.input_shape)

    def judge() -> list[Check]:
        expected = images[order[start : start + n]] / 255.0
        return [check_close("gather", to_canonical(backend.read(x), backend.layout), expected, UNIT_ROUNDOFF)]

    return operands.case(lambda: backend.gather_batch(images_buffer, order_buffer, start, x), [x], judge)


def _loss(operands: _Operands, architecture: Architecture) -> Case:
    backend = operands.backend
    shape = activation_shape(backend.layout, len(operands.which), *architecture.output_shape)
    prediction, target = operands.normal(shape), operands.rng.random(shape, np.float32)
    prediction_buffer, target_buffer = operands.given(prediction), operands.given(target)
    gradient, losses = backend.empty(shape), backend.empty((LOSSES,))

    def judge() -> list[Check]:
        loss, exact = reference.mse_loss(prediction.astype(np.float64), target.astype(np.float64))
        tolerance = sum_tolerance(1, 2 / target.size * (abs(prediction) + abs(target)))
        written = backend.read(losses)
        own = written[LOSS_STEP : LOSS_STEP + 1]
        others = np.delete(written, LOSS_STEP)
        return [
            check_close("loss gradient", backend.read(gradient), exact, tolerance),
            check_close("loss", own, np.array([loss]), sum_tolerance(target.size, loss)),
            check_that("loss of its own step only", bool(np.isnan(others).all()), "another step's loss was written"),
        ]

    return operands.case(
        lambda: backend.mse_loss(prediction_buffer, target_buffer, gradient, losses, LOSS_STEP),
        [gradient, losses],
        judge,
    )


def _sgd(operands: _Operands, architecture: Architecture) -> Case:
    """The one operation that must be in place: its calls are counted, and the parameters must have moved as often.

    Each subtraction may round by half a unit, and always the same way; so the tolerance grows with the calls.
    """
    backend = operands.backend
    count = architecture.parameter_count | 1  # odd, so that no group of values comes out even
    start, gradients = operands.normal((count,)), operands.normal((count,))
    parameters, gradients_buffer = backend.upload(start), operands.given(gradients)
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        backend.sgd(parameters, gradients_buffer, LEARNING_RATE)

    def restore() -> None:
        nonlocal calls
        backend.synchronize()
        backend.write(parameters, start)
        calls = 0

    def judge() -> list[Check]:
        moved = calls * LEARNING_RATE * gradients.astype(np.float64)
        tolerance = 2 * (calls + 1) * UNIT_ROUNDOFF * (abs(start) + abs(moved)) + EXACT
        return [check_close("SGD", backend.read(parameters), start - moved, tolerance)]

    case = operands.case(call, [parameters], judge)
    restore()
    return replace(case, poison=restore)


_STAGE_CASES: dict[str, Callable[[_Operands, Stage], Case]] = {
    Operation.FORWARD: _forward,
    Operation.STAGE_FORWARD: _stage_forward,
    Operation.BACKWARD_DATA: _backward_data,
    Operation.BACKWARD_FILTER: _backward_filter,
    Operation.BACKWARD_BIAS: _backward_bias,
    Operation.MAXPOOL: _maxpool,
    Operation.MAXPOOL_BACKWARD: _maxpool_backward,
    Operation.UPSAMPLE: _upsample,
    Operation.UPSAMPLE_BACKWARD: _upsample_backward,
}
_STEP_CASES: dict[str, Callable[[_Operands, Architecture], Case]] = {
    Operation.GATHER: _gather,
    Operation.LOSS: _loss,
    Operation.SGD: _sgd,
}
