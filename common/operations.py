"""The operations of a training step, with the work that each has to do whoever does it.

One list drives the layer table, the roofline and the pytest-benchmark suite. FLOPs are those of the result, a multiply
and an add counted as two; bytes are the least that can cross memory, every operand read or written once. A version that
moves more, or computes more, is not credited for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from common.architecture import Architecture, Stage
from common.work import float_bytes

WHOLE_STEP = "step"  # stands in the stage's place for what belongs to no stage: gather, loss, SGD


@dataclass(frozen=True)
class Operation:
    """One operation on one stage, for a whole batch; ``name`` is the backend's, in cuDNN's words."""

    stage: str
    name: str
    flops: int
    least_bytes: int

    @property
    def id(self) -> str:
        """``conv2-backward_filter``."""
        return f"{self.stage}-{self.name}"


def step_operations(architecture: Architecture, batch_size: int) -> list[Operation]:
    """Every operation of a training step of ``batch_size`` pictures, in the order in which a step takes them."""
    n = batch_size
    picture = n * architecture.values_per_image
    forward: list[Operation] = []
    backward: list[list[Operation]] = []
    for stage in architecture.stages:
        ahead, back = _stage_operations(stage, n)
        forward += ahead
        backward.append(back)
    # Nothing needs the gradient to the picture.
    backward[0] = [operation for operation in backward[0] if operation.name != "backward_data"]
    parameters = architecture.parameter_count
    return [
        Operation(WHOLE_STEP, "gather", picture, 5 * picture + 4 * n),  # a byte and a float a value, an index a picture
        *forward,
        Operation(WHOLE_STEP, "loss", 4 * picture, float_bytes((3, picture))),
        *(operation for operations in reversed(backward) for operation in operations),
        Operation(WHOLE_STEP, "sgd", 2 * parameters, float_bytes((3, parameters))),
    ]


def _stage_operations(stage: Stage, n: int) -> tuple[list[Operation], list[Operation]]:
    """Those of the forward and of the backward pass, in order."""
    x = (n, stage.in_channels, stage.height, stage.width)
    y = (n, stage.out_channels, stage.height, stage.width)
    out = (n, stage.out_channels, stage.out_height, stage.out_width)
    w, b = (stage.weight_count,), (stage.out_channels,)
    flops = n * stage.flops

    def operation(name: str, flops: int, *shapes: tuple[int, ...]) -> Operation:
        return Operation(stage.name, name, flops, float_bytes(*shapes))

    forward = [operation("forward", flops, x, w, b, y)]
    backward = [
        operation("backward_filter", flops, x, y, w),
        operation("backward_bias", prod(y), y, b),
        operation("backward_data", flops, y, w, x),
    ]
    if stage.resample == "maxpool":
        forward.append(operation("maxpool", 3 * prod(out), y, out))
        backward.insert(0, operation("maxpool_backward", 4 * prod(out), y, out, y))
    elif stage.resample == "upsample":
        forward.append(operation("upsample", 0, y, out))
        backward.insert(0, operation("upsample_backward", 3 * prod(y), y, out, y))
    return forward, backward
