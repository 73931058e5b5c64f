"""Files that are whole or not there: what a crash, a full disk or a pulled plug must not be able to halve."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

# What a file system without hard links says.
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def replace_file(path: Path, data: bytes) -> None:
    """Make ``data`` the content of ``path``, whole or not at all.

    It is written to a draft beside the file, flushed to the disk, and renamed over it; the folder is flushed too, so
    that the new name outlives a loss of power. A file that is replaced keeps its permissions. Raises OSError, after
    which ``path`` is what it was.
    """
    with _draft(path, data) as draft:
        with contextlib.suppress(FileNotFoundError):
            draft.chmod(path.stat().st_mode & 0o7777)
        draft.replace(path)
    _flush_folder(path.parent)


def create_file(path: Path, data: bytes) -> None:
    """Like ``replace_file``, but FileExistsError if there is something of that name already, which stays as it is."""
    with _draft(path, data) as draft:
        publish(draft, path)


def publish(draft: Path, path: Path) -> None:
    """Give a finished file its name; FileExistsError if that is taken. The draft may still be there afterwards."""
    try:
        path.hardlink_to(draft)  # which, unlike renaming, never goes over another file
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        draft.replace(path)
    _flush_folder(path.parent)


def draft_of(path: Path) -> Path:
    """Where this process writes what is to become ``path``."""
    return path.with_name(f".{path.name}.draft-{os.getpid()}")


def clear_drafts(path: Path) -> None:
    """Remove what processes that are gone were about to make ``path`` of when they were killed."""
    for draft in path.parent.glob(f"{glob.escape(f'.{path.name}.draft-')}*"):
        number = draft.name.rpartition("-")[2]
        if number.isascii() and number.isdigit() and len(number) < 10 and not psutil.pid_exists(int(number)):
            with contextlib.suppress(OSError):
                draft.unlink()


@contextlib.contextmanager
def _draft(path: Path, data: bytes) -> Iterator[Path]:
    """``data`` in a file beside ``path``, on the disk; gone afterwards if it still has that name."""
    draft = draft_of(path)
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        with contextlib.suppress(OSError):  # what went wrong first is what is told
            draft.unlink()


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
