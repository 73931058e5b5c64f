"""What a kernel has to do, counted before it runs: FLOPs, bytes, and the time that a card's ceilings allow at best.

A version states its work with the same numbers that its launches are made from, so the table of it
(``convbench describe --device gpu``) cannot drift from the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from common.architecture import Architecture, Stage
from common.backend import Layout

FLOAT_BYTES = 4
MOST_PARTIALS = 16_384  # threads that share the sum of the loss on a GPU

# The card the bounds are stated for, an H100/H200-class one: float32 outside tensor cores, and memory.
CEILING_FLOP_PER_S = 67e12
CEILING_BYTES_PER_S = 4.3e12


@dataclass(frozen=True)
class KernelWork:
    """One kernel on one stage, for a whole batch."""

    stage: str
    operation: str
    kernel: str
    flops: int
    """Floating-point operations that the result needs; a multiply and an add are two."""
    least_bytes: int
    """Global memory if every operand crossed it once."""
    asked_bytes: int | None
    """Global loads and stores that the threads issue; caches answer what exceeds ``least_bytes``. None: a library's."""
    shared_loads_per_fma: float | None = None
    """Floats read from shared memory for one fused multiply-add; None where shared memory has no part in it."""

    @property
    def bound_s(self) -> float:
        """Seconds below which the ceilings do not let it go."""
        return max(self.flops / CEILING_FLOP_PER_S, self.least_bytes / CEILING_BYTES_PER_S)

    @property
    def bound_by(self) -> str:
        """The ceiling that it meets first: ``FLOPs`` or ``memory``."""
        return "FLOPs" if self.flops / CEILING_FLOP_PER_S > self.least_bytes / CEILING_BYTES_PER_S else "memory"


def float_bytes(*shapes: tuple[int, ...]) -> int:
    """Bytes of float32 arrays of these shapes together."""
    return FLOAT_BYTES * sum(prod(shape) for shape in shapes)


def halo_extent(length: int, tile: int) -> int:
    """Positions along one axis that its tiles read, added up: each its own and, inside the picture, one more a side."""
    return sum(min(length, first + tile + 1) - max(0, first - 1) for first in range(0, length, tile))


def taps_inside(height: int, width: int) -> int:
    """(position, tap) pairs of a plane whose tap falls inside the picture, for a 3x3 window with padding 1."""
    return (3 * height - 2) * (3 * width - 2)


def bias_work(stage: Stage, n: int, shares: int) -> list[KernelWork]:
    """The gradient to a stage's biases in two passes: sums of each share of the pixels, then of the shares."""
    pixels, k = n * stage.height * stage.width, stage.out_channels
    first = float_bytes((pixels, k), (shares, k))
    return [
        KernelWork(stage.name, "backward bias", "conv2d_backward_bias_kernel", pixels * k, first, first),
        sum_work(stage, "backward bias", shares, k),
    ]


def sum_work(stage: Stage, operation: str, shares: int, values: int) -> KernelWork:
    """The second pass of a sum: ``shares`` arrays of ``values`` added up."""
    moved = float_bytes((shares, values), (values,))
    return KernelWork(stage.name, operation, "sum_shares_kernel", shares * values, moved, moved)


def elementwise_work(architecture: Architecture, batch_size: int, layout: Layout, parameters: int) -> list[KernelWork]:
    """The kernels that all versions share, ``parameters`` being the length of the flat buffer that SGD goes over."""
    n = batch_size
    picture = n * prod(architecture.input_shape)
    work = [_moved("", "gather", f"gather_{layout.lower()}_kernel", picture, FLOAT_BYTES * picture + picture + 4 * n)]
    for stage in architecture.stages:
        y = n * stage.out_channels * stage.height * stage.width
        out = n * stage.out_channels * stage.out_height * stage.out_width
        if stage.resample == "maxpool":
            work.append(_moved(stage.name, "max-pool", "maxpool_forward_kernel", 3 * out, FLOAT_BYTES * (y + out)))
            moved = FLOAT_BYTES * (2 * y + out)
            work.append(_moved(stage.name, "max-pool backward", "relu_maxpool_backward_kernel", 4 * out, moved))
        elif stage.resample == "upsample":
            work.append(_moved(stage.name, "upsample", "upsample_forward_kernel", 0, FLOAT_BYTES * (y + out)))
            moved = FLOAT_BYTES * (2 * y + out)
            work.append(_moved(stage.name, "upsample backward", "relu_upsample_backward_kernel", 3 * y, moved))
    partials = min(picture, MOST_PARTIALS)
    work.append(_moved("", "loss", "mse_partial_kernel", 4 * picture, FLOAT_BYTES * (3 * picture + partials)))
    work.append(_moved("", "loss", "mse_final_kernel", partials, FLOAT_BYTES * (partials + 1)))
    work.append(_moved("", "SGD", "sgd_kernel", 2 * parameters, FLOAT_BYTES * 3 * parameters))
    return work


def _moved(stage: str, operation: str, kernel: str, flops: int, moved: int) -> KernelWork:
    """Work that reads and writes everything once: the threads ask for no more than the least."""
    return KernelWork(stage, operation, kernel, flops, moved, moved)
