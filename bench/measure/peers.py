"""What the suite's versions are measured against: the same network in PyTorch, in the forms in which people train it.

A peer trains from the same initial weights on the same batches in the same order, on the same device and threads. It is
verified before it is timed: the loss and every gradient of a whole training step against the float64 reference, and the
loss of its first epoch against the versions'. Needs the extra ``peers``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.architecture import Architecture
from common.backend import Device, Precision
from common.checks import FULL_STEP_TOLERANCE, Check, check_close
from common.errors import UsageError
from common.plans import Layout
from common.training import mean_loss, shuffle_epoch
from common.verify import parameter_checks, repeated_batch


@dataclass(frozen=True)
class Peer:
    """One way to train the network with another library."""

    name: str
    idea: str
    layout: Layout
    compiled: bool = False

    @property
    def label(self) -> str:
        """As charts and tables show it."""
        return f"PyTorch {self.idea} ({self.layout})"

    def effective_precision(self, device: Device, precision: Precision) -> Precision:
        """The arithmetic that is used when ``precision`` is asked for: TF32 exists on GPUs only."""
        return precision if device == "gpu" else "fp32"

    def error_factor(self, architecture: Architecture) -> float:
        """1: it is held to the bound of a direct sum."""
        return 1.0

    def training_flops(self, architecture: Architecture) -> int:
        """FLOPs of a training step for one picture, by direct convolution: what the library does is not known."""
        return architecture.training_flops


PEERS: dict[str, tuple[Peer, ...]] = {
    "torch": (
        Peer("torch-eager", "eager", "NCHW"),
        Peer("torch-channels-last", "channels_last", "NHWC"),
        Peer("torch-compiled", "compiled", "NHWC", compiled=True),
    )
}


def find_peers(names: list[str] | None) -> tuple[Peer, ...]:
    """All forms of the named peers; UsageError for an unknown one, or where its library is missing."""
    for name in names or ():
        if name not in PEERS:
            raise UsageError(f"unknown peer {name!r}: choose from {', '.join(PEERS)}")
        if importlib.util.find_spec(name) is None:
            raise UsageError('--peer torch needs PyTorch: python -m pip install -e ".[peers]"')
    return tuple(peer for name in dict.fromkeys(names or ()) for peer in PEERS[name])


def find_peer(name: str) -> Peer:
    """The peer of that name; KeyError if there is none."""
    return {peer.name: peer for peers in PEERS.values() for peer in peers}[name]


def torch_autoencoder(architecture: Architecture, parameters: dict[str, np.ndarray]):
    """Build the network as a ``torch.nn.Sequential`` with these parameters (canonical order)."""
    import torch
    from torch import nn

    layers: list[nn.Module] = []
    for stage in architecture.stages:
        convolution = nn.Conv2d(stage.in_channels, stage.out_channels, 3, padding=1)
        with torch.no_grad():
            convolution.weight.copy_(torch.from_numpy(parameters[f"{stage.name}.weight"]))
            convolution.bias.copy_(torch.from_numpy(parameters[f"{stage.name}.bias"]))
        layers.append(convolution)
        if stage.resample is not None:
            layers.append(nn.ReLU())
            layers.append(nn.MaxPool2d(2) if stage.resample == "maxpool" else nn.Upsample(scale_factor=2))
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class TorchForm:
    """A peer on a device, in an arithmetic, with a number of threads."""

    peer: Peer
    device: Device
    precision: Precision
    threads: int


class TorchTrainer:
    """``common.training.Trainer`` in PyTorch: the same epochs of the same batches."""

    def __init__(
        self, form: TorchForm, architecture: Architecture, parameters: dict[str, np.ndarray], *, learning_rate: float
    ) -> None:
        """Build the network; sets PyTorch's threads and TF32 for the whole process."""
        import torch

        torch.set_num_threads(form.threads)
        # cuDNN would take TF32 unasked.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = form.precision == "tf32"
        torch.backends.cudnn.benchmark = True  # let cuDNN try its algorithms in the warm-up epoch and keep the fastest
        peer = form.peer
        self._torch = torch
        self._device = torch.device("cuda" if form.device == "gpu" else "cpu")
        self._format = torch.channels_last if peer.layout == "NHWC" else torch.contiguous_format
        self._names = list(parameters)
        self.model = torch_autoencoder(architecture, parameters).to(self._device, memory_format=self._format)
        # One shape for the full batch and one for the last: each is compiled for itself, in the warm-up epoch.
        self._run = torch.compile(self.model, dynamic=False) if peer.compiled else self.model
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate)

    def load(self, images: np.ndarray, *, batch_size: int, seed: int) -> None:
        """Move ``images`` (samples, 3, H, W) uint8 to the device; epochs begin anew."""
        torch = self._torch
        self._images = torch.from_numpy(images).to(self._device)
        self.samples, self.batch_size, self.seed = len(images), batch_size, seed
        self.epochs_done = 0
        self.steps = -(-self.samples // batch_size)
        self._order = np.arange(self.samples, dtype=np.int32)
        self._losses = torch.zeros(self.steps, device=self._device)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()

    def indices(self, order: np.ndarray) -> Any:
        """Move picture numbers to the device."""
        return self._torch.from_numpy(order).to(self._device)

    def pictures(self, chosen: Any) -> Any:
        """Gather and scale a batch as the versions do: bytes on the device to floats in [0, 1]."""
        return self._images[chosen].to(memory_format=self._format).float() / 255

    def step(self, chosen: Any) -> Any:
        """One training step on the pictures of these indices; returns the loss, still on the device."""
        x = self.pictures(chosen)
        self._optimizer.zero_grad()
        loss = self._torch.nn.functional.mse_loss(self._run(x), x)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def run_epoch(self) -> None:
        """Shuffle, then take every step; synchronised at the end."""
        shuffle_epoch(self._order, self.seed, self.epochs_done)
        order = self.indices(self._order)
        for index in range(self.steps):
            start = index * self.batch_size
            self._losses[index] = self.step(order[start : start + self.batch_size])
        self.synchronize()
        self.epochs_done += 1

    def read_epoch_loss(self) -> float:
        """The last epoch's mean loss over its pictures."""
        return mean_loss(self._losses.cpu().numpy(), self.samples, self.batch_size)

    def reconstruct(self, count: int) -> np.ndarray:
        """What the network makes of the first ``count`` pictures: float32 (count, C, H, W)."""
        n = min(count, self.samples, self.batch_size)
        with self._torch.no_grad():
            return self.model(self.pictures(slice(0, n))).contiguous().cpu().numpy()

    def read(self, *, gradients: bool) -> dict[str, np.ndarray]:
        """Every parameter, or its gradient, in canonical order."""
        values = (value.grad if gradients else value.detach() for value in self.model.parameters())
        return {name: value.contiguous().cpu().numpy() for name, value in zip(self._names, values, strict=True)}


def peer_checks(form: TorchForm, architecture: Architecture, n: int) -> Iterator[Check]:
    """Yield the checks of a peer's training step of n pictures against the float64 reference."""
    batch = repeated_batch(architecture, n)
    learning_rate = 0.5
    trainer = TorchTrainer(form, architecture, batch.parameters, learning_rate=learning_rate)
    trainer.load(batch.pictures, batch_size=n, seed=0)
    loss = trainer.step(trainer.indices(batch.order)).cpu().numpy()
    tolerance = FULL_STEP_TOLERANCE[form.precision]
    at = f"training step of {n} pictures"
    yield check_close(f"{at}: loss", loss[None], np.array([batch.loss]), tolerance * batch.loss)
    gradients, updated = trainer.read(gradients=True), trainer.read(gradients=False)
    yield from parameter_checks(at, batch.parameters, gradients, updated, batch.gradients, learning_rate, tolerance)
