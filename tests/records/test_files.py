"""A file is written completely or not at all, whatever fails."""

import errno
import os
from pathlib import Path

import pytest

from bench.records import files
from bench.records.files import create_file, replace_file


def failing(number):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return fail


CALLS = {"fsync": (files.os, "fsync"), "open": (Path, "open")}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", [*CALLS, "last"])
@pytest.mark.parametrize("write", [replace_file, create_file])
def test_a_failed_write_changes_nothing(tmp_path, monkeypatch, write, call, number):
    path = tmp_path / "file"
    if write is replace_file:
        path.write_bytes(b"old")
    before = {found.name: found.read_bytes() for found in tmp_path.iterdir()}
    last = (Path, "replace" if write is replace_file else "hardlink_to")
    with monkeypatch.context() as broken:
        broken.setattr(*CALLS.get(call, last), failing(number))
        with pytest.raises(OSError, match=os.strerror(number)):
            write(path, b"new")
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == before


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"old")
    path.chmod(0o640)
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_never_overwrites_another(tmp_path, monkeypatch, links):
    if not links:  # as on a file system without hard links
        monkeypatch.setattr(Path, "hardlink_to", failing(errno.EPERM))
    path = tmp_path / "file"
    create_file(path, b"first")
    with pytest.raises(FileExistsError):
        create_file(path, b"second")
    assert path.read_bytes() == b"first"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "gone" / "file", b"new")
