"""Epochs of training: the same pictures in the same order for every version, nothing but work inside."""

from __future__ import annotations

import numpy as np

from common.backend import to_canonical
from common.network import Network


def shuffle_epoch(order: np.ndarray, seed: int, epoch: int) -> None:
    """Write the order of an epoch's pictures into ``order`` (samples,) int32; the arguments alone decide it."""
    order[:] = np.arange(len(order), dtype=order.dtype)
    np.random.default_rng([seed, epoch]).shuffle(order)


def mean_loss(losses: np.ndarray, samples: int, batch_size: int) -> float:
    """An epoch's mean loss over its pictures, from each step's; a smaller last batch counts for less."""
    counts = np.full(len(losses), batch_size)
    counts[-1] = samples - (len(losses) - 1) * batch_size
    return float((losses.astype(np.float64) * counts).sum() / samples)


class Trainer:
    """Trains a network on pictures held on the device as bytes.

    Everything an epoch needs is allocated here: the pictures, their order, and one loss a step.
    """

    def __init__(self, network: Network, images: np.ndarray, *, learning_rate: float, seed: int) -> None:
        """Move ``images`` (samples, 3, H, W) uint8 to the device."""
        self.network = network
        self.learning_rate = learning_rate
        self.seed = seed
        self.samples = len(images)
        self.epochs_done = 0
        backend = network.backend
        self._images = backend.upload(images)
        self._order = np.arange(self.samples, dtype=np.int32)
        self._device_order = backend.upload(self._order)
        self.steps = -(-self.samples // network.batch_size)
        self._losses = backend.upload(np.zeros(self.steps, np.float32))

    def run_epoch(self) -> None:
        """Shuffle, then take every step, the last one with what is left; synchronised at the end."""
        shuffle_epoch(self._order, self.seed, self.epochs_done)
        backend = self.network.backend
        backend.write(self._device_order, self._order)
        for index in range(self.steps):
            start = index * self.network.batch_size
            n = min(self.network.batch_size, self.samples - start)
            self.network.step(self._images, self._device_order, start, n, self.learning_rate, self._losses, index)
        backend.synchronize()
        self.epochs_done += 1

    def read_losses(self) -> np.ndarray:
        """The last epoch's loss at each step, before that step's update."""
        self.network.backend.synchronize()
        return self.network.backend.read(self._losses)

    def read_epoch_loss(self) -> float:
        """The last epoch's mean loss over its pictures (a smaller last batch counts for less)."""
        return mean_loss(self.read_losses(), self.samples, self.network.batch_size)

    def reconstruct(self, count: int) -> np.ndarray:
        """What the network makes of the first ``count`` pictures, at most a batch: float32 (count, C, H, W)."""
        n = min(count, self.samples, self.network.batch_size)
        backend = self.network.backend
        backend.write(self._device_order, np.arange(self.samples, dtype=np.int32))
        backend.gather_batch(self._images, self._device_order, 0, self.network.views(n).picture)
        prediction = self.network.forward(n)
        backend.synchronize()
        return to_canonical(backend.read(prediction), backend.layout)
