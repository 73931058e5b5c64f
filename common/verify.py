"""A backend against the reference: the one place that says what "the same result" means.

Every output is filled with NaN before the call, so that whatever is left unwritten shows; every input is compared bit
for bit afterwards; a backend that calls itself deterministic is run twice. Inputs are random, never zeros or integers,
and shapes are awkward on purpose: H != W, one picture, three channels, odd filter counts, nothing a multiple of a tile.

Tolerances follow from the length of the sum. A float32 sum of L products is off by about sqrt(L) rounding errors of the
sum of the products' absolute values, whatever the order of summation (Higham and Mary, "A New Approach to Probabilistic
Rounding Error Analysis", 2019); ``SAFETY`` times that is allowed, value by value. TF32 first rounds each operand to ten
bits of fraction, which bounds each product's error and does not average out in the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common import reference
from common.architecture import TAPS, Architecture, Stage, autoencoder
from common.backend import Backend, Buffer, Math, activation_shape, filter_shape, from_canonical, to_canonical
from common.network import Network, initial_parameters

SAFETY = 8.0
UNIT_ROUNDOFF = 2.0**-24  # float32
TF32_ROUNDOFF = 2.0**-11
FULL_STEP_TOLERANCE = {"fp32": 2e-3, "tf32": 0.1}  # see batch_checks; a picture's share of a batch of 64 is 1.6e-2

# (N, C, K, H, W). The first are fit for the simulator too.
SMALL_SHAPES = ((1, 3, 5, 3, 5), (2, 4, 3, 5, 4), (3, 3, 3, 1, 6))
AWKWARD_SHAPES = (*SMALL_SHAPES, (1, 1, 1, 1, 1), (3, 17, 5, 6, 33), (2, 33, 19, 7, 3), (5, 3, 37, 10, 9))


@dataclass(frozen=True)
class Check:
    """The outcome of one comparison; ``worst`` is the largest error as a multiple of what is allowed."""

    name: str
    passed: bool
    worst: float
    detail: str = ""


def sum_tolerance(length: int, magnitude: np.ndarray | float, math: Math = "fp32") -> np.ndarray:
    """Error allowed in a sum of ``length`` products whose absolute values add up to ``magnitude``."""
    relative = SAFETY * np.sqrt(length) * UNIT_ROUNDOFF
    if math == "tf32":
        relative += 2.5 * TF32_ROUNDOFF
    return relative * np.asarray(magnitude, np.float64) + np.finfo(np.float32).tiny


def step_tolerance(architecture: Architecture, n: int, math: Math = "fp32") -> float:
    """Error allowed in a whole step's gradients, as a share of each gradient's norm.

    Every one of the 2 * stages convolutions on the way adds its own; the longest sum of the network stands for all.
    TF32 also turns some ReLU and pooling decisions, each of which moves a gradient by a whole term.
    """
    longest = max(max(n * s.height * s.width, TAPS * max(s.in_channels, s.out_channels)) for s in architecture.stages)
    depth = 2 * len(architecture.stages)
    return float(sum_tolerance(longest, depth)) if math == "fp32" else FULL_STEP_TOLERANCE[math]


def compare(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: np.ndarray | float) -> Check:
    """Compare value by value; a NaN or an infinity never passes."""
    if actual.shape != expected.shape:
        return Check(name, False, np.inf, f"shape {actual.shape} instead of {expected.shape}")
    unwritten = np.count_nonzero(~np.isfinite(actual))
    if unwritten:
        return Check(name, False, np.inf, f"{unwritten} of {actual.size} values are NaN or infinite (or never written)")
    worst = float(np.max(np.abs(actual.astype(np.float64) - expected) / tolerance, initial=0.0))
    detail = "" if worst <= 1 else f"{worst:.3g} times the tolerance"
    return Check(name, worst <= 1, worst, detail)


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
    for shape in shapes:
        yield from convolution_checks(backend, shape, rng)
    for shape in shapes[:2] if small else shapes:
        n, _, k, height, width = shape
        yield from _resampling_checks(backend, (n, k, height, width), rng)
        yield _relu_keeps_nan(backend, shape, rng)
    yield from _shared_checks(backend, rng)
    yield from _step_checks(backend, small=small)
    for n in batch_sizes:
        yield from batch_checks(backend, architecture, n, largest=max(batch_sizes))


def convolution_checks(backend: Backend, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of a convolution and its gradients at ``shape`` (N, C, K, H, W)."""
    n, c, k, height, width = shape
    backend.prepare(Architecture((Stage("case", c, k, height, width),)), n)
    # A mean away from zero, so that a wrong border or a missing bias cannot hide among cancelling terms.
    x = rng.standard_normal((n, c, height, width)).astype(np.float32) + np.float32(0.3)
    w = rng.standard_normal((k, c, 3, 3)).astype(np.float32) + np.float32(0.2)
    b = rng.standard_normal(k).astype(np.float32)
    dy = rng.standard_normal((n, k, height, width)).astype(np.float32) + np.float32(0.1)
    at = f"N{n} C{c} K{k} {height}x{width}"
    math = backend.math
    run = _Runner(backend, at)

    exact = reference.conv2d_forward(x, w, b)
    tolerance = sum_tolerance(TAPS * c + 1, reference.conv2d_forward(abs(x), abs(w), abs(b)), math)
    for relu in (False, True):
        yield from run(
            "forward, ReLU" if relu else "forward",
            lambda *buffers, relu=relu: backend.conv2d_forward(*buffers, relu),
            [x, w, b],
            reference.relu(exact) if relu else exact,
            tolerance,
        )
    yield from run(
        "backward data",
        backend.conv2d_backward_data,
        [dy, w],
        reference.conv2d_backward_data(dy, w),
        sum_tolerance(TAPS * k, reference.conv2d_backward_data(abs(dy), abs(w)), math),
    )
    yield from run(
        "backward filter",
        backend.conv2d_backward_filter,
        [x, dy],
        reference.conv2d_backward_filter(x, dy),
        sum_tolerance(n * height * width, reference.conv2d_backward_filter(abs(x), abs(dy)), math),
        filters=True,
    )
    yield from run(
        "backward bias",
        backend.conv2d_backward_bias,
        [dy],
        reference.conv2d_backward_bias(dy),
        sum_tolerance(n * height * width, reference.conv2d_backward_bias(abs(dy)), math),
    )


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
    return holds(name, kept, "a NaN was dropped, or reached an output that does not see it")


def _resampling_checks(backend: Backend, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[Check]:
    n, k, half_height, half_width = shape
    at = f"N{n} K{k} {2 * half_height}x{2 * half_width}"
    run = _Runner(backend, at)
    # What comes out of a ReLU, rounded to quarters: many windows hold equal maxima, or nothing but zeros.
    tied = np.maximum(np.round(4 * rng.standard_normal((n, k, 2 * half_height, 2 * half_width))) / 4, 0)
    tied = tied.astype(np.float32)
    small = np.maximum(rng.standard_normal(shape), 0).astype(np.float32)
    d_half = rng.standard_normal(shape).astype(np.float32)
    d_double = rng.standard_normal((n, k, 2 * half_height, 2 * half_width)).astype(np.float32)
    exact = np.finfo(np.float32).tiny
    yield from run("max-pool", backend.maxpool_forward, [tied], reference.maxpool_forward(tied), exact)
    yield from run(
        "max-pool backward, ties",
        backend.relu_maxpool_backward,
        [tied, d_half],
        reference.relu_maxpool_backward(tied, d_half),
        exact,
    )
    yield from run("upsample", backend.upsample_forward, [small], reference.upsample_forward(small), exact)
    sums = reference.relu_upsample_backward(np.ones_like(small), abs(d_double))
    yield from run(
        "upsample backward",
        backend.relu_upsample_backward,
        [small, d_double],
        reference.relu_upsample_backward(small, d_double.astype(np.float64)),
        sum_tolerance(4, sums),
    )
    poisoned = tied.copy()
    poisoned[0, 0, 0, 1] = np.nan
    out = _upload(backend, np.zeros(shape, np.float32))
    backend.maxpool_forward(_upload(backend, poisoned), out)
    kept = bool(np.isnan(_read(backend, out)[0, 0, 0, 0]))
    yield holds(f"max-pool keeps NaN, {at}", kept, "a NaN was dropped")


def _shared_checks(backend: Backend, rng: np.random.Generator) -> Iterator[Check]:
    """Batch gathering, loss and SGD."""
    n, c, height, width = 3, 3, 4, 6
    at = f"N{n} {height}x{width}"
    backend.prepare(Architecture((Stage("case", c, c, height, width),)), n)
    images = rng.integers(0, 256, (7, c, height, width), np.uint8)
    order = rng.permutation(7).astype(np.int32)
    x = _upload(backend, np.full((n, c, height, width), np.nan, np.float32))
    backend.gather_batch(backend.upload(images), backend.upload(order), 2, x)
    expected = images[order[2 : 2 + n]] / 255.0
    yield compare(f"gather, {at}", _read(backend, x), expected, UNIT_ROUNDOFF)

    prediction = rng.standard_normal((n, c, height, width)).astype(np.float32)
    target = rng.random((n, c, height, width)).astype(np.float32)
    loss, gradient = reference.mse_loss(prediction.astype(np.float64), target.astype(np.float64))
    losses = backend.upload(np.full(4, np.nan, np.float32))
    buffers = [_upload(backend, array) for array in (prediction, target, np.full_like(target, np.nan))]
    backend.mse_loss(*buffers, losses, 2)
    scale = sum_tolerance(1, 2 / target.size * (abs(prediction) + abs(target)))
    yield compare(f"loss gradient, {at}", _read(backend, buffers[2]), gradient, scale)
    backend.synchronize()
    written = backend.read(losses)
    yield compare(f"loss, {at}", written[2:3], np.array([loss]), sum_tolerance(target.size, loss))
    alone = bool(np.isnan(written[[0, 1, 3]]).all())
    yield holds("loss writes its own place only", alone, "another step's loss was written")
    in_place = _upload(backend, prediction)
    backend.mse_loss(in_place, buffers[1], in_place, losses, 0)
    yield compare(f"loss gradient in place, {at}", _read(backend, in_place), gradient, scale)

    parameters = rng.standard_normal(101).astype(np.float32)
    gradients = rng.standard_normal(101).astype(np.float32)
    buffer = backend.upload(parameters)
    backend.sgd(buffer, backend.upload(gradients), 0.25)
    backend.synchronize()
    expected = parameters - 0.25 * gradients.astype(np.float64)
    yield compare("SGD", backend.read(buffer), expected, sum_tolerance(2, abs(parameters) + abs(gradients)))


def safe_step_inputs(
    architecture: Architecture, n: int, least_margin: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Parameters and pictures on which no ReLU or pooling decision is close enough to be turned by rounding.

    A turned decision moves a gradient by a whole term, which no tolerance for rounding should have to cover.
    """
    for seed in range(10_000):
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
    tolerance = step_tolerance(architecture, n, backend.math)

    results = []
    for _ in range(2 if backend.deterministic else 1):
        network = Network(backend, architecture, n + 1, parameters)
        network.poison()
        losses = backend.upload(np.full(1, np.nan, np.float32))
        network.step(images, order, 0, n, learning_rate, losses, 0)
        backend.synchronize()
        results.append((backend.read(losses), network.read_gradients(), network.read_parameters()))

    losses, gradients, updated = results[0]
    yield compare("training step: loss", losses, np.array([exact.loss]), tolerance * exact.loss)
    yield from parameter_checks(
        "training step", parameters, gradients, updated, exact.gradients, learning_rate, tolerance
    )
    for again in results[1:]:
        same = np.array_equal(losses, again[0]) and all(
            np.array_equal(gradients[name], again[1][name]) for name in gradients
        )
        yield holds("training step: deterministic", same, "the same step gave different bits")


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
    """Yield the checks of a whole training step of ``architecture`` on n pictures, in buffers made for ``largest``.

    Every picture of the batch has to come out right: its reconstruction is compared value by value. ReLU and pooling
    decisions that rounding turns move a gradient by a term; FULL_STEP_TOLERANCE covers that and is far below a
    picture's share.
    """
    batch = repeated_batch(architecture, n)
    network = Network(backend, architecture, largest, batch.parameters)
    network.poison()
    losses = backend.upload(np.full(1, np.nan, np.float32))
    learning_rate = 0.5
    network.step(backend.upload(batch.pictures), backend.upload(batch.order), 0, n, learning_rate, losses, 0)
    backend.synchronize()

    tolerance = FULL_STEP_TOLERANCE[backend.math]
    at = f"training step of {n} pictures"
    yield compare(f"{at}: loss", backend.read(losses), np.array([batch.loss]), tolerance * batch.loss)
    # The prediction's place now holds the gradient to it, which tells as much.
    gradient = _read(backend, network.views(n).outputs[-1])
    largest_gradient = np.abs(batch.output_gradient).max()
    yield compare(f"{at}: reconstructions", gradient, batch.output_gradient, tolerance * largest_gradient)
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
        yield _compare_norm(f"{at}: gradient of {name}", gradients[name], expected[name], tolerance)
        moved = value - learning_rate * gradients[name].astype(np.float64)
        yield compare(f"{at}: {name}", updated[name], moved, sum_tolerance(2, abs(value) + abs(gradients[name])))


def holds(name: str, met: bool, otherwise: str) -> Check:
    """A check that is met or is not; ``otherwise`` says what is then wrong."""
    return Check(name, met, 0.0 if met else np.inf, "" if met else otherwise)


def _compare_norm(name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> Check:
    """Compare as a whole: the norm of the difference against that of the expected array."""
    if not np.isfinite(actual).all():
        return compare(name, actual, expected, tolerance)
    worst = float(np.linalg.norm(actual - expected) / (tolerance * np.linalg.norm(expected)))
    return Check(name, worst <= 1, worst, "" if worst <= 1 else f"{worst:.3g} times the tolerance")


@dataclass(frozen=True)
class _Runner:
    """Runs an operation the way every check does: poisoned output, inputs compared, twice if deterministic."""

    backend: Backend
    at: str

    def __call__(
        self,
        name: str,
        operation: Callable[..., None],
        inputs: list[np.ndarray],
        expected: np.ndarray,
        tolerance: np.ndarray | float,
        *,
        filters: bool = False,
    ) -> Iterator[Check]:
        backend = self.backend
        buffers = [_upload(backend, array) for array in inputs]
        shape = expected.shape
        if len(shape) == 4:
            n, channels, height, width = shape
            make = filter_shape(backend.layout, n, channels) if filters else None
            shape = make or activation_shape(backend.layout, n, channels, height, width)
        outputs = []
        for _ in range(2 if backend.deterministic else 1):
            output = backend.upload(np.full(shape, np.nan, np.float32))
            operation(*buffers, output)
            backend.synchronize()
            outputs.append(_read(backend, output))
        check = compare(f"{name}, {self.at}", outputs[0], expected, tolerance)
        if check.passed and any(
            not np.array_equal(_read(backend, buffer), array) for buffer, array in zip(buffers, inputs, strict=True)
        ):
            check = Check(check.name, False, np.inf, "an input was changed")
        if check.passed and not all(np.array_equal(outputs[0], again) for again in outputs[1:]):
            check = Check(check.name, False, np.inf, "the same input gave different bits")
        yield check


def _upload(backend: Backend, array: np.ndarray) -> Buffer:
    """Move an array in canonical order to the device, in the backend's layout."""
    return backend.upload(from_canonical(array, backend.layout) if array.ndim == 4 else array)


def _read(backend: Backend, buffer: Buffer) -> np.ndarray:
    """Wait, and copy a buffer back into canonical order."""
    backend.synchronize()
    array = backend.read(buffer)
    return to_canonical(array, backend.layout) if array.ndim == 4 else array
