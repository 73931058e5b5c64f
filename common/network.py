"""The network on a backend: it owns the buffers and runs the stages forward and backward. No device code here.

Memory is planned from the architecture and from what the version says of its stages. The gradient of an activation
needs no memory of its own: the gradient of a stage's input replaces that input after the filter gradient has read it,
and in most versions the gradient of a convolution's output replaces that output after the ReLU and pooling decisions
have been read from it. One buffer therefore holds an activation and later its gradient. All parameters are in one flat
buffer and their gradients in another, so that SGD is one pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from common.architecture import Architecture, Stage
from common.backend import Backend, Buffer, filter_shape, from_canonical, to_canonical
from common.plans import BufferPlan, Layout, StagePlan, activation_shape

ALIGNMENT = 64  # floats: each parameter starts on a 256-byte boundary of the flat buffer


def plan_activations(
    architecture: Architecture, batch_size: int, layout: Layout, stage_plan: Callable[[Stage, int], StagePlan]
) -> list[BufferPlan]:
    """Plan the input, and for each stage what the version keeps and its output."""
    channels, height, width = architecture.input_shape
    plans = [BufferPlan("input", activation_shape(layout, batch_size, channels, height, width), "batch of pictures")]
    for stage in architecture.stages:
        planned = stage_plan(stage, batch_size)
        plans += [*planned.kept.values(), planned.output]
    return plans


def parameter_shapes(architecture: Architecture, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stage in architecture.stages:
        shapes[f"{stage.name}.weight"] = filter_shape(layout, stage.out_channels, stage.in_channels)
        shapes[f"{stage.name}.bias"] = (stage.out_channels,)
    return shapes


def flat_offsets(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """The start of each parameter in the flat buffer, and the length of that buffer, both in floats."""
    offsets = {}
    end = 0
    for name, shape in shapes.items():
        offsets[name] = end
        end += -(-prod(shape) // ALIGNMENT) * ALIGNMENT
    return offsets, end


def initial_parameters(architecture: Architecture, seed: int) -> dict[str, np.ndarray]:
    """Draw float32 weights in canonical order (K, C, R, S), He normal; biases are zero.

    Source: He, Zhang, Ren and Sun, "Delving Deep into Rectifiers", 2015: standard deviation sqrt(2 / fan_in).
    """
    rng = np.random.default_rng(seed)
    parameters = {}
    for name, shape in parameter_shapes(architecture, "NCHW").items():
        if name.endswith(".weight"):
            deviation = np.sqrt(2 / prod(shape[1:]))
            parameters[name] = (rng.standard_normal(shape) * deviation).astype(np.float32)
        else:
            parameters[name] = np.zeros(shape, np.float32)
    return parameters


@dataclass(frozen=True, eq=False)
class _Views:
    """Views of the first n pictures of each activation buffer, for batches of n pictures."""

    picture: Buffer
    outputs: list[Buffer]
    kept: list[dict[str, Buffer]]


class Network:
    """The stages of ``architecture`` on ``backend``, for batches of at most ``batch_size`` pictures."""

    def __init__(
        self, backend: Backend, architecture: Architecture, batch_size: int, parameters: dict[str, np.ndarray]
    ) -> None:
        """Allocate all buffers and copy ``parameters`` (canonical order) into the backend's layout.

        Raises ValueError if a stage before the last does not resample: what it keeps would be its output, which the
        gradient to it replaces.
        """
        if any(stage.resample is None for stage in architecture.stages[:-1]):
            raise ValueError("every stage but the last must resample, or an output and its gradient share memory")
        self.backend = backend
        self.architecture = architecture
        self.batch_size = batch_size
        backend.prepare(architecture, batch_size)

        shapes = parameter_shapes(architecture, backend.layout)
        offsets, length = flat_offsets(shapes)
        self._flat = backend.upload(np.zeros(length, np.float32))
        self._flat_gradients = backend.upload(np.zeros(length, np.float32))
        self.parameters = {}
        self.gradients = {}
        for name, shape in shapes.items():
            span = slice(offsets[name], offsets[name] + prod(shape))
            self.parameters[name] = self._flat[span].reshape(shape)
            self.gradients[name] = self._flat_gradients[span].reshape(shape)
        self.write_parameters(parameters)

        plans = plan_activations(architecture, batch_size, backend.layout, backend.stage_plan)
        self.activations = {plan.name: backend.empty(plan.shape, plan.dtype) for plan in plans}
        self._views: dict[int, _Views] = {}

    def write_parameters(self, parameters: dict[str, np.ndarray]) -> None:
        """Set every parameter from an array in canonical order."""
        for name, buffer in self.parameters.items():
            value = np.asarray(parameters[name], np.float32)
            self.backend.write(buffer, from_canonical(value, self.backend.layout) if value.ndim == 4 else value)

    def read_parameters(self) -> dict[str, np.ndarray]:
        """Copy every parameter to the host in canonical order."""
        return self._read(self.parameters)

    def read_gradients(self) -> dict[str, np.ndarray]:
        """Copy the last step's gradient of every parameter to the host in canonical order."""
        return self._read(self.gradients)

    def views(self, n: int) -> _Views:
        """Views for a batch of n pictures, created at the first use of each n."""
        if n not in self._views:
            cut = {name: buffer if n == self.batch_size else buffer[:n] for name, buffer in self.activations.items()}
            plans = [self.backend.stage_plan(stage, n) for stage in self.architecture.stages]
            self._views[n] = _Views(
                picture=cut["input"],
                outputs=[cut[plan.output.name] for plan in plans],
                kept=[{key: cut[buffer.name] for key, buffer in plan.kept.items()} for plan in plans],
            )
        return self._views[n]

    def forward(self, n: int, stages: int | None = None) -> Buffer:
        """Run the first ``stages`` (all if None) on the n pictures in the input buffer and return the last output."""
        views = self.views(n)
        x = views.picture
        walk = zip(self.architecture.stages, views.outputs, views.kept, strict=True)
        for stage, out, kept in itertools.islice(walk, stages):
            weight, bias = self.parameters[f"{stage.name}.weight"], self.parameters[f"{stage.name}.bias"]
            self.backend.stage_forward(stage, x, weight, bias, out, kept)
            x = out
        return x

    def backward(self, n: int) -> None:
        """Compute the gradient of every parameter; the last output buffer holds the gradient of the prediction."""
        views = self.views(n)
        inputs = [views.picture, *views.outputs[:-1]]
        for i in reversed(range(len(self.architecture.stages))):
            stage = self.architecture.stages[i]
            self.backend.stage_backward(
                stage,
                inputs[i],
                self.parameters[f"{stage.name}.weight"],
                views.outputs[i],
                views.kept[i],
                self.gradients[f"{stage.name}.weight"],
                self.gradients[f"{stage.name}.bias"],
                inputs[i] if i > 0 else None,
            )

    def step(
        self, images: Buffer, order: Buffer, start: int, n: int, learning_rate: float, losses: Buffer, index: int
    ) -> None:
        """One training step on pictures ``order[start:start + n]``; the loss goes to ``losses[index]``."""
        views = self.views(n)
        self.backend.gather_batch(images, order, start, views.picture)
        self.backend.replayed(views, "forward", lambda: self.forward(n))
        prediction = views.outputs[-1]
        self.backend.mse_loss(prediction, views.picture, prediction, losses, index)
        self.backend.replayed(views, "backward", lambda: self.backward(n))
        self.backend.sgd(self._flat, self._flat_gradients, learning_rate)

    def poison(self) -> None:
        """Fill every activation and gradient with NaN, so that a value that a step does not write is detected."""
        for buffer in [*self.activations.values(), *self.gradients.values()]:
            poison = np.nan if buffer.dtype == np.float32 else np.iinfo(buffer.dtype).max
            self.backend.write(buffer, np.full(buffer.shape, poison, buffer.dtype))

    def _read(self, buffers: dict[str, Buffer]) -> dict[str, np.ndarray]:
        self.backend.synchronize()
        host = {name: self.backend.read(buffer) for name, buffer in buffers.items()}
        return {
            name: to_canonical(value, self.backend.layout) if value.ndim == 4 else value for name, value in host.items()
        }
