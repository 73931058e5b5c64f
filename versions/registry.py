"""The registry: one line for each version.

To add a version, make a folder beside this file with ``cpu.py`` and ``gpu.py``, each with a ``make_backend``, and add a
line to ``REGISTRY``. The command line, the checks, the tables and the charts follow from that line. ``README.md`` in
this folder has an example.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from common.architecture import Architecture, Stage
from common.backend import Backend, Device, Precision
from common.errors import UsageError
from common.operations import OperationWork, step_work
from common.plans import Layout, StagePlan, operations_plan
from common.work import KernelWork, elementwise_work


@dataclass(frozen=True)
class BackendInfo:
    """What is known about a version without importing its code."""

    name: str
    idea: str
    layout: Layout
    package: str
    uses_gemm: bool = False
    """Whether it uses cuBLAS on the GPU: only then does ``--math tf32`` change anything."""
    whole_stages: bool = False
    """Whether it computes whole stages only, so that there is no separate operation to check or to time."""

    @property
    def label(self) -> str:
        """Name, idea and layout, as charts and tables show it."""
        return f"{self.name} {self.idea} ({self.layout})"

    def load(self, device: Device, *, precision: Precision = "fp32", threads: int | None = None) -> Backend:
        """Import the version's code for ``device`` and create a backend. An import that fails raises its error."""
        module = importlib.import_module(f"{self.package}.{device}")
        return module.make_backend(precision=precision, threads=threads)

    def workspace(
        self, architecture: Architecture, batch_size: int, device: Device, threads: int
    ) -> dict[str, tuple[int, ...]]:
        """Name and shape (float32) of each workspace buffer, computed without the device."""
        return importlib.import_module(self.package).workspace(architecture, batch_size, device, threads)

    def stage_plan(self, stage: Stage, n: int) -> StagePlan:
        """What the version writes, keeps and computes in a stage for n pictures, without the device."""
        stated = getattr(importlib.import_module(self.package), "stage_plan", None)
        return stated(stage, n) if stated else operations_plan(stage, n, self.layout)

    def step_work(self, architecture: Architecture, batch_size: int) -> list[OperationWork]:
        """Every part of the version's training step that can be timed alone: operations, or whole stages."""
        plans = [self.stage_plan(stage, batch_size) for stage in architecture.stages]
        return step_work(architecture, batch_size, plans if self.whole_stages else None)

    def training_flops(self, architecture: Architecture) -> int:
        """FLOPs of the products that the version computes in a training step, for one picture."""
        plans = [self.stage_plan(stage, 1) for stage in architecture.stages]
        backward = sum(plan.filter_flops for plan in plans) + sum(plan.data_flops for plan in plans[1:])
        return sum(plan.forward_flops for plan in plans) + backward

    def error_factor(self, architecture: Architecture) -> float:
        """How many times the rounding error of a direct sum the version's may be, in the worst of the stages."""
        return max(self.stage_plan(stage, 1).error_factor for stage in architecture.stages)

    def gpu_work(self, architecture: Architecture, batch_size: int) -> list[KernelWork] | None:
        """FLOPs and bytes of every convolution kernel on the GPU; None if the version does not state them."""
        stated = getattr(importlib.import_module(self.package), "gpu_work", None)
        return stated and stated(architecture, batch_size)

    def shared_gpu_work(self, architecture: Architecture, batch_size: int) -> list[KernelWork]:
        """FLOPs and bytes of the other kernels of a training step on the GPU, which the versions share."""
        return elementwise_work(architecture, batch_size, self.layout, self.gpu_work(architecture, batch_size) or ())

    def effective_precision(self, device: Device, precision: Precision) -> Precision:
        """The arithmetic that this version really uses when ``precision`` is requested."""
        return precision if device == "gpu" and self.uses_gemm else "fp32"


REGISTRY: tuple[BackendInfo, ...] = (
    BackendInfo("v1", "naive", "NHWC", "versions.v1_naive_nhwc"),
    BackendInfo("v2", "tiled", "NHWC", "versions.v2_tiled_nhwc"),
    BackendInfo("v3", "direct", "NCHW", "versions.v3_direct_nchw"),
    BackendInfo("v4", "im2col GEMM", "NCHW", "versions.v4_im2col_gemm_nchw", uses_gemm=True),
    BackendInfo("v5", "Winograd", "NHWC", "versions.v5_winograd_nhwc", uses_gemm=True, whole_stages=True),
)

BASELINE = REGISTRY[0].name


def names() -> list[str]:
    """Known version names, in order."""
    return [info.name for info in REGISTRY]


def find(name: str) -> BackendInfo:
    """The version with that name; UsageError lists the known names."""
    for info in REGISTRY:
        if info.name == name:
            return info
    raise UsageError(f"unknown backend {name!r}: choose from {', '.join(names())}")
