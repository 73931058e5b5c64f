"""How V5 divides the work: the method of each stage, what it keeps, the FLOPs of its products. No device code."""

from __future__ import annotations

from typing import Literal

import numpy as np

from common.architecture import TAPS, Architecture, Stage
from common.backend import Device
from common.plans import ACTIVATION, BufferPlan, StagePlan
from versions.v5_winograd_nhwc.winograd import OUTPUTS, PRODUCTS, error_factor

Method = Literal["unfold", "winograd", "taps"]

NARROW = 3  # channels: up to so many, transforms would cost more than they save
NOWHERE = 4  # the route of a window or value whose gradient is stopped by the ReLU
ERROR_FACTOR = error_factor()


def method(stage: Stage) -> Method:
    """How the stage is computed.

    ``taps``: its input is an upsampled map, and every small pixel meets each of the nine taps once. ``unfold``: few
    channels, im2col. ``winograd``: everything else.
    """
    if stage.upsampled:
        return "taps"
    return "unfold" if stage.in_channels <= NARROW else "winograd"


def tiles(stage: Stage) -> int:
    """Winograd tiles of one picture; the last ones of a row or column may stand out over its edge."""
    return -(-stage.height // OUTPUTS) * -(-stage.width // OUTPUTS)


def stage_plan(stage: Stage, n: int) -> StagePlan:
    """What the stage writes, keeps and computes for n pictures.

    Pooled outputs are written, full-size ones are not; nothing is upsampled, because the next stage takes the small
    map. A stage with a ReLU keeps a byte for each value of its output, its route: the place in the pooling window, in
    row-major order, where the gradient goes (0 where nothing is pooled), or ``NOWHERE``.
    """
    height, width = (stage.out_height, stage.out_width) if stage.resample == "maxpool" else (stage.height, stage.width)
    shape = (n, height, width, stage.out_channels)
    name = f"{stage.name}.maxpool" if stage.resample == "maxpool" else stage.name
    kept = {"route": BufferPlan(f"{stage.name}.route", shape, "pooling and ReLU decisions", np.uint8)}
    weights = stage.in_channels * stage.out_channels
    direct = n * stage.flops
    products = {
        "unfold": direct,
        "winograd": 2 * n * tiles(stage) * PRODUCTS * weights,
        "taps": direct // 4,
    }[method(stage)]
    # The gradient to the input of a narrow stage takes Winograd's algorithm, with channels and filters exchanged.
    data = 2 * n * tiles(stage) * PRODUCTS * weights if method(stage) == "unfold" else products
    return StagePlan(
        output=BufferPlan(name, shape, ACTIVATION),
        forward_flops=products,
        filter_flops=products,
        data_flops=data,
        kept=kept if stage.relu else {},
        error_factor=1.0 if method(stage) == "taps" else ERROR_FACTOR,
    )
