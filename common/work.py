"""The work of a GPU kernel, counted before it runs: FLOPs, bytes, and the shortest time that a card's ceilings allow.

A version computes its work from the same sizes as its launches, so ``convbench describe --device gpu`` always agrees
with the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.architecture import Architecture, Stage
from common.network import flat_offsets, parameter_shapes
from common.operations import BACKWARD_PASS, FORWARD_PASS, WHOLE_STEP, Operation, float_bytes, step_work
from common.plans import Layout

SUM_ROWS = 8  # threads that work side by side on a sum of more shares than that,
MANY_VALUES = 100_000  # unless there are at least so many sums
LOSS_THREADS = 256  # of each block that sums the loss on a GPU
MOST_LOSS_BLOCKS = 256  # of these blocks

# The bounds are for a card like the H100 and H200: float32 outside tensor cores, and memory bandwidth.
CEILING_FLOP_PER_S = 67e12
CEILING_BYTES_PER_S = 4.3e12


@dataclass(frozen=True)
class KernelWork:
    """One kernel on one stage, for a whole batch; the stage is ``WHOLE_STEP`` where the operation has none."""

    stage: str
    operation: Operation
    kernel: str
    flops: int
    """Floating-point operations that the result needs; a multiply and an add are two."""
    least_bytes: int
    """Global memory traffic if every operand is read or written once."""
    asked_bytes: int | None
    """Bytes that the threads load and store; caches serve the excess over ``least_bytes``. None for a library."""
    shared_loads_per_fma: float | None = None
    """Floats read from shared memory for one fused multiply-add; None where the kernel does not use shared memory."""
    fmas: float = 0
    """Multiply-adds that a thread issues in its inner loop, those for padding included; 0 if the loop has none."""
    loads: float = 0
    """Values that a thread loads from global memory in its inner loop, where that loop has no multiply-adds."""
    rounds: tuple[float, ...] = ()
    """How often in all a thread runs each loop around its inner loop, the outermost first."""
    lines: float = 0
    """Lines of 128 bytes that the global loads of a warp touch in its inner loop; 0 where that cannot limit it."""

    @property
    def bound_s(self) -> float:
        """The shortest time in seconds that the ceilings allow."""
        return max(self.flops / CEILING_FLOP_PER_S, self.least_bytes / CEILING_BYTES_PER_S)

    @property
    def bound_by(self) -> str:
        """The ceiling that limits it: ``FLOPs`` or ``memory``."""
        return "FLOPs" if self.flops / CEILING_FLOP_PER_S > self.least_bytes / CEILING_BYTES_PER_S else "memory"


def halo_extent(length: int, tile: int) -> int:
    """Positions that all tiles of one axis read: their own, and one more on each side inside the picture."""
    return sum(min(length, first + tile + 1) - max(0, first - 1) for first in range(0, length, tile))


def taps_inside(height: int, width: int) -> int:
    """(position, tap) pairs of a plane whose tap falls inside the picture, for a 3x3 window with padding 1."""
    return (3 * height - 2) * (3 * width - 2)


def bias_work(stage: Stage, n: int, shares: int, loads: float) -> list[KernelWork]:
    """The gradient to a stage's biases in two passes: sums of each share of the pixels, then of the shares.

    ``loads`` are the values that a thread of the first pass adds.
    """
    pixels, k = n * stage.height * stage.width, stage.out_channels
    first = float_bytes((pixels, k), (shares, k))
    kernel = "conv2d_backward_bias_kernel"
    return [
        KernelWork(stage.name, Operation.BACKWARD_BIAS, kernel, pixels * k, first, first, loads=loads),
        sum_work(stage, Operation.BACKWARD_BIAS, shares, k),
    ]


def sum_rows(shares: int, values: int) -> int:
    """Threads that work side by side on each of ``values`` sums of so many shares.

    One, unless there are so few values that one thread for each would leave most of a large card idle.
    """
    return SUM_ROWS if shares > SUM_ROWS and values < MANY_VALUES else 1


def sum_kernel(shares: int, values: int) -> str:
    """The name of the kernel that adds so many shares."""
    return f"sum_shares_kernel[{sum_rows(shares, values)} a value]"


def sum_work(stage: Stage, operation: Operation, shares: int, values: int) -> KernelWork:
    """The second pass of a sum: ``shares`` arrays of ``values`` added up."""
    moved = float_bytes((shares, values), (values,))
    kernel, loads = sum_kernel(shares, values), shares / sum_rows(shares, values)
    return KernelWork(stage.name, operation, kernel, shares * values, moved, moved, loads=loads)


ELEMENTWISE_KERNELS = {
    Operation.MAXPOOL: "maxpool_forward_kernel",
    Operation.MAXPOOL_BACKWARD: "relu_maxpool_backward_kernel",
    Operation.UPSAMPLE: "upsample_forward_kernel",
    Operation.UPSAMPLE_BACKWARD: "relu_upsample_backward_kernel",
}


def elementwise_work(
    architecture: Architecture, batch_size: int, layout: Layout, stated: Sequence[KernelWork]
) -> list[KernelWork]:
    """The kernels that all versions share, for a training step.

    Where ``stated``, a version's own kernels, has a pass of a stage as a whole, pooling and upsampling are part of it.
    """
    passes = {Operation.STAGE_FORWARD: FORWARD_PASS, Operation.STAGE_BACKWARD: BACKWARD_PASS}
    fused = {(work.stage, part) for work in stated for part in passes.get(work.operation, ())}
    kernels = {Operation.GATHER: f"gather_kernel[{layout}]", **ELEMENTWISE_KERNELS}
    picture = batch_size * architecture.values_per_image
    blocks = min(-(-picture // LOSS_THREADS), MOST_LOSS_BLOCKS)
    _, parameters = flat_offsets(parameter_shapes(architecture, layout))

    def moved(stage: str, operation: Operation, kernel: str, flops: int, least: int, **turns: float) -> KernelWork:
        # These kernels read and write every value once, so that the threads ask for no more than the least.
        return KernelWork(stage, operation, kernel, flops, least, least, **turns)

    work = [
        moved(part.stage, part.operation, kernels[part.operation], part.flops, part.least_bytes)
        for part in step_work(architecture, batch_size)
        if part.operation in kernels and (part.stage, part.operation) not in fused
    ]
    first = {"flops": 4 * picture, "least": float_bytes((3, picture), (blocks,))}
    return [
        *work,
        moved(WHOLE_STEP, Operation.LOSS, "mse_partial_kernel", **first, fmas=picture / blocks / LOSS_THREADS),
        moved(WHOLE_STEP, Operation.LOSS, "mse_final_kernel", blocks, float_bytes((blocks + 1,)), loads=1),
        moved(WHOLE_STEP, Operation.SGD, "sgd_kernel", 2 * parameters, float_bytes((3, parameters))),
    ]
