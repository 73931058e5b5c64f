"""What a training run records: the figures of each epoch, and the checkpoint from which training continues."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from bench.model import CHECKED, AtLeastOne, Count, NotNegative, Positive
from common.architecture import Architecture
from common.backend import Device, Precision
from common.training import Position

Natural = Annotated[int, Field(ge=0)]
"""Not negative, and as large as the user likes."""


def psnr_db(mse: float | None) -> float | None:
    """Peak signal-to-noise ratio of values in [0, 1], in decibels: -10 log10(MSE); None without an error."""
    return None if not mse else -10 * math.log10(mse)


@dataclass(config=CHECKED, frozen=True)
class EpochFigures:
    """The figures of one epoch."""

    epoch: AtLeastOne
    step: AtLeastOne
    """Steps since the start of training."""
    learning_rate: Positive
    train_mse: NotNegative
    held_out_mse: NotNegative | None
    epoch_s: NotNegative
    images_per_s: NotNegative
    backend: str
    device: str
    curve: list[float]
    """The loss within the epoch: means over neighbouring steps."""

    @property
    def train_psnr_db(self) -> float | None:
        """PSNR of the training error."""
        return psnr_db(self.train_mse)

    @property
    def held_out_psnr_db(self) -> float | None:
        """PSNR of the held-out error."""
        return psnr_db(self.held_out_mse)

    def scalars(self) -> dict[str, float | None]:
        """The figures that TensorBoard shows, by tag."""
        return {
            "mse/train": self.train_mse,
            "mse/held_out": self.held_out_mse,
            "psnr_db/train": self.train_psnr_db,
            "psnr_db/held_out": self.held_out_psnr_db,
            "images_per_s": self.images_per_s,
        }


@dataclass(config=CHECKED, frozen=True)
class BestEpoch:
    """The epoch with the smallest error on held-out pictures, or on the training pictures where none are held out."""

    epoch: AtLeastOne
    mse: NotNegative


@dataclass(config=CHECKED, frozen=True)
class DataIdentity:
    """What identifies a run's pictures: where they come from, how many are held out, SHA-256 of a sample of them."""

    source: str
    held_out: Count
    sha256: str


@dataclass(config=CHECKED, frozen=True)
class Requested:
    """Options that no network depends on; a resumed run inherits them unless they are given again."""

    epochs: Natural
    checkpoint_steps: Natural
    """Also write ``last.safetensors`` after this many steps; 0: only at the end of an epoch and by the clock."""
    data: str
    data_dir: str


@dataclass(config=CHECKED, frozen=True, kw_only=True)
class NetworkSettings:
    """Which version runs a network, where and how."""

    backend: str
    device: Device
    precision: Annotated[Precision, Field(alias="math")]
    threads: AtLeastOne
    batch_size: AtLeastOne


@dataclass(config=CHECKED, frozen=True, kw_only=True)
class TrainSettings(NetworkSettings):
    """The settings of a training run."""

    learning_rate: Positive
    seed: Natural
    """Decides the initial weights and, with the epoch's number, the order of the pictures."""
    asked: Requested


@dataclass(config=ConfigDict(**CHECKED, arbitrary_types_allowed=True), frozen=True, kw_only=True)
class Checkpoint(TrainSettings):
    """Parameters in canonical order, the position of training, and its settings."""

    parameters: dict[str, np.ndarray] = Field(default_factory=dict, exclude=True)
    """Tensors in the file; every other field is metadata."""
    architecture: Architecture
    epoch: Count
    step: Count
    losses: tuple[float, ...]
    """With ``epoch`` and ``step`` the position of training; see ``Position``."""
    order_sha256: str
    """SHA-256 of the current epoch's order: a NumPy that shuffles differently cannot continue the run."""
    samples: AtLeastOne
    data: DataIdentity
    commit: str
    epoch_seconds: NotNegative
    """Time spent so far on the current epoch."""
    history: list[EpochFigures]
    best: BestEpoch | None

    @property
    def position(self) -> Position:
        """Where the trainer continues."""
        return Position(self.epoch, self.step, self.losses)

    @model_validator(mode="after")
    def _consistent(self) -> Checkpoint:
        steps = -(-self.samples // self.batch_size)
        if self.step >= steps or (len(self.losses), len(self.history)) != (self.step, self.epoch):
            found = f"{len(self.losses)} losses, figures of {len(self.history)} epochs, {steps} steps an epoch"
            raise ValueError(f"epoch {self.epoch}, step {self.step}, but {found}")
        return self
