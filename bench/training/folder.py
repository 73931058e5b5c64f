"""The folder of a training run: kept to one process, and taken up only for the run that it holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.records.files import clear_drafts
from bench.training.checkpoint import Checkpoint, load_checkpoint
from bench.training.data import TrainingData
from common.architecture import Architecture
from common.errors import UsageError

LAST, BEST = "last.safetensors", "best.safetensors"
METRICS, LOSS_CHART, PICTURES = "metrics.csv", "loss.png", "reconstructions.png"
SCALARS = "tensorboard"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder and keep it to this process; UsageError if it cannot be written to or another trains there.

    The lock is the system's and ends with the process, however that ends.
    """
    made = [path for path in (*reversed(out.parents), out) if not path.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UsageError(f"cannot write to {out}: {error.strerror or error}") from error
        with _flock(out):
            for name in (LAST, BEST, METRICS, LOSS_CHART, PICTURES):
                clear_drafts(out / name)
            yield
    except BaseException:  # if nothing came of it, nothing stays of it: a folder with something in it does stay
        for path in reversed(made):
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
        except OSError:  # a file system that has no locks
            pass
        yield
    finally:
        os.close(handle)


def find_start(out: Path, architecture: Architecture, *, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; None to begin anew.

    UsageError if there is one that nobody asked for, none where one was asked for, or a damaged one.
    """
    last = out / LAST
    if not resume:
        taken = [name for name in (LAST, BEST, METRICS, LOSS_CHART, PICTURES, SCALARS) if os.path.lexists(out / name)]
        if taken and taken[0] in (LAST, BEST):
            raise UsageError(f"{out} holds a training run ({taken[0]}): --resume goes on, another --out begins anew")
        if taken:
            raise UsageError(f"{out} has {taken[0]} already, which would be written over: choose another --out")
        return None
    if not last.is_file():
        way = _way_out(out, architecture) or ". Without --resume a new run begins"
        raise UsageError(f"nothing to resume: there is no {last}{way}")
    try:
        return load_checkpoint(last, architecture)
    except UsageError as error:
        raise UsageError(f"{error}{_way_out(out, architecture)}") from error


def _way_out(out: Path, architecture: Architecture) -> str:
    try:
        best = load_checkpoint(out / BEST, architecture)
    except UsageError:
        return ""
    return f". {out / BEST} (epoch {best.position.epoch}) is sound: copied to {LAST} it can be resumed"


def best_of(out: Path, start: Checkpoint) -> dict[str, Any] | None:
    """Epoch and error of the best checkpoint that is there; None if there is none of the same run that can be read.

    A process that was killed between its two checkpoints had written the best one already.
    """
    try:
        best = load_checkpoint(out / BEST, start.architecture)
    except UsageError:
        return None
    same = (best.seed, best.samples, best.data) == (start.seed, start.samples, start.data)
    return best.best if same and best.position.epoch <= start.position.epoch + 1 else None


def check_resumable(checkpoint: Checkpoint, seed: int, batch_size: int, data: TrainingData, path: Path) -> None:
    """Raise UsageError if going on with these settings and pictures would not be the same training run."""
    for name, theirs, ours in (
        ("--seed", checkpoint.seed, seed),
        ("--batch-size", checkpoint.batch_size, batch_size),
        ("--samples", checkpoint.samples, len(data.train)),
    ):
        if theirs != ours:
            raise UsageError(f"{path} was trained with {name} {theirs}, not {ours}: leave it out, or begin anew")
    found = data.as_metadata()
    if any(checkpoint.data[key] != found[key] for key in ("held_out", "sha256")):
        raise UsageError(
            f"{path} was trained on other pictures ({checkpoint.data['source']}, {checkpoint.data['held_out']} held "
            f"out): give the same --data, --data-dir and --held-out, or begin anew"
        )
