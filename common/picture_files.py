"""Pictures in memory-mapped files, which may be larger than memory; they are gathered batch by batch.

There are two kinds of file: CIFAR-10's binary records, in several files, and a NumPy array (``.npy``) of shape
(N, 3, 32, 32), uint8. The system reads the pages that a batch touches and may drop them at any time, so a process needs
memory for a batch only.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.dataset import CHANNELS, RECORD_BYTES, SIZE, check_labels, cifar10_files
from common.errors import RunError, UsageError

PICTURE = (CHANNELS, SIZE, SIZE)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
"""The reader of an array's header for each version of the format; later versions are for named fields."""


class _Part:
    """The pictures of one file, a view of its mapping. The file stays open, so that a truncation is noticed."""

    def __init__(self, path: Path, file: BinaryIO, pictures: np.ndarray) -> None:
        self.path, self.pictures = path, pictures
        self._handle = os.dup(file.fileno())
        self._bytes = os.fstat(self._handle).st_size
        weakref.finalize(self, os.close, self._handle)

    def check(self) -> None:
        """Raise RunError if the file has been truncated: reading a page that is gone kills the process."""
        if os.fstat(self._handle).st_size < self._bytes:
            raise RunError(f"{self.path} was truncated while its pictures were being read")


class PictureFiles:
    """Pictures (N, 3, 32, 32) uint8 in files; ``gather`` copies some of them into memory."""

    def __init__(self, parts: list[_Part], first: int = 0, count: int | None = None) -> None:
        """Use ``count`` pictures of all parts (the rest if None), beginning with number ``first``."""
        self._parts = parts
        self._ends = np.cumsum([len(part.pictures) for part in parts])
        self._first = first
        self._count = int(self._ends[-1]) - first if count is None else count
        self.shape = parts[0].pictures.shape[1:]

    def __len__(self) -> int:
        """Number of pictures."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes that they would need in memory."""
        return len(self) * int(np.prod(self.shape))

    def part(self, first: int, count: int) -> PictureFiles:
        """``count`` of these pictures, beginning with number ``first``."""
        return PictureFiles(self._parts, self._first + first, count)

    def gather(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Copy the pictures with these numbers (n,) into ``out`` (n, C, H, W); RunError if a file was truncated."""
        indices = indices.astype(np.int64) + self._first
        files = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(files):
            part = self._parts[number]
            part.check()
            here = files == number
            start = self._ends[number] - len(part.pictures)
            out[here] = part.pictures[indices[here] - start]

    def load(self) -> np.ndarray:
        """Copy all of them into memory."""
        return chosen_pictures(self, np.arange(len(self)))


def first_pictures(pictures: np.ndarray | PictureFiles, count: int) -> np.ndarray:
    """The first ``count`` pictures, in memory."""
    return chosen_pictures(pictures, np.arange(count))


def chosen_pictures(pictures: np.ndarray | PictureFiles, indices: np.ndarray) -> np.ndarray:
    """The pictures with these numbers (n,), copied into memory."""
    if isinstance(pictures, np.ndarray):
        return pictures[indices]
    out = np.empty((len(indices), *pictures.shape), np.uint8)
    pictures.gather(indices, out)
    return out


def open_cifar10(folder: Path, split: str) -> PictureFiles:
    """Map the pictures of ``split``; UsageError for damaged files, as in ``read_cifar10``."""
    parts = []
    for path, count in cifar10_files(folder, split).items():
        with _opened(path, "CIFAR-10 file") as file:
            records = np.ndarray((count, RECORD_BYTES), np.uint8, _mapped(file))
            check_labels(path, records[:, 0])
            # A view of every record without its label byte; records are 3,073 bytes apart.
            parts.append(_Part(path, file, records[:, 1:].reshape(count, *PICTURE)))
    return PictureFiles(parts)


def open_npy(path: Path) -> PictureFiles:
    """Map a NumPy array of pictures (N, 3, 32, 32) uint8; UsageError for anything else. It never unpickles."""
    with _opened(path, f"array of pictures, uint8 (N, 3, {SIZE}, {SIZE})") as file:
        read_header = HEADERS[np.lib.format.read_magic(file)]
        shape, fortran_order, dtype = read_header(file)
        if dtype != np.uint8 or fortran_order or shape[1:] != PICTURE or shape[0] < 1:
            raise ValueError(f"it holds {dtype} {shape}")
        return PictureFiles([_Part(path, file, np.ndarray(shape, np.uint8, _mapped(file), file.tell()))])


def _mapped(file: BinaryIO) -> mmap.mmap:
    """The file's bytes. Accesses are random, so the usual read-ahead of mappings is switched off."""
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)
    return mapping


@contextmanager
def _opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """Open a file; an error while its header is read becomes a UsageError that says what the file should be."""
    if not path.is_file():
        raise UsageError(f"cannot read {path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            yield file
    except UsageError:
        raise
    except Exception as error:  # an array's header is a Python literal; a damaged one can raise any parser error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path} is not a valid {what}: {reason}") from error
