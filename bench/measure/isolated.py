"""One operation of a training step, made ready to be timed alone and checked afterwards.

What is timed is what is checked: the outputs are filled with NaN, the operation is called as often as the timing needs,
and then what lies in its outputs is compared with the float64 reference, and its inputs with what they were. Tolerances
are those of ``common/verify.py``.

A batch repeats a few pictures in random order. The reference then has only those few to compute, and every value of
every picture is still compared; a sum over the batch is the few pictures' sums, each as often as it occurs. Each
picture of the batch has memory of its own, so caches gain nothing from it.

Operations that the network runs in place (the gradients through pooling and upsampling, the loss's gradient) write to a
buffer of their own here: in place they would find other inputs at each call. The backend is prepared for the whole
network, and so has the workspace that it has in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common import reference
from common.architecture import TAPS, Architecture, Stage
from common.backend import Backend, Buffer, activation_shape, filter_shape, from_canonical, to_canonical
from common.operations import WHOLE_STEP, Operation
from common.verify import UNIT_ROUNDOFF, Check, compare, holds, sum_tolerance

DISTINCT = 4  # pictures that a batch repeats
EXACT = float(np.finfo(np.float32).tiny)
LEARNING_RATE = 2.0**-10  # about the default, 0.001, and the same in float32


@dataclass(frozen=True)
class Isolated:
    """Something to time. ``call`` does it once (on a GPU it is only asked for), ``poison`` spoils every output with
    NaN, and ``check`` waits and judges what the calls since then have left.
    """

    call: Callable[[], None]
    poison: Callable[[], None]
    check: Callable[[], list[Check]]


# Single operations --------------------------------------------------------------------------------------------------


def isolate(
    backend: Backend, architecture: Architecture, operation: Operation, batch_size: int, rng: np.random.Generator
) -> Isolated:
    """Prepare ``backend`` and the operands of one of ``common.operations.step_operations`` for ``batch_size`` pictures.

    Raises ValueError for an operation that is not one of them.
    """
    stages = {stage.name: stage for stage in architecture.stages}
    backend.prepare(architecture, batch_size)
    workbench = _Workbench(backend, batch_size, rng)
    if operation.stage == WHOLE_STEP and operation.name in _OF_THE_STEP:
        return _OF_THE_STEP[operation.name](workbench, architecture)
    if operation.stage in stages and operation.name in _OF_A_STAGE:
        return _OF_A_STAGE[operation.name](workbench, stages[operation.stage])
    raise ValueError(f"{operation.id} is no operation of this network")


class _Workbench:
    """Makes operands, and remembers those that must not change."""

    def __init__(self, backend: Backend, batch_size: int, rng: np.random.Generator) -> None:
        self.backend = backend
        self.rng = rng
        self.which = rng.integers(0, min(DISTINCT, batch_size), batch_size)
        """The picture, among the distinct ones, that each of the batch repeats."""
        self.counts = np.bincount(self.which, minlength=min(DISTINCT, batch_size)).astype(np.float64)
        self._inputs: list[tuple[Buffer, np.ndarray, np.ndarray | None]] = []

    def normal(self, shape: tuple[int, ...], mean: float = 0.0) -> np.ndarray:
        """Random float32; a mean away from zero keeps a mistake from hiding among cancelling terms."""
        return self.rng.standard_normal(shape, np.float32) + np.float32(mean)

    def batch(self, shape: tuple[int, int, int], mean: float = 0.0, *, relu: bool = False) -> tuple[np.ndarray, Buffer]:
        """Distinct random pictures (D, C, H, W), and a batch of them on the device."""
        base = self.normal((len(self.counts), *shape), mean)
        base = np.maximum(base, 0) if relu else base
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

    def isolated(
        self, call: Callable[[], None], outputs: Sequence[Buffer], judge: Callable[[], list[Check]]
    ) -> Isolated:
        """Put together; ``judge`` compares the outputs."""

        def poison() -> None:
            self.backend.synchronize()
            for buffer in outputs:
                self.backend.write(buffer, np.full(buffer.shape, np.nan, np.float32))

        def check() -> list[Check]:
            self.backend.synchronize()
            return [*judge(), self._inputs_kept()]

        poison()
        return Isolated(call, poison, check)

    def pictures_equal(
        self, name: str, buffer: Buffer, expected: np.ndarray, tolerance: np.ndarray | float
    ) -> list[Check]:
        """Compare each picture of a batch with the distinct one that it has to be."""
        return [compare_pictures(name, self.backend, buffer, expected, tolerance, self.which)]

    def _inputs_kept(self) -> Check:
        changed = sum(not self._kept(*entry) for entry in self._inputs)
        return holds("inputs", not changed, f"{changed} of {len(self._inputs)} inputs changed")

    def _kept(self, buffer: Buffer, array: np.ndarray, which: np.ndarray | None) -> bool:
        now = self.backend.read(buffer)
        if which is None:
            return np.array_equal(now, array)
        return all(np.array_equal(picture, array[i]) for picture, i in zip(now, which, strict=True))


def compare_pictures(
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
        check = compare(name, actual, expected[i : i + 1], tolerance[i : i + 1])
        if not check.passed:
            return replace(check, detail=f"picture {n}: {check.detail}")
        worst = max(worst, check.worst)
    return Check(name, True, worst)


def _forward(bench: _Workbench, stage: Stage) -> Isolated:
    backend = bench.backend
    x, x_buffer = bench.batch((stage.in_channels, stage.height, stage.width), 0.3)
    w, w_buffer = bench.filters(stage)
    b = bench.normal((stage.out_channels,))
    b_buffer = bench.given(b)
    y = bench.activations(stage.out_channels, stage.height, stage.width)

    def judge() -> list[Check]:
        exact = reference.conv2d_forward(x, w, b)
        magnitude = reference.conv2d_forward(abs(x), abs(w), abs(b))
        tolerance = sum_tolerance(TAPS * stage.in_channels + 1, magnitude, backend.math)
        return bench.pictures_equal("forward", y, reference.relu(exact) if stage.relu else exact, tolerance)

    return bench.isolated(lambda: backend.conv2d_forward(x_buffer, w_buffer, b_buffer, y, stage.relu), [y], judge)


def _backward_data(bench: _Workbench, stage: Stage) -> Isolated:
    backend = bench.backend
    dy, dy_buffer = bench.batch((stage.out_channels, stage.height, stage.width), 0.1)
    w, w_buffer = bench.filters(stage)
    dx = bench.activations(stage.in_channels, stage.height, stage.width)

    def judge() -> list[Check]:
        magnitude = reference.conv2d_backward_data(abs(dy), abs(w))
        tolerance = sum_tolerance(TAPS * stage.out_channels, magnitude, backend.math)
        return bench.pictures_equal("backward data", dx, reference.conv2d_backward_data(dy, w), tolerance)

    return bench.isolated(lambda: backend.conv2d_backward_data(dy_buffer, w_buffer, dx), [dx], judge)


def _backward_filter(bench: _Workbench, stage: Stage) -> Isolated:
    backend = bench.backend
    x, x_buffer = bench.batch((stage.in_channels, stage.height, stage.width), 0.3)
    dy, dy_buffer = bench.batch((stage.out_channels, stage.height, stage.width), 0.1)
    dw = backend.empty(filter_shape(backend.layout, stage.out_channels, stage.in_channels))

    def judge() -> list[Check]:
        weighted = dy * bench.counts[:, None, None, None]
        magnitude = reference.conv2d_backward_filter(abs(x), abs(weighted))
        tolerance = sum_tolerance(len(bench.which) * stage.height * stage.width, magnitude, backend.math)
        actual = to_canonical(backend.read(dw), backend.layout)
        return [compare("backward filter", actual, reference.conv2d_backward_filter(x, weighted), tolerance)]

    return bench.isolated(lambda: backend.conv2d_backward_filter(x_buffer, dy_buffer, dw), [dw], judge)


def _backward_bias(bench: _Workbench, stage: Stage) -> Isolated:
    backend = bench.backend
    dy, dy_buffer = bench.batch((stage.out_channels, stage.height, stage.width), 0.1)
    db = backend.empty((stage.out_channels,))

    def judge() -> list[Check]:
        weighted = dy * bench.counts[:, None, None, None]
        length = len(bench.which) * stage.height * stage.width
        tolerance = sum_tolerance(length, reference.conv2d_backward_bias(abs(weighted)), backend.math)
        return [compare("backward bias", backend.read(db), reference.conv2d_backward_bias(weighted), tolerance)]

    return bench.isolated(lambda: backend.conv2d_backward_bias(dy_buffer, db), [db], judge)


def _maxpool(bench: _Workbench, stage: Stage) -> Isolated:
    y, y_buffer = bench.batch((stage.out_channels, stage.height, stage.width), relu=True)
    out = bench.activations(stage.out_channels, stage.out_height, stage.out_width)
    return bench.isolated(
        lambda: bench.backend.maxpool_forward(y_buffer, out),
        [out],
        lambda: bench.pictures_equal("max-pool", out, reference.maxpool_forward(y), EXACT),
    )


def _maxpool_backward(bench: _Workbench, stage: Stage) -> Isolated:
    y, y_buffer = bench.batch((stage.out_channels, stage.height, stage.width), relu=True)
    dout, dout_buffer = bench.batch((stage.out_channels, stage.out_height, stage.out_width))
    dy = bench.activations(stage.out_channels, stage.height, stage.width)
    return bench.isolated(
        lambda: bench.backend.relu_maxpool_backward(y_buffer, dout_buffer, dy),
        [dy],
        lambda: bench.pictures_equal("max-pool backward", dy, reference.relu_maxpool_backward(y, dout), EXACT),
    )


def _upsample(bench: _Workbench, stage: Stage) -> Isolated:
    y, y_buffer = bench.batch((stage.out_channels, stage.height, stage.width), relu=True)
    out = bench.activations(stage.out_channels, stage.out_height, stage.out_width)
    return bench.isolated(
        lambda: bench.backend.upsample_forward(y_buffer, out),
        [out],
        lambda: bench.pictures_equal("upsample", out, reference.upsample_forward(y), EXACT),
    )


def _upsample_backward(bench: _Workbench, stage: Stage) -> Isolated:
    y, y_buffer = bench.batch((stage.out_channels, stage.height, stage.width), relu=True)
    dout, dout_buffer = bench.batch((stage.out_channels, stage.out_height, stage.out_width))
    dy = bench.activations(stage.out_channels, stage.height, stage.width)

    def judge() -> list[Check]:
        exact = reference.relu_upsample_backward(y, dout.astype(np.float64))
        tolerance = sum_tolerance(4, reference.relu_upsample_backward(np.ones_like(y), abs(dout)))
        return bench.pictures_equal("upsample backward", dy, exact, tolerance)

    return bench.isolated(lambda: bench.backend.relu_upsample_backward(y_buffer, dout_buffer, dy), [dy], judge)


def _gather(bench: _Workbench, architecture: Architecture) -> Isolated:
    """A batch out of the middle of four times as many pictures, in random order."""
    backend, n = bench.backend, len(bench.which)
    images = bench.rng.integers(0, 256, (4 * n, *architecture.input_shape), np.uint8)
    order = bench.rng.permutation(4 * n).astype(np.int32)
    images_buffer, order_buffer = bench.given(images), bench.given(order)
    x = bench.activations(*architecture.input_shape)

    def judge() -> list[Check]:
        expected = images[order[n : 2 * n]] / 255.0
        return [compare("gather", to_canonical(backend.read(x), backend.layout), expected, UNIT_ROUNDOFF)]

    return bench.isolated(lambda: backend.gather_batch(images_buffer, order_buffer, n, x), [x], judge)


def _loss(bench: _Workbench, architecture: Architecture) -> Isolated:
    backend = bench.backend
    shape = activation_shape(backend.layout, len(bench.which), *architecture.output_shape)
    prediction, target = bench.normal(shape), bench.rng.random(shape, np.float32)
    prediction_buffer, target_buffer = bench.given(prediction), bench.given(target)
    gradient, losses = backend.empty(shape), backend.empty((1,))

    def judge() -> list[Check]:
        loss, exact = reference.mse_loss(prediction.astype(np.float64), target.astype(np.float64))
        tolerance = sum_tolerance(1, 2 / target.size * (abs(prediction) + abs(target)))
        return [
            compare("loss gradient", backend.read(gradient), exact, tolerance),
            compare("loss", backend.read(losses), np.array([loss]), sum_tolerance(target.size, loss)),
        ]

    return bench.isolated(
        lambda: backend.mse_loss(prediction_buffer, target_buffer, gradient, losses, 0), [gradient, losses], judge
    )


def _sgd(bench: _Workbench, architecture: Architecture) -> Isolated:
    """The one operation that has to be in place: its calls are counted, and the parameters must have moved as often.

    Each subtraction may round by half a unit, and always the same way; so the tolerance grows with the calls.
    """
    backend = bench.backend
    start, gradients = bench.normal((architecture.parameter_count,)), bench.normal((architecture.parameter_count,))
    parameters, gradients_buffer = backend.upload(start), bench.given(gradients)
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
        return [compare("SGD", backend.read(parameters), start - moved, tolerance)]

    return replace(bench.isolated(call, [], judge), poison=restore)


_OF_A_STAGE: dict[str, Callable[[_Workbench, Stage], Isolated]] = {
    "forward": _forward,
    "backward_data": _backward_data,
    "backward_filter": _backward_filter,
    "backward_bias": _backward_bias,
    "maxpool": _maxpool,
    "maxpool_backward": _maxpool_backward,
    "upsample": _upsample,
    "upsample_backward": _upsample_backward,
}
_OF_THE_STEP: dict[str, Callable[[_Workbench, Architecture], Isolated]] = {
    "gather": _gather,
    "loss": _loss,
    "sgd": _sgd,
}


def kernel_registers(backend: Backend, call: Callable[[], None]) -> dict[str, int] | None:
    """Registers a thread of each Numba kernel that ``call`` launches, as compiled for this GPU; None on a CPU.

    A kernel compiled for several argument types counts with its largest. cuBLAS's kernels are not Numba's to tell.
    """
    if backend.device != "gpu":
        return None
    launch_grid = backend.launch_grid
    launched: dict[int, Any] = {}

    def recording(kernel: Any, *arguments: Any) -> None:
        launched[id(kernel)] = kernel
        launch_grid(kernel, *arguments)

    backend.launch_grid = recording
    try:
        call()
        backend.synchronize()
    finally:
        del backend.launch_grid
    registers: dict[str, int] = {}
    for kernel in launched.values():
        name = kernel.py_func.__name__  # kernels made by one function share it
        registers[name] = max(registers.get(name, 0), *kernel.get_regs_per_thread().values())
    return registers
