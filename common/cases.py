"""One operation of a training step, made ready to be called and checked: the same case for the checker and the clock.

A case fills the outputs with NaN, calls the operation once or as often as a timing needs, and then compares what the
outputs hold with the float64 reference, and the inputs with what they were. Whole stages are in ``stage_cases.py``.

Operations that the network runs in place (the gradients through pooling and upsampling, the loss's gradient) write to a
buffer of their own here: in place they would find other inputs at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from common import reference
from common.architecture import TAPS, Architecture, Stage
from common.backend import Backend, filter_shape, to_canonical
from common.checks import EXACT, UNIT_ROUNDOFF, Check, check_close, check_that, sum_tolerance
from common.operands import Case, Operands
from common.operations import WHOLE_STEP, Operation, OperationWork
from common.plans import activation_shape
from common.stage_cases import exact_forward, stage_backward, stage_forward

DISTINCT = 4  # pictures that a timed batch repeats
LEARNING_RATE = 2.0**-10  # about the default, 0.001, and exact in float32
LOSSES, LOSS_STEP = 4, 2  # length of the buffer of losses, and the index of this step


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
    operands = Operands(backend, batch_size, min(distinct, batch_size), rng)
    if prepare:
        backend.prepare(architecture, batch_size)
    if work.stage == WHOLE_STEP and work.operation in _STEP_CASES:
        return _STEP_CASES[work.operation](operands, architecture)
    if work.stage in stages and work.operation in _STAGE_CASES:
        return _STAGE_CASES[work.operation](operands, stages[work.stage])
    raise ValueError(f"{work.id} is no operation of this network")


# Operations of a stage ------------------------------------------------------------------------------------------------


def _forward(operands: Operands, stage: Stage) -> Case:
    x, x_buffer = operands.batch((stage.in_channels, stage.height, stage.width), 0.3)
    w, w_buffer = operands.filters(stage)
    b = operands.normal((stage.out_channels,))
    b_buffer = operands.given(b)
    y, name = operands.activations(stage.out_channels, stage.height, stage.width), "forward"

    def judge() -> list[Check]:
        exact, tolerance = exact_forward(stage, x, w, b, operands.backend.precision)
        return operands.check_batch(f"{name}, ReLU" if stage.relu else name, y, exact, tolerance)

    return operands.case(
        lambda: operands.backend.conv2d_forward(x_buffer, w_buffer, b_buffer, y, stage.relu), [y], judge
    )


def _backward_data(operands: Operands, stage: Stage) -> Case:
    backend = operands.backend
    dy, dy_buffer = operands.batch((stage.out_channels, stage.height, stage.width), 0.1)
    w, w_buffer = operands.filters(stage)
    dx = operands.activations(stage.in_channels, stage.height, stage.width)

    def judge() -> list[Check]:
        magnitude = reference.conv2d_backward_data(abs(dy), abs(w))
        tolerance = sum_tolerance(TAPS * stage.out_channels, magnitude, backend.precision)
        return operands.check_batch("backward data", dx, reference.conv2d_backward_data(dy, w), tolerance)

    return operands.case(lambda: backend.conv2d_backward_data(dy_buffer, w_buffer, dx), [dx], judge)


def _backward_filter(operands: Operands, stage: Stage) -> Case:
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


def _backward_bias(operands: Operands, stage: Stage) -> Case:
    backend = operands.backend
    dy, dy_buffer = operands.batch((stage.out_channels, stage.height, stage.width), 0.1)
    db = backend.empty((stage.out_channels,))

    def judge() -> list[Check]:
        weighted = dy * operands.counts[:, None, None, None]
        length = len(operands.which) * stage.height * stage.width
        tolerance = sum_tolerance(length, reference.conv2d_backward_bias(abs(weighted)), backend.precision)
        return [check_close("backward bias", backend.read(db), reference.conv2d_backward_bias(weighted), tolerance)]

    return operands.case(lambda: backend.conv2d_backward_bias(dy_buffer, db), [db], judge)


def _maxpool(operands: Operands, stage: Stage) -> Case:
    y, y_buffer = operands.rectified((stage.out_channels, stage.height, stage.width))
    out = operands.activations(stage.out_channels, stage.out_height, stage.out_width)
    return operands.case(
        lambda: operands.backend.maxpool_forward(y_buffer, out),
        [out],
        lambda: operands.check_batch("max-pool", out, reference.maxpool_forward(y), EXACT),
    )


def _maxpool_backward(operands: Operands, stage: Stage) -> Case:
    y, y_buffer = operands.rectified((stage.out_channels, stage.height, stage.width))
    dout, dout_buffer = operands.batch((stage.out_channels, stage.out_height, stage.out_width))
    dy = operands.activations(stage.out_channels, stage.height, stage.width)
    return operands.case(
        lambda: operands.backend.relu_maxpool_backward(y_buffer, dout_buffer, dy),
        [dy],
        lambda: operands.check_batch("max-pool backward, ties", dy, reference.relu_maxpool_backward(y, dout), EXACT),
    )


def _upsample(operands: Operands, stage: Stage) -> Case:
    y, y_buffer = operands.rectified((stage.out_channels, stage.height, stage.width))
    out = operands.activations(stage.out_channels, stage.out_height, stage.out_width)
    return operands.case(
        lambda: operands.backend.upsample_forward(y_buffer, out),
        [out],
        lambda: operands.check_batch("upsample", out, reference.upsample_forward(y), EXACT),
    )


def _upsample_backward(operands: Operands, stage: Stage) -> Case:
    y, y_buffer = operands.rectified((stage.out_channels, stage.height, stage.width))
    dout, dout_buffer = operands.batch((stage.out_channels, stage.out_height, stage.out_width))
    dy = operands.activations(stage.out_channels, stage.height, stage.width)

    def judge() -> list[Check]:
        exact = reference.relu_upsample_backward(y, dout.astype(np.float64))
        tolerance = sum_tolerance(4, reference.relu_upsample_backward(np.ones_like(y), abs(dout)))
        return operands.check_batch("upsample backward", dy, exact, tolerance)

    return operands.case(lambda: operands.backend.relu_upsample_backward(y_buffer, dout_buffer, dy), [dy], judge)


# Operations of the step -----------------------------------------------------------------------------------------------


def _gather(operands: Operands, architecture: Architecture) -> Case:
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


def _loss(operands: Operands, architecture: Architecture) -> Case:
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


def _sgd(operands: Operands, architecture: Architecture) -> Case:
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


_STAGE_CASES: dict[str, Callable[[Operands, Stage], Case]] = {
    Operation.FORWARD: _forward,
    Operation.STAGE_FORWARD: stage_forward,
    Operation.STAGE_BACKWARD: stage_backward,
    Operation.BACKWARD_DATA: _backward_data,
    Operation.BACKWARD_FILTER: _backward_filter,
    Operation.BACKWARD_BIAS: _backward_bias,
    Operation.MAXPOOL: _maxpool,
    Operation.MAXPOOL_BACKWARD: _maxpool_backward,
    Operation.UPSAMPLE: _upsample,
    Operation.UPSAMPLE_BACKWARD: _upsample_backward,
}
_STEP_CASES: dict[str, Callable[[Operands, Architecture], Case]] = {
    Operation.GATHER: _gather,
    Operation.LOSS: _loss,
    Operation.SGD: _sgd,
}
