"""The files that training and its commands write, apart from checkpoints, and the errors when that fails."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
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


@contextlib.contextmanager
def scalar_writer(folder: Path | None, step: int) -> Iterator[Callable[[int, dict[str, float | None]], None]]:
    """A function that adds values by tag to a new TensorBoard event file in ``folder``, for the steps after ``step``.

    It writes in this thread and flushes at once, so that a full disk raises an error there. Without a folder it does
    nothing.
    """
    if folder is None:
        yield lambda step, values: None
        return
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import scalar

    def write(step: int, **content: Any) -> None:
        records.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())

    def add(step: int, values: dict[str, float | None]) -> None:
        with writing(folder):
            for tag, value in values.items():
                if value is not None:
                    write(step, summary=scalar(tag, value))
            records.flush()

    with writing(folder):
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
    try:
        with writing(folder):
            write(0, file_version="brain.Event:2")
            # A mark: TensorBoard discards the later steps that a killed process wrote. Steps count from 1.
            write(step + 1, session_log=SessionLog(status=SessionLog.START))
        yield add
    finally:
        with contextlib.suppress(OSError):  # the content is on the disk already
            records.close()
