"""What a kernel has to do, counted before it runs: FLOPs, bytes, and the time that a card's ceilings allow at best.

A version states its work with the same numbers that its launches are made from, so the table of it
(``convbench describe --device gpu``) cannot drift from the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

FLOAT_BYTES = 4

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
