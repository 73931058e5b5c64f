"""Epochs of training: the same pictures in the same order for every version, nothing but work inside.

An epoch's order is decided by the seed and the epoch's number alone, so where training stands is two numbers, whole
epochs and steps after them, and it can be taken up anywhere, on any backend. Pictures either all lie on the device as
bytes, where a batch is a gather, or stay in files and are gathered on the host, batch by batch (``PictureFiles``).
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
"""(samples, C, H, W) uint8: an array goes to the device whole, files are read as they are needed."""


def shuffle_epoch(order: np.ndarray, seed: int, epoch: int) -> None:
    """Write the order of an epoch's pictures into ``order`` (samples,) int32; the arguments alone decide it."""
    order[:] = np.arange(len(order), dtype=order.dtype)
    np.random.default_rng([seed, epoch]).shuffle(order)


def mean_loss(losses: np.ndarray, samples: int, batch_size: int) -> float:
    """An epoch's mean loss over its pictures, from each step's; a smaller last batch counts for less."""
    counts = np.full(len(losses), batch_size)
    counts[-1] = samples - (len(losses) - 1) * batch_size
    return float((losses.astype(np.float64) * counts).sum() / samples)


@dataclass(frozen=True)
class Position:
    """Where training stands."""

    epoch: int = 0
    """Whole epochs done."""
    step: int = 0
    """Steps done in the epoch after those."""
    losses: tuple[float, ...] = ()
    """The loss of each of those steps."""


class Trainer:
    """Trains a network on pictures.

    Everything an epoch needs is allocated here: the pictures (or a batch of them), their order, and one loss a step.
    """

    def __init__(self, network: Network, images: Pictures, *, learning_rate: float, seed: int) -> None:
        """Take ``images`` (samples, 3, H, W) uint8; an array is moved to the device."""
        self.network = network
        self.learning_rate = learning_rate
        self.seed = seed
        self.samples = len(images)
        self.epochs_done = 0
        self.steps_done = 0
        """Steps taken of the epoch that is under way; 0 between epochs."""
        backend = network.backend
        self._batches = _batches(backend, images, network.batch_size)
        self._order = np.arange(self.samples, dtype=np.int32)
        self.steps = -(-self.samples // network.batch_size)
        self._losses = backend.upload(np.zeros(self.steps, np.float32))
        self._peeked = backend.upload(np.zeros(1, np.float32))

    def run_epoch(self) -> None:
        """Shuffle, then take every step, the last one with what is left; synchronised at the end."""
        self.take_steps(self.steps)

    def take_steps(self, count: int) -> None:
        """Take the next ``count`` steps of the epoch, or those that are left of it; synchronised at the end."""
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
        """Run every size of batch once, so that whatever is compiled is; training stands where it stood."""
        backend = self.network.backend
        parameters, losses = self.network.read_parameters(), self.read_losses()
        for index in {0, self.steps - 1}:
            images, order, start, n = self._batches.batch(index)
            self.network.step(images, order, start, n, 0.0, self._losses, index)
        backend.synchronize()
        self.network.write_parameters(parameters)
        backend.write(self._losses, losses)

    def peek_loss(self) -> float:
        """The loss of the step that comes next, with the parameters as they are; nothing is learned from it."""
        if self.steps_done == 0:
            self._begin_epoch()
        backend = self.network.backend
        _forward_loss(self.network, *self._batches.batch(self.steps_done), self._peeked, 0)
        backend.synchronize()
        return float(backend.read(self._peeked)[0])

    def order_digest(self) -> str:
        """SHA-256 of the order of the epoch that is under way, or of the next one, as int32 in little-endian bytes."""
        shuffle_epoch(self._order, self.seed, self.epochs_done)
        return sha256(self._order.astype("<i4", copy=False).tobytes()).hexdigest()

    def position(self) -> Position:
        """Where training stands, to ``restore`` from."""
        losses = self.read_losses()[: self.steps_done]
        return Position(self.epochs_done, self.steps_done, tuple(map(float, losses)))

    def restore(self, position: Position) -> None:
        """Go on from there; the parameters are the network's. ValueError if the epoch has no such step."""
        if not 0 <= position.step < self.steps or len(position.losses) != position.step:
            raise ValueError(f"step {position.step} with {len(position.losses)} losses: an epoch has {self.steps}")
        self.epochs_done, self.steps_done = position.epoch, position.step
        losses = np.zeros(self.steps, np.float32)
        losses[: position.step] = position.losses
        self.network.backend.write(self._losses, losses)
        self._begin_epoch()

    def read_losses(self) -> np.ndarray:
        """The loss of each step, before its update: of the last epoch, and over them those of the one under way."""
        self.network.backend.synchronize()
        return self.network.backend.read(self._losses)

    def read_epoch_loss(self) -> float:
        """The last epoch's mean loss over its pictures (a smaller last batch counts for less)."""
        return mean_loss(self.read_losses(), self.samples, self.network.batch_size)

    def reconstruct(self, count: int) -> np.ndarray:
        """What the network makes of the first ``count`` pictures, at most a batch: float32 (count, C, H, W)."""
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

    Yields float32 (n, C, H, W) in canonical order on the host, a batch at a time. Whatever the network's activations
    held is lost.
    """
    batches = _batches(network.backend, images, network.batch_size)
    batches.begin(np.arange(len(images), dtype=np.int32))
    for index in range(batches.count):
        yield run_forward(network, *batches.batch(index), stages)


def run_forward(
    network: Network, images: Buffer, order: Buffer, start: int, n: int, stages: int | None = None
) -> np.ndarray:
    """Run stages forward on pictures ``order[start:start + n]``; float32 (n, C, H, W) on the host."""
    backend = network.backend
    backend.gather_batch(images, order, start, network.views(n).picture)
    output = network.forward(n, stages)
    backend.synchronize()
    return to_canonical(backend.read(output), backend.layout)


class Evaluator:
    """The mean squared error of a network on pictures that it does not learn from."""

    def __init__(self, network: Network, images: Pictures) -> None:
        """Take ``images`` (samples, 3, H, W) uint8; an array is moved to the device."""
        self.network = network
        self.samples = len(images)
        self._batches = _batches(network.backend, images, network.batch_size)
        self._batches.begin(np.arange(self.samples, dtype=np.int32))
        self._losses = network.backend.upload(np.zeros(self._batches.count, np.float32))

    def mse(self) -> float:
        """Over every value of every picture."""
        network, backend = self.network, self.network.backend
        for index in range(self._batches.count):
            _forward_loss(network, *self._batches.batch(index), self._losses, index)
        backend.synchronize()
        return mean_loss(backend.read(self._losses), self.samples, network.batch_size)


def _forward_loss(
    network: Network, images: Buffer, order: Buffer, start: int, n: int, losses: Buffer, index: int
) -> None:
    """Write the loss of pictures ``order[start:start + n]`` into ``losses[index]``; nothing is learned from it."""
    picture = network.views(n).picture
    network.backend.gather_batch(images, order, start, picture)
    prediction = network.forward(n)
    network.backend.mse_loss(prediction, picture, prediction, losses, index)


# Batches ------------------------------------------------------------------------------------------------------------


class _ResidentBatches:
    """All pictures on the device; a batch is a part of the order, gathered there."""

    def __init__(self, backend: Backend, images: np.ndarray, batch_size: int) -> None:
        self._backend = backend
        self._batch_size, self._samples = batch_size, len(images)
        self.count = -(-len(images) // batch_size)
        self._images = backend.upload(images)
        self._order = backend.upload(np.arange(len(images), dtype=np.int32))

    def begin(self, order: np.ndarray) -> None:
        """Take the pictures in this order from now on."""
        self._backend.write(self._order, order)

    def batch(self, index: int) -> tuple[Buffer, Buffer, int, int]:
        """What ``gather_batch`` wants for batch ``index``, images, order and start, and how many pictures it has."""
        start = index * self._batch_size
        return self._images, self._order, start, min(self._batch_size, self._samples - start)


class _StreamedBatches:
    """One batch of pictures on the device, gathered on the host from files, in the order that it is to have."""

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
        """Take the pictures in this order from now on."""
        self._order[:] = order

    def batch(self, index: int) -> tuple[Buffer, Buffer, int, int]:
        """Gather batch ``index`` and move it to the device; answers as the resident ones do."""
        chosen = self._order[index * self._batch_size : (index + 1) * self._batch_size]
        self._source.gather(chosen, self._host[: len(chosen)])
        self._backend.write(self._images, self._host)
        return self._images, self._in_order, 0, len(chosen)


def _batches(backend: Backend, images: Pictures, batch_size: int) -> _ResidentBatches | _StreamedBatches:
    kind = _StreamedBatches if isinstance(images, PictureFiles) else _ResidentBatches
    return kind(backend, images, batch_size)
