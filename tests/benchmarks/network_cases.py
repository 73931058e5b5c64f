"""The network, or its beginning, made ready to be timed and checked; single operations are in ``common/cases.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from common import reference
from common.architecture import Architecture
from common.backend import Backend
from common.cases import DISTINCT, LEARNING_RATE
from common.checks import FULL_STEP_TOLERANCE, UNIT_ROUNDOFF, Check, check_close, check_that
from common.network import Network, initial_parameters
from common.operands import Case, check_batch
from common.operations import FORWARD_PASS, WHOLE_STEP, OperationWork
from common.training import Trainer
from common.verify import network_checks
from versions.registry import BackendInfo

NETWORK_CASES = ("step", "epoch", "forward", "encode")
"""A training step, an epoch, the forward pass, and its part up to the latent."""


def network_work(
    info: BackendInfo, architecture: Architecture, name: str, batch_size: int, epoch_pictures: int
) -> OperationWork:
    """The work of one of ``NETWORK_CASES`` in a version: FLOPs and least bytes of its operations added up.

    A version that fuses may move less than that sum of bytes, so a bound made of it is one for these operations only.
    """
    whole_batches, rest = divmod(epoch_pictures, batch_size)
    sizes = {"epoch": [batch_size] * whole_batches + [rest] * bool(rest)}.get(name, [batch_size])
    stages = {stage.name for stage in architecture.stages[: _depth(architecture, name)]}
    parts = [
        part
        for n in sizes
        for part in info.step_work(architecture, n)
        if name in ("step", "epoch") or (part.stage in stages and part.operation in FORWARD_PASS)
    ]
    return OperationWork(WHOLE_STEP, name, sum(part.flops for part in parts), sum(part.least_bytes for part in parts))


def _depth(architecture: Architecture, name: str) -> int:
    """How many stages run forward: to the latent, or all."""
    return architecture.latent_stages if name == "encode" else len(architecture.stages)


def network_case(
    backend: Backend,
    architecture: Architecture,
    name: str,
    batch_size: int,
    epoch_pictures: int,
    rng: np.random.Generator,
) -> Case:
    """Build the network on ``backend``, with pictures to train on, and make one of ``NETWORK_CASES`` ready.

    Raises ValueError for another name.
    """
    if name not in NETWORK_CASES:
        raise ValueError(f"unknown case {name!r}: choose from {', '.join(NETWORK_CASES)}")
    network = Network(backend, architecture, batch_size, initial_parameters(architecture, 0))
    pictures = rng.integers(0, 256, (DISTINCT, *architecture.input_shape), np.uint8)
    which = rng.integers(0, DISTINCT, epoch_pictures if name == "epoch" else batch_size)
    if name in ("forward", "encode"):
        return _forward_case(network, pictures, which, _depth(architecture, name))
    if name == "epoch":
        trainer = Trainer(network, pictures[which], learning_rate=LEARNING_RATE, seed=0)
        case = _training_case(network, trainer.run_epoch, trainer.read_losses)
        initial = network.read_parameters()
        return replace(case, check=lambda: [*case.check(), _epoch_check(trainer, initial, pictures, which)])
    images, order = backend.upload(pictures), backend.upload(which.astype(np.int32))
    losses = backend.empty((1,))
    case = _training_case(
        network,
        lambda: network.step(images, order, 0, batch_size, LEARNING_RATE, losses, 0),
        lambda: backend.read(losses),
    )

    def poison() -> None:
        case.poison()
        backend.write(losses, np.full(1, np.nan, np.float32))

    poison()
    return replace(case, poison=poison)


def _training_case(network: Network, call: Callable[[], None], read_losses: Callable[[], np.ndarray]) -> Case:
    """Training steps, again and again, so that the parameters keep moving.

    What they leave depends on how often they were called: it must be finite and different from the start. Then the same
    network takes a step that the reference knows the answer of.
    """
    initial = network.read_parameters()

    def poison() -> None:
        network.backend.synchronize()
        network.poison()

    def check() -> list[Check]:
        return [*_trained(network, initial, read_losses), *network_checks(network, network.batch_size)]

    poison()
    return Case(call, poison, check)


def _trained(
    network: Network, initial: dict[str, np.ndarray], read_losses: Callable[[], np.ndarray]
) -> Iterator[Check]:
    network.backend.synchronize()
    now = network.read_parameters()
    arrays = [read_losses(), *now.values(), *network.read_gradients().values()]
    finite = all(np.isfinite(array).all() for array in arrays)
    yield check_that("losses, parameters and gradients", finite, "NaN or infinite")
    moved = all(not np.array_equal(now[name], value) for name, value in initial.items())
    yield check_that("parameters move", moved, "some are what they were before training")


def _epoch_check(trainer: Trainer, initial: dict[str, np.ndarray], pictures: np.ndarray, which: np.ndarray) -> Check:
    """An epoch at learning rate 0: its mean loss is that of all pictures only if each of them was taken once."""
    network = trainer.network
    network.write_parameters(initial)
    network.poison()
    trainer.learning_rate = 0.0
    trainer.run_epoch()
    trainer.learning_rate = LEARNING_RATE
    exact = pictures / 255.0
    prediction = reference.forward(network.architecture.stages, initial, exact)
    expected = np.array(((prediction - exact) ** 2).reshape(len(exact), -1).mean(axis=1)[which].mean())
    tolerance = FULL_STEP_TOLERANCE[network.backend.precision] * expected
    return check_close("loss at the initial parameters", np.array(trainer.read_epoch_loss()), expected, tolerance)


def _forward_case(network: Network, pictures: np.ndarray, which: np.ndarray, depth: int) -> Case:
    """The first ``depth`` stages forward, on a batch in the input buffer."""
    backend, n = network.backend, network.batch_size
    parameters, views = network.read_parameters(), network.views(n)
    images, order = backend.upload(pictures), backend.upload(which.astype(np.int32))

    def poison() -> None:
        backend.synchronize()
        network.poison()
        backend.gather_batch(images, order, 0, views.picture)
        backend.synchronize()

    def check() -> list[Check]:
        backend.synchronize()
        expected = reference.forward(network.architecture.stages[:depth], parameters, pictures / 255.0)
        tolerance = FULL_STEP_TOLERANCE[backend.precision] * float(abs(expected).max())
        now = network.read_parameters()
        kept = all(np.array_equal(now[name], value) for name, value in parameters.items())
        return [
            check_batch("output", backend, views.outputs[depth - 1], expected, tolerance, which),
            check_batch("the pictures", backend, views.picture, pictures / 255.0, UNIT_ROUNDOFF, which),
            check_that("parameters", kept, "a forward pass changed them"),
        ]

    poison()
    return Case(lambda: network.forward(n, depth), poison, check)
