"""The network itself, or its beginning, made ready to be timed alone and checked afterwards: see ``bench/isolated.py``.

What training leaves behind depends on how often it was called, so the check looks at it (finite, moved) and then lets
the same network do its piece once more from the initial parameters, where the float64 reference knows the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.measure.isolated import DISTINCT, LEARNING_RATE, Isolated, compare_pictures
from common import reference
from common.architecture import Architecture, Stage
from common.backend import Backend
from common.network import Network, initial_parameters
from common.operations import WHOLE_STEP, Operation, step_operations
from common.training import Trainer
from common.verify import FULL_STEP_TOLERANCE, UNIT_ROUNDOFF, Check, compare, holds, sum_tolerance

PIECES = ("step", "epoch", "forward", "encode")
"""A training step, an epoch, the forward pass, and the part of that up to the latent."""


def piece_work(architecture: Architecture, piece: str, batch_size: int, epoch_pictures: int) -> Operation:
    """The work of one of ``PIECES`` as one operation: FLOPs and least bytes of its operations added up.

    A version that fuses may move less than that sum of bytes, so a bound made of it is one for these operations only.
    """
    whole_batches, rest = divmod(epoch_pictures, batch_size)
    sizes = {"epoch": [batch_size] * whole_batches + [rest] * bool(rest)}.get(piece, [batch_size])
    parts = [part for n in sizes for part in _parts(architecture, piece, n)]
    flops, least_bytes = (sum(getattr(part, what) for part in parts) for what in ("flops", "least_bytes"))
    return Operation(WHOLE_STEP, piece, flops, least_bytes)


def _parts(architecture: Architecture, piece: str, n: int) -> list[Operation]:
    operations = step_operations(architecture, n)
    if piece in ("step", "epoch"):
        return operations
    stages = {stage.name for stage in architecture.stages[: _depth(architecture, piece)]}
    return [part for part in operations if part.stage in stages and part.name in ("forward", "maxpool", "upsample")]


def _depth(architecture: Architecture, piece: str) -> int:
    """How many stages ``piece`` runs forward: to the latent, or all."""
    return architecture.latent_stages if piece == "encode" else len(architecture.stages)


def isolate_piece(
    backend: Backend,
    architecture: Architecture,
    piece: str,
    batch_size: int,
    epoch_pictures: int,
    rng: np.random.Generator,
) -> Isolated:
    """Build the network on ``backend``, with pictures to train on, and make one of ``PIECES`` ready.

    Raises ValueError for another piece.
    """
    if piece not in PIECES:
        raise ValueError(f"unknown piece {piece!r}: choose from {', '.join(PIECES)}")
    parameters = initial_parameters(architecture, 0)
    network = Network(backend, architecture, batch_size, parameters)
    pictures = rng.integers(0, 256, (DISTINCT, *architecture.input_shape), np.uint8)
    which = rng.integers(0, DISTINCT, epoch_pictures if piece == "epoch" else batch_size)
    make = {"step": _step, "epoch": _epoch}.get(piece, _forward_pass)
    return make(network, parameters, pictures, which, piece)


def _step(network: Network, parameters: dict[str, Any], pictures: np.ndarray, which: np.ndarray, _: str) -> Isolated:
    """A training step, again and again on one batch, so that the parameters keep moving.

    What the timed steps leave can only be asked to be finite and different from the start; that the step is right is
    then seen from one more, from the initial parameters: its loss is the reference's, and SGD took the gradients it
    left. (The gradients themselves are the business of ``common.verify``.)
    """
    backend, n = network.backend, network.batch_size
    images, order = backend.upload(pictures), backend.upload(which.astype(np.int32))
    losses = backend.empty((1,))

    def call() -> None:
        network.step(images, order, 0, n, LEARNING_RATE, losses, 0)

    def poison() -> None:
        backend.synchronize()
        network.poison()
        backend.write(losses, np.full(1, np.nan, np.float32))

    def check() -> list[Check]:
        checks = _trained(network, parameters, backend.read(losses))
        network.write_parameters(parameters)
        poison()
        call()
        backend.synchronize()
        checks.append(_initial_loss(network, parameters, pictures, which, float(backend.read(losses)[0])))
        gradients, updated = network.read_gradients(), network.read_parameters()
        for name, value in parameters.items():
            moved = value - LEARNING_RATE * gradients[name].astype(np.float64)
            checks.append(compare(name, updated[name], moved, sum_tolerance(2, abs(value) + abs(gradients[name]))))
        return checks

    poison()
    return Isolated(call, poison, check)


def _epoch(network: Network, parameters: dict[str, Any], pictures: np.ndarray, which: np.ndarray, _: str) -> Isolated:
    """Epochs of training, one after the other.

    They too only have to stay finite and to move the parameters; then one epoch is run from the initial parameters with
    a learning rate of zero. Its mean loss is the mean of the pictures' own losses, whatever the order, and comes out
    right only if every picture was taken once.
    """
    backend = network.backend
    trainer = Trainer(network, pictures[which], learning_rate=LEARNING_RATE, seed=0)

    def poison() -> None:
        backend.synchronize()
        network.poison()

    def check() -> list[Check]:
        checks = _trained(network, parameters, trainer.read_losses())
        network.write_parameters(parameters)
        poison()
        trainer.learning_rate = 0.0
        trainer.run_epoch()
        trainer.learning_rate = LEARNING_RATE
        checks.append(_initial_loss(network, parameters, pictures, which, trainer.read_epoch_loss()))
        return checks

    poison()
    return Isolated(trainer.run_epoch, poison, check)


def _forward_pass(
    network: Network, parameters: dict[str, Any], pictures: np.ndarray, which: np.ndarray, piece: str
) -> Isolated:
    """The stages forward, all or up to the latent, on a batch that lies in the input buffer."""
    backend, n = network.backend, network.batch_size
    depth = _depth(network.architecture, piece)
    stages = network.architecture.stages[:depth]
    views = network.views(n)
    images, order = backend.upload(pictures), backend.upload(which.astype(np.int32))

    def call() -> None:
        network.forward(n, depth)

    def poison() -> None:
        backend.synchronize()
        network.poison()
        backend.gather_batch(images, order, 0, views.picture)
        backend.synchronize()

    def check() -> list[Check]:
        backend.synchronize()
        expected = _reference_forward(stages, parameters, pictures / 255.0)
        tolerance = FULL_STEP_TOLERANCE[backend.math] * float(abs(expected).max())
        now = network.read_parameters()
        kept = all(np.array_equal(now[name], value) for name, value in parameters.items())
        return [
            compare_pictures(piece, backend, views.outputs[depth - 1], expected, tolerance, which),
            compare_pictures("the pictures", backend, views.picture, pictures / 255.0, UNIT_ROUNDOFF, which),
            holds("parameters", kept, "a forward pass changed them"),
        ]

    poison()
    return Isolated(call, poison, check)


def _trained(network: Network, parameters: dict[str, Any], losses: np.ndarray) -> list[Check]:
    """Whether training has gone on: finite losses and gradients, parameters finite and no longer the initial ones."""
    network.backend.synchronize()
    now = network.read_parameters()
    finite = [losses, *now.values(), *network.read_gradients().values()]
    return [
        holds("losses, parameters and gradients", all(np.isfinite(array).all() for array in finite), "NaN or infinite"),
        holds(
            "parameters move",
            all(not np.array_equal(now[name], value) for name, value in parameters.items()),
            "some are what they were before training",
        ),
    ]


def _initial_loss(
    network: Network, parameters: dict[str, Any], pictures: np.ndarray, which: np.ndarray, loss: float
) -> Check:
    """Compare a mean loss at the initial parameters with the reference's."""
    exact = pictures / 255.0
    prediction = _reference_forward(network.architecture.stages, parameters, exact)
    per_picture = ((prediction - exact) ** 2).reshape(len(exact), -1).mean(axis=1)
    expected = float(per_picture[which].mean())
    tolerance = FULL_STEP_TOLERANCE[network.backend.math] * expected
    return compare("loss at the initial parameters", np.array([loss]), np.array([expected]), tolerance)


def _reference_forward(stages: Sequence[Stage], parameters: dict[str, Any], x: np.ndarray) -> np.ndarray:
    for stage in stages:
        x = reference.conv2d_forward(x, parameters[f"{stage.name}.weight"], parameters[f"{stage.name}.bias"])
        if stage.relu:
            x = reference.relu(x)
        if stage.resample == "maxpool":
            x = reference.maxpool_forward(x)
        elif stage.resample == "upsample":
            x = reference.upsample_forward(x)
    return x
