"""The files that training and its commands write, apart from checkpoints, and the errors when that fails.

Events for TensorBoard are written in this thread and flushed at once, so that a full disk raises an error there.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.records.files import clear_drafts, create_file
from bench.records.training import EpochFigures
from bench.views.pictures import grid_png
from common.errors import RunError, UsageError
from common.network import Network
from common.picture_files import first_pictures
from common.training import Pictures, forward_batches

COLUMNS = (
    "epoch", "step", "learning_rate", "train_mse", "train_psnr_db", "held_out_mse", "held_out_psnr_db", "epoch_s",
    "images_per_s", "backend", "device",
)  # fmt: skip
SHOWN = 16  # pictures in the grid


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Inside, an OSError becomes a RunError that names ``path``."""
    try:
        yield path
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def check_new(path: Path) -> None:
    """Raise UsageError if the name is taken, or if its folder does not exist."""
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: choose another name")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")


def write_new(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a new file, completely or not at all; of data in parts, one at a time is in memory.

    Raises UsageError if the file exists or its folder does not, and RunError if it cannot be written.
    """
    check_new(path)
    clear_drafts(path)
    with writing(path):
        create_file(path, data)


def npy_chunks(parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> Iterator[bytes]:
    """The content of a ``.npy`` file of this shape, whose rows come in parts."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    yield header.getvalue()
    for part in parts:
        yield np.ascontiguousarray(part, dtype).data


def metrics_csv(history: list[EpochFigures]) -> bytes:
    """A line for each epoch."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(figures, name) for name in COLUMNS] for figures in history)
    return text.getvalue().encode()


def reconstructions_png(network: Network, pictures: Pictures) -> bytes:
    """The first pictures above their reconstructions."""
    originals = first_pictures(pictures, min(SHOWN, len(pictures)))
    return grid_png(originals, np.concatenate(list(forward_batches(network, originals))))


class Scalars:
    """A TensorBoard event file in ``folder``; every method raises OSError if the disk refuses it."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin a file for the steps after ``step``."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        try:
            self._write(0, file_version="brain.Event:2")
            # A mark: TensorBoard discards the later steps that a killed process wrote. Steps count from 1.
            self._write(step + 1, session_log=SessionLog(status=SessionLog.START))
        except OSError:
            self.close()
            raise

    def add(self, values: Iterable[tuple[int, dict[str, float | None]]]) -> None:
        """Write steps and their values by tag, None left out, and flush the file to the disk."""
        for step, tags in values:
            for tag, value in tags.items():
                if value is not None:
                    self._write(step, summary=self._scalar(tag, value))
        self._records.flush()

    def close(self) -> None:
        """End the file."""
        self._records.close()

    def _write(self, step: int, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())
