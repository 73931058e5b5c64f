"""A whole stage, forward or backward, made ready to be called and checked, whether a version fuses it or not.

Where a version does not hand over what the reference does (an upsampled map, for instance), its ``stage_plan`` says so
by the shape of the output, and the case follows it.

Backward, ReLU and pooling decide where a gradient goes. A decision that rounding could reverse moves a whole term,
which no tolerance for rounding should have to cover. So the gradient is zero where the reference's decision is a close
one; or all values are small integers, which makes sums exact and maxima equal. The filters are then multiples of 576:
the transforms of Winograd's algorithm divide by at most 24 along each axis, and stay exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from common import reference
from common.architecture import TAPS, Stage
from common.backend import Backend, Buffer, Precision, from_canonical, to_canonical
from common.checks import Check, check_close, sum_tolerance
from common.operands import Case, Operands
from common.plans import StagePlan, activation_shape

EXACT_UNIT = 576  # 24 * 24
RESAMPLED = {None: lambda y: y, "maxpool": reference.maxpool_forward, "upsample": reference.upsample_forward}


def takes_small_map(backend: Backend, stage: Stage) -> bool:
    """Whether the version takes this stage's input before it is upsampled."""
    if not stage.upsampled:
        return False
    before = Stage("before", 1, stage.in_channels, stage.height // 2, stage.width // 2, "upsample")
    return not _resamples(backend, before, backend.stage_plan(before, 1))


def _resamples(backend: Backend, stage: Stage, plan: StagePlan) -> bool:
    """Whether the version hands over the resampled output of the stage, as the reference does."""
    n = plan.output.shape[0]
    shape = activation_shape(backend.layout, n, stage.out_channels, stage.out_height, stage.out_width)
    return plan.output.shape == shape


def exact_forward(
    stage: Stage, x: np.ndarray, w: np.ndarray, b: np.ndarray, precision: Precision, factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The convolution of a stage and its ReLU in float64, and the tolerance of each value for an error ``factor``."""
    exact = reference.conv2d_forward(x, w, b)
    sizes = magnitude(reference.conv2d_forward, x, w, factor, abs(b))
    tolerance = factor * sum_tolerance(TAPS * stage.in_channels + 1, sizes, precision)
    return (reference.relu(exact) if stage.relu else exact), tolerance


def magnitude(
    product: Callable[..., np.ndarray], a: np.ndarray, b: np.ndarray, factor: float, *others: np.ndarray
) -> np.ndarray:
    """What the absolute values of the terms of a ``product`` add up to, as a tolerance takes it.

    A version with an error factor mixes the values of a picture's plane, and those of a filter's window, before it
    multiplies and after. Its errors are those of operands of equal size, whatever a single value is: of their root mean
    square.
    """
    direct = product(abs(a), abs(b), *others)
    if factor == 1:
        return direct
    level = [np.broadcast_to(np.sqrt((v.astype(np.float64) ** 2).mean((2, 3), keepdims=True)), v.shape) for v in (a, b)]
    return np.maximum(direct, product(*level, *others).max((2, 3), keepdims=True))


@dataclass
class _Prepared:
    """The operands of a stage on the device, and its exact forward pass."""

    x: np.ndarray
    """What the convolution sees, (D, C, H, W)."""
    w: np.ndarray
    b: np.ndarray
    inputs: tuple[Buffer, Buffer, Buffer]
    out: Buffer
    kept: dict[str, Buffer]
    plan: StagePlan
    small: bool
    """Whether the version takes the input before it is upsampled."""
    resamples: bool
    """Whether it hands over the resampled output."""

    def exact_forward(self, stage: Stage, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
        """See the function of this name."""
        return exact_forward(stage, self.x, self.w, self.b, precision, self.plan.error_factor)

    def resampled(self, stage: Stage, y: np.ndarray) -> np.ndarray:
        """The output that the version hands over."""
        return RESAMPLED[stage.resample if self.resamples else None](y)


def _prepare(operands: Operands, stage: Stage, *, integers: bool) -> _Prepared:
    backend, rng = operands.backend, operands.rng
    plan = backend.stage_plan(stage, len(operands.which))
    scale = 2 if stage.upsampled else 1
    shape = (stage.in_channels, stage.height // scale, stage.width // scale)
    filters = (stage.out_channels, stage.in_channels, 3, 3)
    if integers:
        base = (rng.random((len(operands.counts), *shape)) < 0.3).astype(np.float32)
        signs = rng.integers(-1, 2, filters) * (rng.random(filters) < 3 / stage.in_channels)
        w = (EXACT_UNIT * signs).astype(np.float32)
        b = (EXACT_UNIT * rng.integers(0, 2, stage.out_channels)).astype(np.float32)
    else:
        base, w = operands.normal((len(operands.counts), *shape), 0.3), operands.normal(filters, 0.2)
        b = operands.normal((stage.out_channels,))
    small = takes_small_map(backend, stage)
    x = reference.upsample_forward(base) if stage.upsampled else base
    _, x_buffer = operands.batch_of(base if small else x)
    inputs = (x_buffer, operands.given(from_canonical(w, backend.layout)), operands.given(b))
    kept = {name: operands.planned(buffer) for name, buffer in plan.kept.items()}
    out = operands.planned(plan.output)
    return _Prepared(x, w, b, inputs, out, kept, plan, small, _resamples(backend, stage, plan))


def stage_forward(operands: Operands, stage: Stage) -> Case:
    """The forward pass of a stage: what it hands to the next one."""
    backend, made = operands.backend, _prepare(operands, stage, integers=False)

    def judge() -> list[Check]:
        exact, tolerance = made.exact_forward(stage, backend.precision)
        expected, allowed = made.resampled(stage, exact), made.resampled(stage, tolerance)
        return operands.check_batch(f"stage forward, {stage.resample or 'linear'}", made.out, expected, allowed)

    # What is kept is unwritten at first; whether it is right shows in the backward pass.
    return operands.case(lambda: backend.stage_forward(stage, *made.inputs, made.out, made.kept), [made.out], judge)


def stage_backward(operands: Operands, stage: Stage, *, integers: bool = False) -> Case:
    """The backward pass of a stage, from the gradient to its output to those of its input, filters and biases.

    The forward pass runs before, when the outputs are poisoned. With ``integers`` maxima are often equal.
    """
    backend, made = operands.backend, _prepare(operands, stage, integers=integers)
    exact, tolerance = made.exact_forward(stage, backend.precision)
    distinct = (len(operands.counts), *made.resampled(stage, exact).shape[1:])
    gradient = operands.normal(distinct)
    if not integers:
        gradient *= _certain(stage, made, tolerance)
    _, dout = operands.batch_of(gradient)
    dw, db = backend.empty(made.inputs[1].shape), backend.empty(made.inputs[2].shape)
    dx = backend.empty(made.inputs[0].shape)
    x, w, b = made.inputs

    def forward() -> None:
        backend.stage_forward(stage, x, w, b, made.out, made.kept)

    def judge() -> list[Check]:
        # The magnitudes are those of the terms of a sum: upsampling adds four gradients, which can cancel out.
        dy, sizes = (_through_resampling(stage, made, exact, dout) for dout in (gradient, abs(gradient)))
        return _judge_gradients(operands, stage, made, dy, sizes, (dw, db, dx))

    def call() -> None:
        backend.stage_backward(stage, x, w, dout, made.kept, dw, db, dx)

    return operands.case(call, [dw, db, dx], judge, before=forward)


def _certain(stage: Stage, made: _Prepared, tolerance: np.ndarray) -> np.ndarray:
    """1 where rounding cannot reverse the decision about a value of the output, and 0 elsewhere."""
    y = reference.conv2d_forward(made.x, made.w, made.b)
    if stage.resample is None:
        return np.ones_like(y, np.float32)
    sure = abs(y) > tolerance
    if stage.resample == "maxpool":
        ordered = np.sort(reference.windows(y), axis=-1)
        allowed = reference.maxpool_forward(tolerance)
        apart = ordered[..., 3] - ordered[..., 2] > 2 * allowed
        sure = (ordered[..., 3] < -allowed) | (apart & (ordered[..., 3] > allowed))
    elif made.resamples:
        sure = reference.upsample_forward(sure)
    return sure.astype(np.float32)


def _through_resampling(stage: Stage, made: _Prepared, y: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """The exact gradient to the convolution's output."""
    dout = dout.astype(np.float64)
    if stage.resample == "maxpool":
        return reference.relu_maxpool_backward(y, dout)
    if stage.resample == "upsample" and made.resamples:
        return reference.relu_upsample_backward(y, dout)
    return dout * (y > 0) if stage.relu else dout


def _judge_gradients(
    operands: Operands,
    stage: Stage,
    made: _Prepared,
    dy: np.ndarray,
    sizes: np.ndarray,
    gradients: tuple[Buffer, Buffer, Buffer],
) -> list[Check]:
    backend, factor = operands.backend, made.plan.error_factor
    dw, db, dx = gradients
    weighted, heavy = (values * operands.counts[:, None, None, None] for values in (dy, sizes))
    length, name = len(operands.which) * stage.height * stage.width, f"stage backward, {stage.resample or 'linear'}"

    def tolerance(length: int, sizes: np.ndarray) -> np.ndarray:
        return sum_tolerance(length, sizes, backend.precision)

    filters = tolerance(length, magnitude(reference.conv2d_backward_filter, made.x, heavy, factor))
    biases = tolerance(length, reference.conv2d_backward_bias(heavy))
    data = reference.conv2d_backward_data(dy, made.w)
    reach = magnitude(reference.conv2d_backward_data, sizes, made.w, factor)
    terms = TAPS * stage.out_channels
    if made.small:
        data, reach = reference.windows(data).sum(axis=-1), reference.windows(reach).sum(axis=-1)
        terms *= 4
    actual = to_canonical(backend.read(dw), backend.layout)
    exact = reference.conv2d_backward_filter(made.x, weighted)
    return [
        check_close(f"{name}: filters", actual, exact, factor * filters),
        check_close(f"{name}: biases", backend.read(db), reference.conv2d_backward_bias(weighted), biases),
        *operands.check_batch(f"{name}: data", dx, data, factor * tolerance(terms, reach)),
    ]
