"""The pictures that a training run learns from, and the held-out pictures that it is evaluated on.

The two sets share no picture: CIFAR-10 has a test split, photo crops come from separate parts of the photographs, and
the last pictures of an array are held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

import numpy as np
import psutil

from bench.records.training import DataIdentity
from common.dataset import FILES, SOURCES, choose_folder, cifar10_files, labelled_crops, read_cifar10
from common.errors import UsageError, check_number
from common.picture_files import PICTURE, PictureFiles, chosen_pictures, open_cifar10, open_npy
from common.training import Pictures

HELD_OUT_SHARE, MOST_HELD_OUT = 5, 10_000  # by default one held-out picture for five training pictures
CROPS = 50_000  # as many as CIFAR-10 has
MEMORY_SHARE = 0.5  # of the free memory: pictures that need more stay in their files
DIGESTED = 1024  # pictures of each set that the SHA-256 covers


@dataclass(frozen=True)
class TrainingData:
    """Training pictures and, if any, held-out pictures: arrays (N, 3, 32, 32) uint8, or files."""

    train: Pictures
    held_out: Pictures | None
    source: str
    description: str

    def identity(self) -> DataIdentity:
        """What a checkpoint keeps to recognise these pictures."""
        digest = sha256()
        for part in filter(lambda part: part is not None, (self.train, self.held_out)):
            chosen = np.unique(np.linspace(0, len(part) - 1, min(len(part), DIGESTED)).astype(np.int64))
            digest.update(f"{len(part)}:".encode() + chosen_pictures(part, chosen).tobytes())
        return DataIdentity(self.source, count_of(self.held_out), digest.hexdigest())


def count_of(pictures: Pictures | None) -> int:
    """How many pictures; 0 for None."""
    return 0 if pictures is None else len(pictures)


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
    room = MEMORY_SHARE * (psutil.virtual_memory().available if room_bytes is None else room_bytes)
    if source.endswith(".npy"):
        return _from_array(Path(source), samples, held_out, 0 if stream else room)
    folder = choose_folder(source, data_dir)
    if folder is not None:
        return _from_cifar10(folder, samples, held_out, 0 if stream else room)
    if stream:
        raise UsageError("--stream needs pictures in files: photo crops are cut in memory")
    samples = samples or CROPS
    held_out = _default_held_out(samples) if held_out is None else held_out
    train, _ = labelled_crops(samples, seed, "train")
    return TrainingData(
        train,
        labelled_crops(held_out, seed, "test")[0] if held_out else None,
        "photos",
        f"photo crops, {samples:,} of the left four fifths of scikit-learn's two sample photographs",
    )


def load_split(source: str, data_dir: Path, split: str | None, count: int | None, seed: int) -> tuple[Pictures, str]:
    """The first ``count`` pictures of a split, train or test, and a line that describes them.

    ``source`` is as in ``load_training_data``; an array has no splits. The default is all pictures, or 10,000 crops.
    Raises UsageError for more pictures than there are, and for a split of an array.
    """
    check_number("samples", count, 1)
    if source.endswith(".npy"):
        if split is not None:
            raise UsageError(f"{source} is an array, which has no splits: leave --split out")
        files = open_npy(Path(source))
        return _first(files, count, source), source
    split = split or "train"
    folder = choose_folder(source, data_dir)
    if folder is None:
        crops, _ = labelled_crops(MOST_HELD_OUT if count is None else count, seed, split)
        return crops, f"photo crops of the {split} part"
    files = open_cifar10(folder, split)
    return _first(files, count, folder), f"{folder}, {split}"


def load_labelled(source: str, data_dir: Path, split: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 3, 32, 32) uint8 of one split and their labels (N,): CIFAR-10's classes, or which photograph."""
    check_number("samples", count, 1)
    if source.endswith(".npy"):
        raise UsageError(f"{source} has no labels: choose from {', '.join(SOURCES)}")
    folder = choose_folder(source, data_dir)
    return labelled_crops(count, seed, split) if folder is None else read_cifar10(folder, split, count)


def _from_cifar10(folder: Path, samples: int | None, held_out: int | None, room: float) -> TrainingData:
    samples = sum(cifar10_files(folder, "train").values()) if samples is None else samples
    has_test = (folder / FILES["test"][0]).exists()
    if held_out is None:
        held_out = min(_default_held_out(samples), sum(cifar10_files(folder, "test").values())) if has_test else 0
    wanted = {"train": samples, "test": held_out}
    if prod(PICTURE) * (samples + held_out) > room:
        parts = {split: _first(open_cifar10(folder, split), count, folder) for split, count in wanted.items() if count}
    else:
        parts = {split: read_cifar10(folder, split, count)[0] for split, count in wanted.items() if count}
    description = f"CIFAR-10, {samples:,} training pictures from {folder}"
    return TrainingData(parts["train"], parts.get("test"), "cifar10", description)


def _from_array(path: Path, samples: int | None, held_out: int | None, room: float) -> TrainingData:
    files = open_npy(path)
    if held_out is None:
        held_out = _default_held_out(samples) if samples else min(len(files) // (1 + HELD_OUT_SHARE), MOST_HELD_OUT)
        held_out = min(held_out, max(0, len(files) - (samples or 1)))
    samples = len(files) - held_out if samples is None else samples
    if samples < 1 or samples + held_out > len(files):
        raise UsageError(
            f"{samples:,} samples and {held_out:,} held out asked for, but {path} holds {len(files):,} pictures"
        )
    parts = [files.part(0, samples), files.part(len(files) - held_out, held_out) if held_out else None]
    if sum(part.nbytes for part in parts if part) <= room:
        parts = [part.load() if part else None for part in parts]
    return TrainingData(*parts, source=path.name, description=f"{samples:,} pictures from {path}")


def _first(files: PictureFiles, count: int | None, place: Path | str) -> PictureFiles:
    """The first pictures, all if ``count`` is None; UsageError if there are not that many."""
    count = len(files) if count is None else count
    if count > len(files):
        raise UsageError(f"{count:,} pictures asked for, but {place} holds {len(files):,}")
    return files.part(0, count)


def _default_held_out(samples: int) -> int:
    return min(-(-samples // HELD_OUT_SHARE), MOST_HELD_OUT)
