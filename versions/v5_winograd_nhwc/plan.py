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
LANES = 64  # channels that the CPU works on at a time, and filters of a chunk
BLOCK_ROWS = 4  # of an unfolded picture: even, for the pooling
TILES_AT_ONCE = 128  # rows of a product
PIXELS_AT_ONCE = 256  # rows of a product where the input is upsampled
PIECES = 16  # at least, where a sum over pictures is shared out
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
    kept = {"route": BufferPlan(f"{stage.name}.route", shape, "gradient routes", np.uint8)}
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


def pictures_at_once(stage: Stage, n: int) -> int:
    """Pictures of a batch of n that the CPU takes together: few enough for its cache, many enough for the products."""
    if method(stage) == "taps":
        return max(1, min(n, 4 * PIXELS_AT_ONCE // (stage.height * stage.width)))
    return max(1, min(n, TILES_AT_ONCE // tiles(stage)))


def filter_shares(stage: Stage, n: int) -> int:
    """Shares of the batch whose filter gradients the CPU sums apart, where it does not sum all in order."""
    if method(stage) == "unfold":
        return min(4 * PIECES, n * -(-stage.height // BLOCK_ROWS))
    chunks = -(-stage.out_channels // LANES)
    return min(-(-n // pictures_at_once(stage, n)), -(-PIECES // chunks))


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats."""
    if device == "gpu":
        from versions.v5_winograd_nhwc.gpu_plan import gpu_workspace

        return gpu_workspace(architecture, batch_size)
    scratch, partials = [PRODUCTS * LANES], [0]
    transformed, weights = [0], [0]  # of a group of pictures, on the side of a stage that has more channels
    for stage in architecture.stages:
        c, k, pixels = stage.in_channels, stage.out_channels, stage.height * stage.width
        kind, shares = method(stage), filter_shares(stage, batch_size)
        if kind == "taps":
            lanes = min(LANES, k)
            together = pictures_at_once(stage, batch_size) * pixels // 4
            scratch.append((together * TAPS + 2 * stage.width + 6 * pixels // 4) * lanes)
            weights.append(stage.weight_count)
            partials.append(shares * (stage.weight_count + k))
            continue
        if kind == "unfold":
            scratch.append(BLOCK_ROWS * stage.width * (TAPS * c + k))
            partials.append(shares * (stage.weight_count + k))
        # Also where a narrow stage is asked for the gradient to its input.
        together = pictures_at_once(stage, batch_size) * tiles(stage)
        transformed.append(PRODUCTS * padded(together * max(c, k)))
        weights.append(PRODUCTS * padded(c * k))
    return {
        "scratch": (threads, -(-max(scratch) // 16) * 16),
        "transformed filters": (max(weights),),
        "transformed tiles": (max(transformed),),
        "products of tiles": (max(transformed),),
        "shares of gradients": (max(partials),),
    }


def padded(floats: int) -> int:
    """The distance between the parts of a transformed array, in floats: no multiple of a cache's power of two."""
    return -(-floats // 16) * 16 + 80
