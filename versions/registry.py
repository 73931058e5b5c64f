"""Every version of the suite, one line each.

To add one: a folder beside this file with ``cpu.py`` and ``gpu.py``, each defining ``make_backend``, and a line in
``REGISTRY``. The command line, the checks, the tables and the charts follow from that line.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from common.architecture import Architecture
from common.backend import Backend, Device, Layout, Math
from common.errors import UsageError
from common.work import KernelWork


@dataclass(frozen=True)
class BackendInfo:
    """What is known of a version without importing its code."""

    name: str
    idea: str
    layout: Layout
    package: str
    uses_gemm: bool = False
    """Whether cuBLAS does its products on the GPU: only then does ``--math tf32`` change anything."""

    @property
    def label(self) -> str:
        """Name, idea and layout, as charts and tables show it."""
        return f"{self.name} {self.idea} ({self.layout})"

    def load(self, device: Device, *, math: Math = "fp32", threads: int | None = None) -> Backend:
        """Import the version's code for ``device`` and make a backend; what cannot be imported raises."""
        module = importlib.import_module(f"{self.package}.{device}")
        return module.make_backend(math=math, threads=threads)

    def workspace(
        self, architecture: Architecture, batch_size: int, device: Device, threads: int
    ) -> dict[str, tuple[int, ...]]:
        """Name and shape (float32) of each workspace buffer, computed without the device."""
        return importlib.import_module(self.package).workspace(architecture, batch_size, device, threads)

    def gpu_work(self, architecture: Architecture, batch_size: int) -> list[KernelWork] | None:
        """FLOPs and bytes of every convolution kernel on the GPU; None if the version does not state them."""
        stated = getattr(importlib.import_module(self.package), "gpu_work", None)
        return stated and stated(architecture, batch_size)

    def effective_math(self, device: Device, math: Math) -> Math:
        """The arithmetic this version really uses when ``math`` is asked for."""
        return math if device == "gpu" and self.uses_gemm else "fp32"


REGISTRY: tuple[BackendInfo, ...] = (
    BackendInfo("v1", "naive", "NHWC", "versions.v1_naive_nhwc"),
    BackendInfo("v2", "tiled", "NHWC", "versions.v2_tiled_nhwc"),
    BackendInfo("v3", "direct", "NCHW", "versions.v3_direct_nchw"),
    BackendInfo("v4", "im2col GEMM", "NCHW", "versions.v4_im2col_gemm_nchw", uses_gemm=True),
)

BASELINE = REGISTRY[0].name


def names() -> list[str]:
    """Known version names, in order."""
    return [info.name for info in REGISTRY]


def find(name: str) -> BackendInfo:
    """The version of that name; UsageError lists the known ones."""
    for info in REGISTRY:
        if info.name == name:
            return info
    raise UsageError(f"unknown backend {name!r}: choose from {', '.join(names())}")
