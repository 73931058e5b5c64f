"""Epochs of training: the same pictures in the same order for every version, nothing but work inside."""

from __future__ import annotations

import numpy as np

from common.network import Network


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
        self._identity = np.arange(self.samples, dtype=np.int32)
        self._order = self._identity.copy()
        self._device_order = backend.upload(self._order)
        self.steps = -(-self.samples // network.batch_size)
        self._losses = backend.upload(np.zeros(self.steps, np.float32))

    def run_epoch(self) -> None:
        """Shuffle, then take every step, the last one with what is left; synchronised at the end.

        The order depends on the seed and the epoch's number alone.
        """
        np.copyto(self._order, self._identity)
        np.random.default_rng([self.seed, self.epochs_done]).shuffle(self._order)
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
        losses = self.read_losses().astype(np.float64)
        counts = np.full(self.steps, self.network.batch_size)
        counts[-1] = self.samples - (self.steps - 1) * self.network.batch_size
        return float((losses * counts).sum() / self.samples)
