"""A backend against the reference: the one place that says what "the same result" means.

Every operation is a case of ``common/cases.py``: its outputs are filled with NaN before the call, so that whatever is
left unwritten shows; its inputs are compared bit for bit afterwards; a backend that calls itself deterministic runs
twice. Inputs are random, and shapes are awkward on purpose: H != W, one picture, three channels, odd filter counts,
nothing a multiple of a tile. A whole training step follows, of a tiny network and of the real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common import reference
from common.architecture import Architecture, Stage, autoencoder
from common.backend import Backend, Buffer, from_canonical, to_canonical
from common.cases import operation_case
from common.checks import (
    FULL_STEP_TOLERANCE,
    Check,
    check_close,
    check_norm,
    check_that,
    step_tolerance,
    sum_tolerance,
)
from common.network import Network, initial_parameters
from common.operands import INPUTS, Case, Operands
from common.operations import WHOLE_STEP, Operation, OperationWork
from common.stage_cases import RESAMPLED, stage_backward, takes_small_map

# (N, C, K, H, W). The first are fit for the simulator too.
SMALL_SHAPES = ((1, 3, 5, 3, 5), (2, 4, 3, 5, 4), (3, 3, 3, 1, 6))
AWKWARD_SHAPES = (*SMALL_SHAPES, (1, 1, 1, 1, 1), (3, 17, 5, 6, 33), (2, 33, 19, 7, 3), (5, 3, 37, 10, 9))
CONVOLUTIONS = (Operation.FORWARD, Operation.BACKWARD_DATA, Operation.BACKWARD_FILTER, Operation.BACKWARD_BIAS)
STAGES = ((None, False), ("maxpool", False), ("upsample", False), ("upsample", True), (None, True))
"""What follows the convolution of a stage, and whether its input is an upsampled map."""
RESAMPLINGS = {
    "maxpool": (Operation.MAXPOOL, Operation.MAXPOOL_BACKWARD),
    "upsample": (Operation.UPSAMPLE, Operation.UPSAMPLE_BACKWARD),
}


def verify(
    backend: Backend,
    architecture: Architecture | None = None,
    *,
    batch_sizes: Sequence[int] = (),
    small: bool = False,
) -> list[Check]:
    """Check every operation and one whole training step.

    ``architecture`` adds the shapes of its own stages, and ``batch_sizes`` a whole training step of it at each size: a
    backend that treats the pictures of a large batch differently is only found there. ``small`` keeps to what Numba's
    simulator can do in seconds.
    """
    return list(_checks(backend, architecture, batch_sizes, small))


def _checks(
    backend: Backend, architecture: Architecture | None, batch_sizes: Sequence[int], small: bool
) -> Iterator[Check]:
    rng = np.random.default_rng(2026)
    shapes = list(SMALL_SHAPES if small else AWKWARD_SHAPES)
    if architecture is not None:
        shapes += [(2, s.in_channels, s.out_channels, s.height, s.width) for s in architecture.stages]
    if not backend.whole_stages:
        for shape in shapes:
            yield from convolution_checks(backend, shape, rng)
        for shape in shapes[:2] if small else shapes:
            n, _, k, height, width = shape
            yield from _resampling_checks(backend, (n, k, height, width), rng)
            yield _relu_keeps_nan(backend, shape, rng)
    for shape in SMALL_SHAPES[:2] if small else AWKWARD_SHAPES:
        yield from stage_checks(backend, shape, rng)
    for stage in () if small or architecture is None else architecture.stages:
        yield from _checks_of_stage(backend, stage, 2, rng)
    yield from _shared_checks(backend, rng)
    yield from _step_checks(backend, small=small)
    for n in batch_sizes:
        yield from batch_checks(backend, architecture, n, largest=max(batch_sizes))


# Operations -----------------------------------------------------------------------------------------------------------


def convolution_checks(backend: Backend, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of a convolution, with and without ReLU, and its gradients at ``shape`` (N, C, K, H, W)."""
    n, c, k, height, width = shape
    linear = Stage("case", c, k, height, width)
    rectified = replace(linear, resample="upsample")  # the forward case has a ReLU where its stage resamples
    at = f"N{n} C{c} K{k} {height}x{width}"
    yield from _stage_checks(backend, rectified, Operation.FORWARD, n, rng, at)
    backend.prepare(Architecture((linear,)), n)
    for operation in CONVOLUTIONS:  # one after the other in one workspace, as in a step
        yield from _stage_checks(backend, linear, operation, n, rng, at, prepare=False)


def _resampling_checks(backend: Backend, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Check]:
    """Pooling from a picture of twice the size, upsampling from this one, and their gradients."""
    n, k, height, width = shape
    at = f"N{n} K{k} {2 * height}x{2 * width}"
    for resample, operations in RESAMPLINGS.items():
        scale = 2 if resample == "maxpool" else 1
        stage = Stage("case", 1, k, scale * height, scale * width, resample)
        for operation in operations:
            yield from _stage_checks(backend, stage, operation, n, rng, at)
    y = np.maximum(rng.standard_normal((n, k, 2 * height, 2 * width), np.float32), 0)
    y[0, 0, 0, 1] = np.nan
    out = _upload(backend, np.zeros(shape, np.float32))
    backend.maxpool_forward(_upload(backend, y), out)
    kept = bool(np.isnan(_read(backend, out)[0, 0, 0, 0]))
    yield check_that(f"max-pool keeps NaN, {at}", kept, "a NaN was dropped")


def stage_checks(backend: Backend, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of whole stages, forward and backward; a version may fuse what is in them.

    ``shape`` (N, C, K, H, W) is that of a linear stage; those that pool or take an upsampled map are twice as large.
    """
    n, c, k, height, width = shape
    for resample, upsampled in STAGES:
        scale = 2 if resample == "maxpool" or upsampled else 1
        stage = Stage("case", c, k, scale * height, scale * width, resample, upsampled)
        # Where the map is upsampled before, the stage does not differ from the others.
        if not upsampled or takes_small_map(backend, stage):
            yield from _checks_of_stage(backend, stage, n, rng)


def _checks_of_stage(backend: Backend, stage: Stage, n: int, rng: np.random.Generator) -> Iterator[Check]:
    at = f"N{n} C{stage.in_channels} K{stage.out_channels} {stage.height}x{stage.width}"
    at += ", upsampled" if stage.upsampled else ""
    for operation in (Operation.STAGE_FORWARD, Operation.STAGE_BACKWARD):
        yield from _stage_checks(backend, stage, operation, n, rng, at)
    if stage.resample is not None:
        case = stage_backward(Operands(backend, n, n, rng), stage, integers=True)
        yield from run_case(backend, case, f"equal values, {at}")
    yield _stage_keeps_nan(backend, stage, n, rng, at)


def _stage_keeps_nan(backend: Backend, stage: Stage, n: int, rng: np.random.Generator, at: str) -> Check:
    """A NaN in a picture has to show in every output that depends on it, and in no other picture."""
    plan = backend.stage_plan(stage, n)
    scale = 2 if stage.upsampled else 1
    x = rng.standard_normal((n, stage.in_channels, stage.height // scale, stage.width // scale), np.float32)
    column = min(2, x.shape[3] - 1)  # where its NaN reaches only half of the first pooling window
    x[0, 0, 0, column] = np.nan
    seen = reference.upsample_forward(x) if stage.upsampled else x
    w, b = np.ones((stage.out_channels, stage.in_channels, 3, 3), np.float32), np.zeros(stage.out_channels, np.float32)
    y = reference.conv2d_forward(seen, w, b)
    out = backend.empty(plan.output.shape)
    kept = {name: backend.empty(buffer.shape, buffer.dtype) for name, buffer in plan.kept.items()}
    given = x if takes_small_map(backend, stage) else seen
    backend.stage_forward(stage, _upload(backend, given), _upload(backend, w), backend.upload(b), out, kept)
    actual = np.isnan(_read(backend, out))
    resampled = np.isnan(RESAMPLED[stage.resample](y))
    expected = resampled if resampled.shape == actual.shape else np.isnan(y)
    kept_nan = actual[expected].all() and not actual[1:].any()
    name = f"stage forward, {stage.resample or 'linear'}, keeps NaN, {at}"
    return check_that(name, bool(kept_nan), "a NaN was dropped, or reached another picture")


def _stage_checks(
    backend: Backend,
    stage: Stage,
    operation: Operation,
    n: int,
    rng: np.random.Generator,
    at: str,
    *,
    prepare: bool = True,
) -> list[Check]:
    work = OperationWork(stage.name, operation, 0, 0)
    case = operation_case(backend, Architecture((stage,)), work, n, rng, distinct=n, prepare=prepare)
    return run_case(backend, case, at)


def run_case(backend: Backend, case: Case, at: str) -> list[Check]:
    """Call the operation once, twice if the backend says that it is deterministic, and judge what it left."""
    results = []
    for _ in range(2 if backend.deterministic else 1):
        case.poison()
        case.call()
        backend.synchronize()
        results.append(case.read())
    # An input that is as it was is no result, and does not count as a check.
    found = [check for check in case.check() if not (check.name == INPUTS and check.passed)]
    checks = [replace(check, name=f"{check.name}, {at}") for check in found]
    if not all(np.array_equal(*pair, equal_nan=True) for pair in zip(results[0], results[-1], strict=True)):
        checks.append(check_that(f"deterministic, {at}", False, "the same input gave different bits"))
    return checks


def _relu_keeps_nan(backend: Backend, shape: tuple[int, ...], rng: np.random.Generator) -> Check:
    """A NaN in a picture has to show in every output whose window reaches it, and in no other."""
    n, c, k, height, width = shape
    backend.prepare(Architecture((Stage("case", c, k, height, width),)), n)
    x, w = (rng.standard_normal(size).astype(np.float32) for size in ((n, c, height, width), (k, c, 3, 3)))
    x[0, c - 1, 0, 0] = np.nan
    y = _upload(backend, np.zeros((n, k, height, width), np.float32))
    backend.conv2d_forward(_upload(backend, x), _upload(backend, w), backend.upload(np.zeros(k, np.float32)), y, True)
    reached = np.zeros((n, k, height, width), bool)
    reached[0, :, :2, :2] = True
    kept = np.array_equal(np.isnan(_read(backend, y)), reached)
    name = f"ReLU keeps NaN, N{n} C{c} K{k} {height}x{width}"
    return check_that(name, kept, "a NaN was dropped, or reached an output that does not see it")


def _shared_checks(backend: Backend, rng: np.random.Generator) -> Iterator[Check]:
    """Batch gathering, loss and SGD, and the loss in place as the network calls it."""
    architecture = Architecture((Stage("case", 3, 3, 5, 4),))
    n = 3
    for operation in (Operation.GATHER, Operation.LOSS, Operation.SGD):
        case = operation_case(backend, architecture, OperationWork(WHOLE_STEP, operation, 0, 0), n, rng)
        yield from run_case(backend, case, f"N{n} 3x5x4")
    prediction, target = rng.standard_normal((2, n, 3, 5, 4), np.float32)
    _, gradient = reference.mse_loss(prediction.astype(np.float64), target.astype(np.float64))
    in_place, losses = _upload(backend, prediction), backend.upload(np.zeros(1, np.float32))
    backend.mse_loss(in_place, _upload(backend, target), in_place, losses, 0)
    tolerance = sum_tolerance(1, 2 / target.size * (abs(prediction) + abs(target)))
    yield check_close(f"loss gradient in place, N{n} 3x5x4", _read(backend, in_place), gradient, tolerance)


# Training steps -------------------------------------------------------------------------------------------------------


def safe_step_inputs(
    architecture: Architecture, n: int, least_margin: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Parameters and pictures on which no ReLU or pooling decision is close enough for rounding to reverse it.

    A reversed decision moves a gradient by a whole term, which no tolerance for rounding should have to cover.
    """
    for seed in range(1_000):
        parameters = initial_parameters(architecture, seed)
        rng = np.random.default_rng(seed)
        for name, value in parameters.items():
            if name.endswith(".bias"):
                parameters[name] = rng.uniform(-0.1, 0.1, value.shape).astype(np.float32)
        pictures = rng.integers(0, 256, (n, *architecture.input_shape), np.uint8)
        if reference.forward_backward(architecture, parameters, pictures / 255.0).margin > least_margin:
            return parameters, pictures
    raise ValueError(f"no seed keeps every decision {least_margin} away from rounding: take a smaller network")


def _step_checks(backend: Backend, *, small: bool) -> Iterator[Check]:
    """One training step on a tiny network, with a batch smaller than the buffers were made for."""
    architecture = autoencoder((8, 4) if small else (8, 12), (3, 2) if small else (5, 4))
    n, learning_rate = 2, 0.5
    parameters, pictures = safe_step_inputs(architecture, n, 1e-4)
    exact = reference.forward_backward(architecture, parameters, pictures / 255.0)
    images = backend.upload(pictures)
    order = backend.upload(np.arange(n, dtype=np.int32))
    factor = max(backend.stage_plan(stage, n).error_factor for stage in architecture.stages)
    tolerance = factor * step_tolerance(architecture, n, backend.precision)

    results = []
    for _ in range(2 if backend.deterministic else 1):
        network = Network(backend, architecture, n + 1, parameters)
        network.poison()
        losses = backend.upload(np.full(1, np.nan, np.float32))
        network.step(images, order, 0, n, learning_rate, losses, 0)
        backend.synchronize()
        results.append((backend.read(losses), network.read_gradients(), network.read_parameters()))

    losses, gradients, updated = results[0]
    yield check_close("training step: loss", losses, np.array([exact.loss]), tolerance * exact.loss)
    yield from parameter_checks(
        "training step", parameters, gradients, updated, exact.gradients, learning_rate, tolerance
    )
    for again in results[1:]:
        same = np.array_equal(losses, again[0]) and all(
            np.array_equal(gradients[name], again[1][name]) for name in gradients
        )
        yield check_that("training step: deterministic", same, "the same step gave different bits")


@dataclass(frozen=True)
class RepeatedBatch:
    """A batch of two pictures repeated in random order, and what a training step has to make of it."""

    parameters: dict[str, np.ndarray]
    pictures: np.ndarray
    """(2, C, H, W) uint8."""
    order: np.ndarray
    """(n,) int32: which of the two each picture of the batch is."""
    loss: float
    output_gradient: np.ndarray
    """(n, C, H, W): the gradient to the prediction."""
    gradients: dict[str, np.ndarray]


def repeated_batch(architecture: Architecture, n: int) -> RepeatedBatch:
    """Make a batch of n pictures that the reference needs two pictures' work for.

    The gradients of the batch are the two pictures' gradients in the proportion of their numbers.
    """
    rng = np.random.default_rng(n)
    parameters = initial_parameters(architecture, 7)
    for name, value in parameters.items():
        if name.endswith(".bias"):
            parameters[name] = rng.uniform(-0.05, 0.05, value.shape).astype(np.float32)
    pictures = rng.integers(0, 256, (2, *architecture.input_shape), np.uint8)
    exact = [reference.forward_backward(architecture, parameters, picture[None] / 255.0) for picture in pictures]
    order = rng.integers(0, 2, n).astype(np.int32)
    shares = np.bincount(order, minlength=2) / n
    output_gradient = np.concatenate(
        [2 / (n * p.size) * (s.prediction - p / 255.0) for s, p in zip(exact, pictures, strict=True)]
    )
    gradients = {
        name: sum(share * step.gradients[name] for share, step in zip(shares, exact, strict=True))
        for name in parameters
    }
    loss = sum(share * step.loss for share, step in zip(shares, exact, strict=True))
    return RepeatedBatch(parameters, pictures, order, loss, output_gradient[order], gradients)


def batch_checks(backend: Backend, architecture: Architecture, n: int, *, largest: int) -> Iterator[Check]:
    """Yield the checks of a whole training step of ``architecture`` on n pictures, in buffers made for ``largest``."""
    yield from network_checks(Network(backend, architecture, largest, initial_parameters(architecture, 0)), n)


def network_checks(network: Network, n: int) -> Iterator[Check]:
    """Yield the checks of a training step of a network on n pictures; whatever it has learned is lost.

    Every picture of the batch has to come out right: its reconstruction is compared value by value. ReLU and pooling
    decisions that rounding reverses move a gradient by a term; FULL_STEP_TOLERANCE covers that and is far below a
    picture's share.
    """
    backend = network.backend
    batch = repeated_batch(network.architecture, n)
    network.write_parameters(batch.parameters)
    network.poison()
    losses = backend.upload(np.full(1, np.nan, np.float32))
    learning_rate = 0.5
    network.step(backend.upload(batch.pictures), backend.upload(batch.order), 0, n, learning_rate, losses, 0)
    backend.synchronize()

    tolerance = FULL_STEP_TOLERANCE[backend.precision]
    at = f"training step of {n} pictures"
    yield check_close(f"{at}: loss", backend.read(losses), np.array([batch.loss]), tolerance * batch.loss)
    # The prediction's place now holds the gradient to it, which tells as much.
    gradient = _read(backend, network.views(n).outputs[-1])
    largest_gradient = np.abs(batch.output_gradient).max()
    yield check_close(f"{at}: reconstructions", gradient, batch.output_gradient, tolerance * largest_gradient)
    gradients, updated = network.read_gradients(), network.read_parameters()
    yield from parameter_checks(at, batch.parameters, gradients, updated, batch.gradients, learning_rate, tolerance)


def parameter_checks(
    at: str,
    parameters: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    updated: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    learning_rate: float,
    tolerance: float,
) -> Iterator[Check]:
    """Each gradient against the expected one, and each parameter against the step that its gradient asks for."""
    for name, value in parameters.items():
        yield check_norm(f"{at}: gradient of {name}", gradients[name], expected[name], tolerance)
        moved = value - learning_rate * gradients[name].astype(np.float64)
        yield check_close(f"{at}: {name}", updated[name], moved, sum_tolerance(2, abs(value) + abs(gradients[name])))


def _upload(backend: Backend, array: np.ndarray) -> Buffer:
    """Move an array in canonical order to the device, in the backend's layout."""
    return backend.upload(from_canonical(array, backend.layout) if array.ndim == 4 else array)


def _read(backend: Backend, buffer: Buffer) -> np.ndarray:
    """Wait, and copy a buffer back into canonical order."""
    backend.synchronize()
    array = backend.read(buffer)
    return to_canonical(array, backend.layout) if array.ndim == 4 else array
