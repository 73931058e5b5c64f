"""The files in a training run's folder, and how they are written.

The checkpoint is the only file that matters: it contains the figures of every epoch, and the other files are made from
it. Every file is replaced atomically. A write that fails raises RunError, which says which checkpoint is left.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np

from bench.records.files import replace_file
from bench.records.training import EpochFigures
from bench.training.checkpoint import Checkpoint, save_checkpoint
from bench.training.folder import LAST, LOSS_CHART, METRICS, PICTURES, SCALARS
from bench.training.scalars import Scalars
from bench.views.pictures import grid_png
from common.errors import RunError
from common.network import Network
from common.picture_files import first_pictures
from common.training import Pictures, forward_batches

COLUMNS = (
    "epoch", "step", "learning_rate", "train_mse", "train_psnr_db", "held_out_mse", "held_out_psnr_db", "epoch_s",
    "images_per_s", "backend", "device",
)  # fmt: skip
SHOWN = 16  # pictures in the grid
NO_CHECKPOINT = "no checkpoint was written yet"


class RunFiles:
    """Writes the files of one run."""

    def __init__(self, out: Path, start: Checkpoint | None) -> None:
        """Take the folder and the checkpoint that training continues from; nothing is written yet."""
        self.out = out
        self.saved = _place(start) if start else ""
        """Epoch and step of ``last.safetensors``; empty if there is none."""
        self.saved_at = perf_counter()
        self._scalars: Scalars | None = None

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Inside, add to every RunError which checkpoint is left."""
        try:
            yield
        except RunError as error:
            raise RunError(f"{error}; {self._left()}") from error

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """Inside, turn an OSError into a RunError that names the file."""
        try:
            yield self.out / name
        except OSError as error:
            raise RunError(f"cannot write {self.out / name}: {error.strerror or error}; {self._left()}") from error

    def _left(self) -> str:
        return f"{LAST} holds {self.saved}" if self.saved else NO_CHECKPOINT

    def save(self, checkpoint: Checkpoint, name: str) -> None:
        """Write a checkpoint."""
        with self._writing(name) as path:
            save_checkpoint(checkpoint, path)
        if name == LAST:
            self.saved, self.saved_at = _place(checkpoint), perf_counter()

    def write_metrics(self, history: list[EpochFigures]) -> None:
        """Write ``metrics.csv``, a line for each epoch."""
        if not history:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(figures, name) for name in COLUMNS] for figures in history)
        with self._writing(METRICS) as path:
            replace_file(path, text.getvalue().encode())

    def write_pictures(self, network: Network, pictures: Pictures) -> None:
        """Write ``reconstructions.png``: the first pictures above their reconstructions."""
        originals = first_pictures(pictures, min(SHOWN, len(pictures)))
        reconstructions = np.concatenate(list(forward_batches(network, originals)))
        with self._writing(PICTURES) as path:
            replace_file(path, grid_png(originals, reconstructions))

    def draw_losses(self, history: list[EpochFigures], samples: int, batch_size: int) -> None:
        """Write ``loss.png``."""
        if not history:
            return
        from bench.views.training_chart import training_png  # matplotlib is slow to import

        with self._writing(LOSS_CHART) as path:
            replace_file(path, training_png(history, samples, batch_size))

    def begin_scalars(self, step: int) -> None:
        """Begin an event file for TensorBoard, for the steps after ``step``."""
        with self._writing(SCALARS) as folder:
            self._scalars = Scalars(folder, step)

    def add_scalars(self, values: Iterable[tuple[int, dict[str, float | None]]]) -> None:
        """Write steps and their values by tag; nothing without ``begin_scalars``."""
        if self._scalars:
            with self._writing(SCALARS):
                self._scalars.add(values)

    def close(self) -> None:
        """End the event file, whose content is on the disk already."""
        if self._scalars:
            with contextlib.suppress(OSError):
                self._scalars.close()


def _place(checkpoint: Checkpoint) -> str:
    return f"epoch {checkpoint.epoch}, step {checkpoint.step}"
