"""Training epochs: every version sees the same pictures in the same order.

The seed and the epoch's number alone determine the order of an epoch. The position of a training run is therefore two
numbers, completed epochs and steps after them, and any backend can resume from it. Pictures are either all on the
device as bytes, where a batch is gathered, or in files (``PictureFiles``), from which the host gathers each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from common.backend import Backend, Buffer, to_canonical
from common.network import Network
from common.picture_files import PictureFiles

Pictures = np.ndarray | PictureFiles
"""(samples, C, H, W) uint8: an array is copied to the device once, files are read batch by batch."""


def shuffle_epoch(order: np.ndarray, seed: int, epoch: int) -> None:
    """Write the order of an epoch's pictures into ``order`` (samples,) int32; it depends on the arguments only."""
    order[:] = np.arange(len(order), dtype=order.dtype)
    np.random.default_rng([seed, epoch]).shuffle(order)


def mean_loss(losses: np.ndarray, samples: int, batch_size: int) -> float:
    """Mean loss of an epoch over its pictures, from the loss of each step; a smaller last batch weighs less."""
    counts = np.full(len(losses), batch_size)
    counts[-1] = samples - (len(losses) - 1) * batch_size
    return float((losses.astype(np.float64) * counts).sum() / samples)


@dataclass(frozen=True)
class Position:
    """The position of a training run."""

    epoch: int = 0
    """Completed epochs."""
    step: int = 0
    """Completed steps of the current epoch."""
    losses: tuple[float, ...] = ()
    """The loss of each of those steps."""


class Trainer:
    """Trains a network on pictures.

    Everything that an epoch needs is allocated here: the pictures (or a batch of them), their order, and a loss for
    each step.
    """

    def __init__(self, network: Network, images: Pictures, *, learning_rate: float, seed: int) -> None:
        """Take ``images`` (samples, 3, H, W) uint8; an array is moved to the device."""
        self.network = network
        self.learning_rate = learning_rate
        self.seed = seed
        self.samples = len(images)
        self.epochs_done = 0
        self.steps_done = 0
        """Completed steps of the current epoch; 0 between epochs."""
        backend = network.backend
        self._batches = _batches(backend, images, network.batch_size)
        self._order = np.arange(self.samples, dtype=np.int32)
        self.steps = -(-self.samples // network.batch_size)
        self._losses = backend.upload(np.zeros(self.steps, np.float32))
        self._peeked = backend.upload(np.zeros(1, np.float32))

    def run_epoch(self) -> None:
        """Shuffle, take every step, the last one with the remaining pictures, and synchronise."""
        self.take_steps(self.steps)

    def take_steps(self, count: int) -> None:
        """Take the next ``count`` steps of the epoch, or as many as it has left, and synchronise."""
        if self.steps_done == 0:
            self._begin_epoch()
        network = self.network
        for index in range(self.steps_done, min(self.steps_done + count, self.steps)):
            images, order, start, n = self._batches.batch(index)
            network.step(images, order, start, n, self.learning_rate, self._losses, index)
            self.steps_done = index + 1
        network.backend.synchronize()
        if self.steps_done == self.steps:
            self.epochs_done += 1
            self.steps_done = 0

    def warm_up(self) -> None:
        """Run each batch size once, so that everything is compiled; the position and the parameters do not change."""
        backend = self.network.backend
        parameters, losses = self.network.read_parameters(), self.read_losses()
        for index in {0, self.steps - 1}:
            images, order, start, n = self._batches.batch(index)
            self.network.step(images, order, start, n, 0.0, self._losses, index)
        backend.synchronize()
        self.network.write_parameters(parameters)
        backend.write(self._losses, losses)

    def peek_loss(self) -> float:
        """The loss of the next step with the current parameters, without training on it."""
        if self.steps_done == 0:
            self._begin_epoch()
        backend = self.network.backend
        _forward_loss(self.network, *self._batches.batch(self.steps_done), self._peeked, 0)
        backend.synchronize()
        return float(backend.read(self._peeked)[0])

    def order_digest(self) -> str:
        """SHA-256 of the order of the current epoch (between epochs, of the next one) as little-endian int32."""
        shuffle_epoch(self._order, self.seed, self.epochs_done)
        return sha256(self._order.astype("<i4", copy=False).tobytes()).hexdigest()

    def position(self) -> Position:
        """The current position, for ``restore``."""
        losses = self.read_losses()[: self.steps_done]
        return Position(self.epochs_done, self.steps_done, tuple(map(float, losses)))

    def restore(self, position: Position) -> None:
        """Continue from a position with the network's parameters. ValueError if the epoch has no such step."""
        if not 0 <= position.step < self.steps or len(position.losses) != position.step:
            raise ValueError(f"step {position.step} with {len(position.losses)} losses: an epoch has {self.steps}")
        self.epochs_done, self.steps_done = position.epoch, position.step
        losses = np.zeros(self.steps, np.float32)
        losses[: position.step] = position.losses
        self.network.backend.write(self._losses, losses)
        self._begin_epoch()

    def read_losses(self) -> np.ndarray:
        """The loss of each step before its update: of the current epoch as far as it went, then of the one before."""
        self.network.backend.synchronize()
        return self.network.backend.read(self._losses)

    def read_epoch_loss(self) -> float:
        """Mean loss of the last epoch over its pictures (a smaller last batch weighs less)."""
        return mean_loss(self.read_losses(), self.samples, self.network.batch_size)

    def reconstruct(self, count: int) -> np.ndarray:
        """Reconstructions of the first ``count`` pictures, at most a batch: float32 (count, C, H, W)."""
        n = min(count, self.samples, self.network.batch_size)
        self._batches.begin(np.arange(self.samples, dtype=np.int32))
        prediction = run_forward(self.network, *self._batches.batch(0)[:3], n)
        if self.steps_done:
            self._begin_epoch()
        return prediction

    def _begin_epoch(self) -> None:
        shuffle_epoch(self._order, self.seed, self.epochs_done)
        self._batches.begin(self._order)


def forward_batches(network: Network, images: Pictures, stages: int | None = None) -> Iterator[np.ndarray]:
    """Run the first ``stages`` (all if None) on all pictures in order.

    Yields float32 (n, C, H, W) in canonical order on the host, a batch at a time. The network's activations are
    overwritten.
    """
    batches = _batches(network.backend, images, network.batch_size)
    batches.begin(np.arange(len(images), dtype=np.int32))
    for index in range(batches.count):
        yield run_forward(network, *batches.batch(index), stages)


def run_forward(
    network: Network, images: Buffer, order: Buffer, start: int, n: int, stages: int | None = None
) -> np.ndarray:
    """Run the first ``stages`` on pictures ``order[start:start + n]``; float32 (n, C, H, W) on the host."""
    backend = network.backend
    backend.gather_batch(images, order, start, network.views(n).picture)
    output = network.forward(n, stages)
    backend.synchronize()
    return to_canonical(backend.read(output), backend.layout)


class Evaluator:
    """The mean squared error of a network on pictures that it is not trained on."""

    def __init__(self, network: Network, images: Pictures) -> None:
        """Take ``images`` (samples, 3, H, W) uint8; an array is moved to the device."""
        self.network = network
        self.samples = len(images)
        self._batches = _batches(network.backend, images, network.batch_size)
        self._batches.begin(np.arange(self.samples, dtype=np.int32))
        self._losses = network.backend.upload(np.zeros(self._batches.count, np.float32))

    def mse(self) -> float:
        """Mean squared error over every value of every picture."""
        network, backend = self.network, self.network.backend
        for index in range(self._batches.count):
            _forward_loss(network, *self._batches.batch(index), self._losses, index)
        backend.synchronize()
        return mean_loss(backend.read(self._losses), self.samples, network.batch_size)


def _forward_loss(
    network: Network, images: Buffer, order: Buffer, start: int, n: int, losses: Buffer, index: int
) -> None:
    """Write the loss of pictures ``order[start:start + n]`` into ``losses[index]``, without training on them."""
    picture = network.views(n).picture
    network.backend.gather_batch(images, order, start, picture)
    prediction = network.forward(n)
    network.backend.mse_loss(prediction, picture, prediction, losses, index)


# Batches ------------------------------------------------------------------------------------------------------------


class _ResidentBatches:
    """All pictures on the device, which gathers each batch."""

    def __init__(self, backend: Backend, images: np.ndarray, batch_size: int) -> None:
        self._backend = backend
        self._batch_size, self._samples = batch_size, len(images)
        self.count = -(-len(images) // batch_size)
        self._images = backend.upload(images)
        self._order = backend.upload(np.arange(len(images), dtype=np.int32))

    def begin(self, order: np.ndarray) -> None:
        """Use this order of the pictures from now on."""
        self._backend.write(self._order, order)

    def batch(self, index: int) -> tuple[Buffer, Buffer, int, int]:
        """The arguments images, order and start of ``gather_batch`` for batch ``index``, and its number of pictures."""
        start = index * self._batch_size
        return self._images, self._order, start, min(self._batch_size, self._samples - start)


class _StreamedBatches:
    """One batch of pictures on the device, gathered on the host from files."""

    def __init__(self, backend: Backend, images: PictureFiles, batch_size: int) -> None:
        self._backend = backend
        self._source = images
        self._batch_size = batch_size
        self.count = -(-len(images) // batch_size)
        self._host = np.zeros((batch_size, *images.shape), np.uint8)
        self._images = backend.upload(self._host)
        self._in_order = backend.upload(np.arange(batch_size, dtype=np.int32))
        self._order = np.arange(len(images), dtype=np.int32)

    def begin(self, order: np.ndarray) -> None:
        """Use this order of the pictures from now on."""
        self._order[:] = order

    def batch(self, index: int) -> tuple[Buffer, Buffer, int, int]:
        """Gather batch ``index`` and copy it to the device; returns the same as ``_ResidentBatches.batch``."""
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        self._source.gather(chosen, self._host[: len(chosen)])
        self._backend.write(self._images, self._host)
        return self._images, self._in_order, 0, len(chosen)


def _batches(backend: Backend, images: Pictures, batch_size: int) -> _ResidentBatches | _StreamedBatches:
    kind = _StreamedBatches if isinstance(images, PictureFiles) else _ResidentBatches
    return kind(backend, images, batch_size)
