"""What V3's kernels cost on the GPU: FLOPs, bytes and turns of loops, computed from the strips of ``plan.py``."""

from __future__ import annotations

from common.architecture import Architecture, Stage
from common.operations import Operation
from common.work import KernelWork, bias_work, float_bytes, halo_extent, sum_work
from versions.v3_direct_nchw import plan


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU."""
    work = []
    for i, stage in enumerate(architecture.stages):
        c, k = stage.in_channels, stage.out_channels
        work.append(_conv2d_work(stage, Operation.FORWARD, c, k, batch_size))
        if i > 0:  # no operation needs the gradient of the pictures
            work.append(_conv2d_work(stage, Operation.BACKWARD_DATA, k, c, batch_size))
        work += _filter_work(stage, batch_size)
        shares, positions = plan.bias_shares(batch_size, k), stage.height * stage.width
        work += bias_work(stage, batch_size, shares, batch_size * positions / shares / plan.SIZES.bias_threads)
    return work


def _conv2d_work(stage: Stage, operation: Operation, channels: int, filters: int, n: int) -> KernelWork:
    """Forward, or backward data with channels and filters exchanged."""
    h, w, forward = stage.height, stage.width, operation is Operation.FORWARD
    strip = plan.conv2d_strip(filters, h)
    blocks, groups = strip.blocks(n, h, w), -(-filters // strip.filters)
    # A strip reads its rows, one above and one below, in three columns.
    inputs = n * halo_extent(h, strip.rows) * (3 * w - 2)
    return KernelWork(
        stage.name,
        operation,
        f"conv2d_kernel[{strip.name}]",
        flops=n * stage.flops,
        least_bytes=float_bytes((n, channels, h, w), (stage.weight_count,), (n, filters, h, w)),
        asked_bytes=float_bytes(
            (inputs, channels, groups),
            (blocks, stage.weight_count),
            (n, filters, h, w),
            (blocks * strip.threads if forward else 0, filters),  # biases, once a thread
        ),
        # A weight is used for every row of the strip; weights are read four at a time.
        shared_loads_per_fma=4 * -(-strip.filters // 4) / (strip.filters * strip.rows),
        fmas=channels * 9 * strip.rows * strip.filters,
        rounds=(-(-channels // strip.chunk), channels),
    )


def _filter_work(stage: Stage, n: int) -> list[KernelWork]:
    c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
    strip, warp = plan.filter_strip(c, k), plan.SIZES.warp
    shares = plan.filter_shares(strip, n, w, c, k)
    partials = (shares, stage.weight_count)
    # Each filter group reads the rows of x once, in three columns. Every warp reads dy for itself.
    inputs = (n, h, 3 * w - 2, c, -(-k // strip.filters))
    gradients = (n * h * w, k, -(-c // strip.block_channels(warp)) * strip.threads // warp)
    columns = n * w / shares / warp  # of a thread
    kernel = KernelWork(
        stage.name,
        Operation.BACKWARD_FILTER,
        f"conv2d_backward_filter_kernel[{strip.name}]",
        flops=n * stage.flops,
        least_bytes=float_bytes((n, c, h, w), (n, k, h, w), partials),
        asked_bytes=float_bytes(inputs, gradients, partials),
        fmas=columns * -(-h // strip.rows) * strip.rows * strip.channels * 9 * strip.filters,
        rounds=(columns,),
    )
    return [kernel, sum_work(stage, Operation.BACKWARD_FILTER, shares, stage.weight_count)]
