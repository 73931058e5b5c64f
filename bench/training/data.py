"""The pictures that a training run learns from, and the held-out pictures that it is evaluated on.

The two sets share no picture: CIFAR-10 has a test split, photo crops come from separate parts of the photographs, and
the last pictures of an array are held out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil

from bench.records.training import DataIdentity
from common.dataset import FILES, SOURCES, choose_folder, labelled_crops, read_cifar10
from common.errors import UsageError, check_number
from common.picture_files import PictureFiles, chosen_pictures, open_cifar10, open_npy
from common.training import Pictures

HELD_OUT_SHARE, MOST_HELD_OUT = 5, 10_000  # by default one held-out picture for five training pictures
CROPS = 50_000  # as many as CIFAR-10 has
MEMORY_SHARE = 0.5  # of the free memory: pictures that need more stay in their files
DIGESTED = 1024  # pictures of each set that the SHA-256 covers


@dataclass(frozen=True)
class TrainingData:
    """Training pictures and held-out pictures, which may be none: arrays (N, 3, 32, 32) uint8, or files."""

    train: Pictures
    held_out: Pictures
    source: str
    description: str

    def identity(self) -> DataIdentity:
        """What a checkpoint keeps to recognise these pictures."""
        digest = sha256()
        for part in (self.train, self.held_out):
            if len(part):
                chosen = np.unique(np.linspace(0, len(part) - 1, min(len(part), DIGESTED)).astype(np.int64))
                digest.update(f"{len(part)}:".encode() + chosen_pictures(part, chosen).tobytes())
        return DataIdentity(self.source, len(self.held_out), digest.hexdigest())


def load_training_data(
    source: str,
    data_dir: Path,
    samples: int | None,
    held_out: int | None,
    seed: int,
    *,
    stream: bool = False,
    room_bytes: int | None = None,
) -> TrainingData:
    """Load pictures from ``source``: auto, cifar10, photos, or an array of them, ``FILE.npy``.

    ``samples`` is the number of training pictures: by default all, or as many crops as CIFAR-10 has pictures.
    ``held_out`` is the number of held-out pictures: by default one for five, at most 10,000. With ``stream``, or if the
    pictures need more than half of ``room_bytes`` (by default the free memory), they stay in their files and are read
    batch by batch. Raises UsageError for an unknown source, damaged files, and more pictures than there are.
    """
    check_number("samples", samples, 1)
    check_number("held-out pictures", held_out, 0)
    if source.endswith(".npy"):
        data = _from_array(Path(source), samples, held_out)
    elif folder := choose_folder(source, data_dir):
        data = _from_cifar10(folder, samples, held_out)
    elif stream:
        raise UsageError("--stream needs pictures in files: photo crops are cut in memory")
    else:
        return _from_photos(samples or CROPS, held_out, seed)
    room = MEMORY_SHARE * (psutil.virtual_memory().available if room_bytes is None else room_bytes)
    if stream or data.train.nbytes + data.held_out.nbytes > room:
        return data
    return replace(data, train=data.train.load(), held_out=data.held_out.load())


def load_split(source: str, data_dir: Path, split: str | None, count: int | None, seed: int) -> tuple[Pictures, str]:
    """The first ``count`` pictures of a split, train or test, and a line that describes them.

    ``source`` is as in ``load_training_data``; an array has no splits. The default is all pictures, or 10,000 crops.
    Raises UsageError for more pictures than there are, and for a split of an array.
    """
    check_number("samples", count, 1)
    if source.endswith(".npy"):
        if split is not None:
            raise UsageError(f"{source} is an array, which has no splits: leave --split out")
        return _first(open_npy(Path(source)), count, source), source
    split = split or "train"
    folder = choose_folder(source, data_dir)
    if folder is None:
        return labelled_crops(count or MOST_HELD_OUT, seed, split)[0], f"photo crops of the {split} part"
    return _first(open_cifar10(folder, split), count, folder), f"{folder}, {split}"


def load_labelled(source: str, data_dir: Path, split: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 3, 32, 32) uint8 of one split and their labels (N,): CIFAR-10's classes, or which photograph."""
    check_number("samples", count, 1)
    if source.endswith(".npy"):
        raise UsageError(f"{source} has no labels: choose from {', '.join(SOURCES)}")
    folder = choose_folder(source, data_dir)
    return labelled_crops(count, seed, split) if folder is None else read_cifar10(folder, split, count)


def _from_photos(samples: int, held_out: int | None, seed: int) -> TrainingData:
    train, _ = labelled_crops(samples, seed, "train")
    test, _ = labelled_crops(_default_held_out(samples) if held_out is None else held_out, seed, "test")
    part = "the left four fifths of scikit-learn's two sample photographs"
    return TrainingData(train, test, "photos", f"photo crops, {samples:,} of {part}")


def _from_cifar10(folder: Path, samples: int | None, held_out: int | None) -> TrainingData:
    train = _first(open_cifar10(folder, "train"), samples, folder)
    test = train.part(0, 0)
    if held_out or (held_out is None and (folder / FILES["test"][0]).exists()):
        files = open_cifar10(folder, "test")
        test = _first(files, held_out or min(_default_held_out(len(train)), len(files)), folder)
    return TrainingData(train, test, "cifar10", f"CIFAR-10, {len(train):,} training pictures from {folder}")


def _from_array(path: Path, samples: int | None, held_out: int | None) -> TrainingData:
    files = open_npy(path)
    if held_out is None:
        held_out = _default_held_out(samples) if samples else min(len(files) // (1 + HELD_OUT_SHARE), MOST_HELD_OUT)
        held_out = min(held_out, max(0, len(files) - (samples or 1)))
    samples = len(files) - held_out if samples is None else samples
    if samples < 1 or samples + held_out > len(files):
        raise UsageError(
            f"{samples:,} samples and {held_out:,} held out asked for, but {path} holds {len(files):,} pictures"
        )
    test = files.part(len(files) - held_out, held_out)
    return TrainingData(files.part(0, samples), test, path.name, f"{samples:,} pictures from {path}")


def _first(files: PictureFiles, count: int | None, place: Path | str) -> PictureFiles:
    """The first pictures, all if ``count`` is None; UsageError if there are not that many."""
    if count is not None and count > len(files):
        raise UsageError(f"{count:,} pictures asked for, but {place} holds {len(files):,}")
    return files.part(0, len(files) if count is None else count)


def _default_held_out(samples: int) -> int:
    return min(-(-samples // HELD_OUT_SHARE), MOST_HELD_OUT)
