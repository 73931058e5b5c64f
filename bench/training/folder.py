"""The folder of a training run: one process at a time, and only the run that it belongs to is resumed there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bench.records.documents import check_writable
from bench.records.files import clear_drafts
from bench.records.training import BestEpoch, Checkpoint, DataIdentity, TrainSettings
from bench.training.checkpoint import load_checkpoint
from common.architecture import Architecture
from common.errors import UsageError

LAST, BEST = "last.safetensors", "best.safetensors"
METRICS, LOSS_CHART, PICTURES = "metrics.csv", "loss.png", "reconstructions.png"
SCALARS = "tensorboard"
FILES = (LAST, BEST, METRICS, LOSS_CHART, PICTURES)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder and lock it for this process; UsageError if that fails or another process trains there."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            check_writable(out)
        except OSError as error:
            raise UsageError(f"cannot write to {out}: {error.strerror or error}") from error
        with _flock(out):
            for name in FILES:
                clear_drafts(out / name)
            yield
    except BaseException:  # remove the folders made here that are still empty
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _flock(out: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process trains in {out}: choose another --out, or wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def find_start(out: Path, architecture: Architecture, *, resume: bool) -> Checkpoint | None:
    """The checkpoint to continue from; None for a new run.

    UsageError if there is a run but ``resume`` is not set, or if it is set and there is no intact checkpoint.
    """
    last = out / LAST
    if not resume:
        taken = next((name for name in (*FILES, SCALARS) if os.path.lexists(out / name)), None)
        if taken:
            remedy = "--resume continues a run, another --out begins a new one"
            raise UsageError(f"{out} already has {taken}, which would be overwritten: {remedy}")
        return None
    try:
        if not last.is_file():
            raise UsageError(f"nothing to resume: there is no {last}")
        return load_checkpoint(last, architecture)
    except UsageError as error:
        try:
            best = load_checkpoint(out / BEST, architecture)
        except UsageError:
            raise error from None
        remedy = f"{out / BEST} (epoch {best.epoch}) is intact: copy it to {LAST} to resume from it"
        raise UsageError(f"{error}. {remedy}") from error


def best_of(out: Path, start: Checkpoint) -> BestEpoch | None:
    """Epoch and error of ``best.safetensors``; None if there is none of the same run that can be read.

    The best checkpoint is written first: a process killed between the two leaves it one epoch ahead.
    """
    try:
        best = load_checkpoint(out / BEST, start.architecture)
    except UsageError:
        return None
    same = (best.seed, best.samples, best.data) == (start.seed, start.samples, start.data)
    return best.best if same and best.epoch <= start.epoch + 1 else None


def check_resumable(start: Checkpoint, settings: TrainSettings, samples: int, data: DataIdentity, path: Path) -> None:
    """Raise UsageError if these settings and pictures would make it a different training run."""
    for name, theirs, ours in (
        ("--seed", start.seed, settings.seed),
        ("--batch-size", start.batch_size, settings.batch_size),
        ("--samples", start.samples, samples),
    ):
        if theirs != ours:
            raise UsageError(f"{path} was trained with {name} {theirs}, not {ours}: leave it out, or begin a new run")
    if (data.held_out, data.sha256) != (start.data.held_out, start.data.sha256):
        raise UsageError(
            f"{path} was trained on other pictures ({start.data.source}, {start.data.held_out} held out): give the "
            f"same --data, --data-dir and --held-out, or begin a new run"
        )
