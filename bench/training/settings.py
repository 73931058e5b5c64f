"""With which version, where and how a network runs, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.architecture import Architecture
from common.backend import Device, Precision
from common.network import Network
from versions.registry import BackendInfo


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The version, and where it runs."""

    backend: BackendInfo
    device: Device
    precision: Precision
    threads: int
    batch_size: int

    def network(self, architecture: Architecture, parameters: dict[str, np.ndarray]) -> Network:
        """A network with these parameters (canonical order)."""
        backend = self.backend.load(self.device, precision=self.precision, threads=self.threads)
        return Network(backend, architecture, self.batch_size, parameters)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(NetworkSettings):
    """The settings of a training run, with every default filled in."""

    epochs: int
    learning_rate: float
    seed: int
    checkpoint_steps: int = 0
    """Also write ``last.safetensors`` after this many steps; 0: only at the end of an epoch and by the clock."""
    tensorboard: bool = False
    data: str = ""
    data_dir: str = ""
    """Where the pictures are, for a resumed run."""
