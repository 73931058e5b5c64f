"""Pictures: CIFAR-10's binary version, or crops of two photographs if CIFAR-10 is not there.

Both are uint8 (N, 3, 32, 32), the order of CIFAR-10's own records, and are copied to the device as bytes.
"""

from __future__ import annotations

import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UsageError

SIZE = 32
CHANNELS = 3
RECORD_BYTES = 1 + CHANNELS * SIZE * SIZE
RECORDS_PER_FILE = 10_000
CLASSES = 10

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_FOLDER = "cifar-10-batches-bin"
FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
SOURCES = ("auto", "cifar10", "photos")
PHOTO_PARTS = {"whole": (0.0, 1.0), "train": (0.0, 0.8), "test": (0.8, 1.0)}
"""The part of a photograph's width that each split's crops come from."""


@dataclass(frozen=True)
class Dataset:
    """Pictures (N, 3, 32, 32) uint8, and a line about their source."""

    images: np.ndarray
    source: str
    description: str


def load_pictures(source: str, data_dir: Path, samples: int, seed: int) -> Dataset:
    """Load ``samples`` pictures from ``source``: auto, cifar10 or photos.

    ``auto`` takes CIFAR-10 if its first training file is in ``data_dir``, and photo crops otherwise. Raises UsageError
    for an unknown source, for missing or damaged files, and if there are fewer pictures than ``samples``.
    """
    if samples < 1:
        raise UsageError(f"samples {samples}: must be at least 1")
    folder = choose_folder(source, data_dir)
    if folder is not None:
        images, _ = read_cifar10(folder, "train", samples)
        return Dataset(images, "cifar10", f"CIFAR-10, {len(images):,} training pictures from {folder}")
    images = photo_crops(samples, seed)
    return Dataset(images, "photos", f"photo crops, {len(images):,} of scikit-learn's two sample photographs")


def choose_folder(source: str, data_dir: Path) -> Path | None:
    """The folder with CIFAR-10's files for ``source``; None for photo crops. UsageError as in ``load_pictures``."""
    if source not in SOURCES:
        raise UsageError(f"unknown data source {source!r}: choose from {', '.join(SOURCES)}")
    folder = None if source == "photos" else find_cifar10(data_dir)
    if source == "cifar10" and folder is None:
        looked = " and ".join(str(place / FILES["train"][0]) for place in _places(data_dir))
        raise UsageError(
            f"no CIFAR-10 files: looked for {looked}. Get them with: convbench data download --data-dir {data_dir}"
        )
    return folder


def find_cifar10(data_dir: Path) -> Path | None:
    """The folder that holds the first training file: ``data_dir`` or the archive's folder in it."""
    return next((place for place in _places(data_dir) if (place / FILES["train"][0]).exists()), None)


def read_cifar10(folder: Path, split: str = "train", count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read the first ``count`` pictures (all if None) and labels of ``split`` from the binary files in ``folder``.

    Returns uint8 arrays (N, 3, 32, 32) and (N,). Raises UsageError for damaged files (see ``cifar10_files``), for a
    label over 9, and if there are fewer than ``count`` pictures.
    """
    files = cifar10_files(folder, split)
    available = sum(files.values())
    wanted = available if count is None else count
    if wanted > available:
        raise UsageError(f"{wanted:,} samples asked for, but {folder} holds {available:,} {split} pictures")

    records = np.empty((wanted, RECORD_BYTES), np.uint8)
    filled = 0
    for path, held in files.items():
        take = min(held, wanted - filled)
        if take == 0:
            break
        chunk = np.fromfile(path, np.uint8, take * RECORD_BYTES)
        if chunk.size != take * RECORD_BYTES:
            raise UsageError(f"{path} is truncated: it ended while it was read")
        records[filled : filled + take] = chunk.reshape(take, RECORD_BYTES)
        check_labels(path, records[filled : filled + take, 0])
        filled += take
    images = np.ascontiguousarray(records[:, 1:]).reshape(wanted, CHANNELS, SIZE, SIZE)
    return images, records[:, 0].copy()


def cifar10_files(folder: Path, split: str) -> dict[Path, int]:
    """The binary files of ``split`` in ``folder``, in order, and how many records each has.

    The size of every file is checked: a whole number of records, at least one, at most 10,000, and the same number in
    each file (the official files hold 10,000; in a smaller set for experiments the first files may have one more).
    Raises UsageError otherwise.
    """
    paths = []
    for name in FILES[split]:
        path = folder / name
        if not path.exists():
            break
        paths.append(path)
    later = [name for name in FILES[split][len(paths) :] if (folder / name).exists()]
    if not paths or later:
        raise UsageError(
            f"{folder / FILES[split][len(paths)]} is missing{f', but {later[0]} is there' if later else ''}"
        )
    counts = [_record_count(path) for path in paths]
    available = sum(counts)
    if counts != [available // len(counts) + (i < available % len(counts)) for i in range(len(counts))]:
        shortest = counts.index(min(counts))
        raise UsageError(f"{paths[shortest]} is truncated: {min(counts):,} records, another file has {max(counts):,}")
    return dict(zip(paths, counts, strict=True))


def check_labels(path: Path, labels: np.ndarray) -> None:
    """Raise UsageError if a label in a file is not one of CIFAR-10's."""
    bad = np.flatnonzero(labels >= CLASSES)
    if bad.size:
        raise UsageError(f"{path}: record {bad[0]} has label {labels[bad[0]]}; labels are 0 to {CLASSES - 1}")


def photo_crops(count: int, seed: int) -> np.ndarray:
    """Cut ``count`` different 32x32 crops, half of them mirrored, out of scikit-learn's two photographs.

    The same seed gives the same crops in the same order, and a smaller count gives a prefix of a larger one. Raises
    UsageError if there are fewer than ``count``. Source: ``sklearn.datasets.load_sample_images``.
    """
    return labelled_crops(count, seed, "whole")[0]


def labelled_crops(count: int, seed: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Crops as in ``photo_crops`` from a part of the photographs, and for each the photograph, 0 or 1: uint8 (count,).

    ``split`` names the part: the ``whole``, the left four fifths (``train``) or the right fifth (``test``). No pixel is
    both in ``train`` and in ``test``.
    """
    from sklearn.datasets import load_sample_images

    photographs = np.stack(load_sample_images().images)  # (2, H, W, 3)
    first, last = (round(share * photographs.shape[2]) for share in PHOTO_PARTS[split])
    photographs = photographs[:, :, first:last]
    number, height, width, _ = photographs.shape
    rows, columns = height - SIZE + 1, width - SIZE + 1
    available = number * 2 * rows * columns
    if count > available:
        raise UsageError(f"{count:,} samples asked for, but the photographs have {available:,} different crops")
    chosen = np.random.default_rng(seed).permutation(available)[:count]
    photograph, mirrored, row, column = np.unravel_index(chosen, (number, 2, rows, columns))
    crops = np.empty((count, CHANNELS, SIZE, SIZE), np.uint8)
    for i in range(count):
        crop = photographs[photograph[i], row[i] : row[i] + SIZE, column[i] : column[i] + SIZE]
        crops[i] = (crop[:, ::-1] if mirrored[i] else crop).transpose(2, 0, 1)
    return crops, photograph.astype(np.uint8)


def download_cifar10(data_dir: Path, url: str = CIFAR10_URL, md5: str = CIFAR10_MD5, *, progress: bool = True) -> Path:
    """Fetch CIFAR-10's binary version into ``data_dir`` and return its folder.

    The archive's MD5 is checked first. It is then unpacked into a temporary folder, which is renamed at the end, so an
    interrupted or failed download leaves no partial data. Does nothing if valid files are already there. Raises
    UsageError if the server cannot be reached or the checksum is wrong.
    """
    import pooch

    folder = find_cifar10(data_dir)
    if folder is not None:
        read_cifar10(folder, "train")
        return folder
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as scratch:
            pooch.get_logger().setLevel("ERROR")
            downloader = pooch.HTTPDownloader(progressbar=False, timeout=30)
            if progress:
                print(f"downloading {url}")
            archive = pooch.retrieve(
                url, known_hash=f"md5:{md5}", path=scratch, fname="archive.tar.gz", downloader=downloader
            )
            unpacked = Path(scratch) / "unpacked"
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
            read_cifar10(unpacked / CIFAR10_FOLDER, "train")
            (unpacked / CIFAR10_FOLDER).rename(data_dir / CIFAR10_FOLDER)
    except UsageError:
        raise
    except (OSError, ValueError, tarfile.TarError) as error:
        # requests' errors are OSErrors; a wrong checksum is pooch's ValueError
        raise UsageError(f"could not download {url}: {str(error).splitlines()[0]}") from error
    return data_dir / CIFAR10_FOLDER


def _places(data_dir: Path) -> tuple[Path, Path]:
    return data_dir, data_dir / CIFAR10_FOLDER


def _record_count(path: Path) -> int:
    """Number of records in a file, from its size; UsageError if the size is impossible."""
    size = path.stat().st_size
    most = RECORDS_PER_FILE * RECORD_BYTES
    if size == 0:
        raise UsageError(f"{path} is empty")
    if size > most:
        raise UsageError(f"{path} is oversized: {size:,} bytes, at most {most:,} ({RECORDS_PER_FILE:,} records)")
    if size % RECORD_BYTES:
        raise UsageError(f"{path} is truncated: {size:,} bytes is not a whole number of {RECORD_BYTES:,}-byte records")
    return size // RECORD_BYTES
