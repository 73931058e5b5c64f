"""``convbench data download``: get CIFAR-10."""

from __future__ import annotations

from pathlib import Path

from bench.commands.options import DataDir
from common.dataset import download_cifar10, find_cifar10


def download_command(data_dir: DataDir = Path("data")) -> None:
    """Fetch CIFAR-10's binary version (163 MB), checked by its MD5."""
    there = find_cifar10(data_dir)
    folder = download_cifar10(data_dir)
    print(f"CIFAR-10 is {'already ' if there else ''}in {folder}")
