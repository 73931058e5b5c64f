"""The operations of a training step: one vocabulary for the checks, the benchmarks, the tables and the files.

Names are cuDNN's. Each operation also has the work that it must do, whoever does it: FLOPs of the result, a multiply
and an add counted as two, and the least bytes that can cross memory, every operand read or written once. A version that
moves more, or computes more, gets no credit for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

from common.architecture import Architecture, Stage
from common.plans import StagePlan

FLOAT_BYTES = 4
WHOLE_STEP = "step"  # takes the stage's place for operations that belong to no stage: gather, loss, SGD


class Operation(StrEnum):
    """An operation, spelled as files, test names and tables spell it."""

    GATHER = "gather"
    FORWARD = "forward"
    MAXPOOL = "maxpool"
    UPSAMPLE = "upsample"
    LOSS = "loss"
    MAXPOOL_BACKWARD = "maxpool_backward"
    UPSAMPLE_BACKWARD = "upsample_backward"
    BACKWARD_FILTER = "backward_filter"
    BACKWARD_BIAS = "backward_bias"
    BACKWARD_DATA = "backward_data"
    SGD = "sgd"
    # What a version that overrides a whole stage does there outside the operations above.
    STAGE_FORWARD = "stage_forward"
    STAGE_BACKWARD = "stage_backward"
    PREPARE = "prepare"

    @property
    def words(self) -> str:
        """The name with spaces: ``backward filter``."""
        return self.value.replace("_", " ")


METHODS = {
    "gather_batch": Operation.GATHER,
    "conv2d_forward": Operation.FORWARD,
    "maxpool_forward": Operation.MAXPOOL,
    "upsample_forward": Operation.UPSAMPLE,
    "mse_loss": Operation.LOSS,
    "relu_maxpool_backward": Operation.MAXPOOL_BACKWARD,
    "relu_upsample_backward": Operation.UPSAMPLE_BACKWARD,
    "conv2d_backward_filter": Operation.BACKWARD_FILTER,
    "conv2d_backward_bias": Operation.BACKWARD_BIAS,
    "conv2d_backward_data": Operation.BACKWARD_DATA,
    "sgd": Operation.SGD,
}
"""The operation that each method of a backend carries out."""

STAGE_METHODS = {"stage_forward": Operation.STAGE_FORWARD, "stage_backward": Operation.STAGE_BACKWARD}
"""The methods that a version overrides to fuse operations."""

FORWARD_PASS = (Operation.FORWARD, Operation.MAXPOOL, Operation.UPSAMPLE, Operation.STAGE_FORWARD)
BACKWARD_PASS = (
    Operation.MAXPOOL_BACKWARD,
    Operation.UPSAMPLE_BACKWARD,
    Operation.BACKWARD_FILTER,
    Operation.BACKWARD_BIAS,
    Operation.BACKWARD_DATA,
    Operation.STAGE_BACKWARD,
)


def float_bytes(*shapes: tuple[int, ...]) -> int:
    """Bytes of float32 arrays of these shapes together."""
    return FLOAT_BYTES * sum(prod(shape) for shape in shapes)


@dataclass(frozen=True)
class OperationWork:
    """An operation on one stage, for a whole batch, and the least that it must do."""

    stage: str
    operation: str
    """An ``Operation``, or the name of a part of the network that is timed as one."""
    flops: int
    least_bytes: int

    @property
    def id(self) -> str:
        """``conv2-backward_filter``."""
        return f"{self.stage}-{self.operation}"


def step_work(
    architecture: Architecture, batch_size: int, plans: Sequence[StagePlan] | None = None
) -> list[OperationWork]:
    """Every operation of a training step of ``batch_size`` pictures, in the order in which a step takes them.

    With ``plans``, one for each stage, these are whole stages instead of their operations: their FLOPs are those of the
    version's products, and their bytes those of the buffers that it plans.
    """
    n = batch_size
    picture = n * architecture.values_per_image
    forward: list[OperationWork] = []
    backward: list[list[OperationWork]] = []
    for i, stage in enumerate(architecture.stages):
        # Nothing needs the gradient to the picture.
        data = i > 0
        if plans is None:
            ahead, back = _stage_work(stage, n, data=data)
        else:
            x = plans[i - 1].output.bytes if i else float_bytes((n, *architecture.input_shape))
            ahead, back = _whole_stage_work(stage, plans[i], x, data=data)
        forward += ahead
        backward.append(back)
    parameters = architecture.parameter_count
    return [
        # A byte and a float a value, an index a picture.
        OperationWork(WHOLE_STEP, Operation.GATHER, picture, 5 * picture + 4 * n),
        *forward,
        OperationWork(WHOLE_STEP, Operation.LOSS, 4 * picture, float_bytes((3, picture))),
        *(work for stage_work in reversed(backward) for work in stage_work),
        OperationWork(WHOLE_STEP, Operation.SGD, 2 * parameters, float_bytes((3, parameters))),
    ]


def _whole_stage_work(
    stage: Stage, plan: StagePlan, input_bytes: int, *, data: bool
) -> tuple[list[OperationWork], list[OperationWork]]:
    """The forward and the backward pass of a stage as a whole, the latter with ``data`` to its input too."""
    parameters = float_bytes((stage.parameter_count,))
    moved = input_bytes + parameters + plan.output.bytes + sum(buffer.bytes for buffer in plan.kept.values())
    flops = plan.filter_flops + data * plan.data_flops
    backward_bytes = moved + data * (input_bytes + parameters)
    return (
        [OperationWork(stage.name, Operation.STAGE_FORWARD, plan.forward_flops, moved)],
        [OperationWork(stage.name, Operation.STAGE_BACKWARD, flops, backward_bytes)],
    )


def _stage_work(stage: Stage, n: int, *, data: bool) -> tuple[list[OperationWork], list[OperationWork]]:
    """The operations of the forward and of the backward pass of a stage, in order, the latter with or without data."""
    x = (n, stage.in_channels, stage.height, stage.width)
    y = (n, stage.out_channels, stage.height, stage.width)
    out = (n, stage.out_channels, stage.out_height, stage.out_width)
    w, b = (stage.weight_count,), (stage.out_channels,)
    flops = n * stage.flops

    def work(operation: Operation, flops: int, *shapes: tuple[int, ...]) -> OperationWork:
        return OperationWork(stage.name, operation, flops, float_bytes(*shapes))

    forward = [work(Operation.FORWARD, flops, x, w, b, y)]
    backward = [
        work(Operation.BACKWARD_FILTER, flops, x, y, w),
        work(Operation.BACKWARD_BIAS, prod(y), y, b),
    ]
    if data:
        backward.append(work(Operation.BACKWARD_DATA, flops, y, w, x))
    if stage.resample == "maxpool":
        forward.append(work(Operation.MAXPOOL, 3 * prod(out), y, out))
        backward.insert(0, work(Operation.MAXPOOL_BACKWARD, 4 * prod(out), y, out, y))
    elif stage.resample == "upsample":
        forward.append(work(Operation.UPSAMPLE, 0, y, out))
        backward.insert(0, work(Operation.UPSAMPLE_BACKWARD, 3 * prod(y), y, out, y))
    return forward, backward
