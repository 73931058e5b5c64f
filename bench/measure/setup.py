"""Which versions run, where and how; and what a worker process is told of that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.measure.peers import Peer
from common.architecture import Architecture, scaled_autoencoder
from common.backend import Device, Precision
from versions.registry import BackendInfo


@dataclass(frozen=True)
class WorkerTask:
    """What a worker process is told when it starts, as one line of JSON."""

    backend: str
    peer: bool
    device: Device
    precision: Precision
    threads: int
    batch_size: int
    verified_sizes: tuple[int, ...]
    learning_rate: float
    seed: int
    images: str | None
    """A ``.npy`` file of the pictures to train on; None for a process that does not train."""
    width: float = 1.0
    """The network's inner filters, as a multiple of those of width 1."""

    @property
    def architecture(self) -> Architecture:
        """The network to verify or to train."""
        return scaled_autoencoder(self.width)


@dataclass(frozen=True)
class Setup:
    """The versions and peers of one measurement, and what is the same for all of them."""

    infos: tuple[BackendInfo | Peer, ...]
    device: Device
    precision: Precision
    threads: int
    batch_size: int = 64
    verified_sizes: tuple[int, ...] = ()
    """The batch sizes at which a whole training step is verified."""
    learning_rate: float = 0.001
    seed: int = 0
    width: float = 1.0
    """The network's inner filters, as a multiple of those of width 1."""

    @property
    def architecture(self) -> Architecture:
        """The network that is verified and trained; UsageError if no network has this width."""
        return scaled_autoencoder(self.width)

    @property
    def by_row(self) -> dict[str, BackendInfo | Peer]:
        """The version or peer of every row, by the row's id; one that is named again is ``v4#2``."""
        counts: dict[str, int] = {}
        found: dict[str, BackendInfo | Peer] = {}
        for info in self.infos:
            number = counts[info.name] = counts.get(info.name, 0) + 1
            found[info.name if number == 1 else f"{info.name}#{number}"] = info
        return found

    def messages(self, rounds: int) -> int:
        """How often a measurement of so many rounds reports its progress if nothing fails."""
        return 2 + len({info.name for info in self.infos}) + len(self.infos) * (1 + rounds)

    def precision_of(self, info: BackendInfo | Peer) -> Precision:
        """The arithmetic that ``info`` really uses here."""
        return info.effective_precision(self.device, self.precision)

    def task(self, info: BackendInfo | Peer, images: Path | None) -> WorkerTask:
        """The task for the process of ``info``."""
        return WorkerTask(
            backend=info.name,
            peer=isinstance(info, Peer),
            device=self.device,
            precision=self.precision_of(info),
            threads=self.threads,
            batch_size=self.batch_size,
            verified_sizes=self.verified_sizes,
            learning_rate=self.learning_rate,
            seed=self.seed,
            images=str(images) if images else None,
            width=self.width,
        )

    def row_fields(self, row_id: str) -> dict[str, str | float]:
        """The fields that every kind of row takes from here."""
        info = self.by_row[row_id]
        return {
            "id": row_id,
            "backend": info.name,
            "label": info.label,
            "device": self.device,
            "layout": info.layout,
            "precision": self.precision_of(info),
            "error_factor": info.error_factor(self.architecture),
        }


def epoch_batch_sizes(samples: int, batch_size: int) -> tuple[int, ...]:
    """The sizes of batch in an epoch, the largest first: the full one, and the last one if that is smaller."""
    return tuple(sorted({min(batch_size, samples), samples % batch_size} - {0}, reverse=True))
