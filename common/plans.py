"""What a version plans for a stage: the buffers that it writes, the FLOPs of its products, and its error bound.

Everything that knows memory or work before a step runs (the network, ``describe``, the memory tables, the layers, the
checks) reads it from here. ``operations_plan`` is that of a version which computes a stage operation by operation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal

import numpy as np

from common.architecture import Stage

Layout = Literal["NHWC", "NCHW"]
ACTIVATION = "activation, gradient"


def activation_shape(layout: Layout, n: int, channels: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Shape of N pictures or activations in ``layout``."""
    return (n, channels, height, width) if layout == "NCHW" else (n, height, width, channels)


@dataclass(frozen=True)
class BufferPlan:
    """One buffer of the network: its shape in the backend's layout, its purpose and its type."""

    name: str
    shape: tuple[int, ...]
    purpose: str
    dtype: type = np.float32

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return np.dtype(self.dtype).itemsize * prod(self.shape)


@dataclass(frozen=True)
class StagePlan:
    """What a version writes and computes in a stage, for a batch."""

    output: BufferPlan
    """What the next stage reads. Later it holds the gradient to it."""
    forward_flops: int
    """FLOPs of the products that the version really computes, forward; a multiply and an add are two."""
    filter_flops: int
    data_flops: int
    kept: dict[str, BufferPlan] = field(default_factory=dict)
    """What the stage keeps from its forward to its backward pass, by the names that the version gives it."""
    error_factor: float = 1.0
    """How many times the rounding error of a direct sum the version's may be."""


def operations_plan(stage: Stage, n: int, layout: Layout) -> StagePlan:
    """The plan of a stage made of operations: the convolution's output is kept, and resampled into another buffer."""
    flops = n * stage.flops
    y = BufferPlan(stage.name, activation_shape(layout, n, stage.out_channels, stage.height, stage.width), ACTIVATION)
    if stage.resample is None:
        return StagePlan(y, flops, flops, flops)
    shape = activation_shape(layout, n, stage.out_channels, stage.out_height, stage.out_width)
    return StagePlan(BufferPlan(f"{stage.name}.{stage.resample}", shape, ACTIVATION), flops, flops, flops, {"y": y})
