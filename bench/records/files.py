"""Write files completely or not at all, even on a crash, a full disk or a power failure."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

# Errors of a file system without hard links.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def replace_file(path: Path, data: bytes) -> None:
    """Make ``data`` the content of ``path``; a replaced file keeps its permissions. After OSError it is unchanged.

    The data are written to a draft beside the file and flushed to the disk; then the draft is renamed to ``path``. The
    folder is flushed too, so that the new name survives a power failure.
    """
    with _draft(path, data) as draft:
        with contextlib.suppress(FileNotFoundError):
            draft.chmod(path.stat().st_mode & 0o7777)
        draft.replace(path)
    _flush_folder(path.parent)


def create_file(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Like ``replace_file``, but FileExistsError if ``path`` exists already; it stays unchanged.

    ``data`` may come in parts, of which one at a time is in memory.
    """
    with _draft(path, data) as draft:
        try:
            path.hardlink_to(draft)  # unlike renaming, this never replaces another file
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
            draft.replace(path)
    _flush_folder(path.parent)


def clear_drafts(path: Path) -> None:
    """Remove the drafts of ``path`` that killed processes have left."""
    for draft in path.parent.glob(f"{glob.escape(f'.{path.name}.draft-')}*"):
        number = draft.name.rpartition("-")[2]
        if number.isascii() and number.isdigit() and len(number) < 10 and not psutil.pid_exists(int(number)):
            with contextlib.suppress(OSError):
                draft.unlink()


@contextlib.contextmanager
def _draft(path: Path, data: bytes | Iterable[bytes]) -> Iterator[Path]:
    """A file beside ``path`` with ``data``, flushed to the disk; removed afterwards unless it was renamed."""
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        with contextlib.suppress(OSError):  # an earlier error is the one to report
            draft.unlink()


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system supports that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
