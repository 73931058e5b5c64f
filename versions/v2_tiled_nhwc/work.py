"""What V2's kernels cost on the GPU: FLOPs, bytes and turns of loops, computed from the tiles of ``plan.py``."""

from __future__ import annotations

from common.architecture import Architecture, Stage
from common.operations import Operation
from common.work import KernelWork, bias_work, float_bytes, sum_work
from versions.v2_tiled_nhwc import plan


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU."""
    work = []
    for i, stage in enumerate(architecture.stages):
        c, k = stage.in_channels, stage.out_channels
        work.append(_conv2d_work(stage, Operation.FORWARD, c, k, batch_size))
        if i > 0:  # no operation needs the gradient of the pictures
            work.append(_conv2d_work(stage, Operation.BACKWARD_DATA, k, c, batch_size))
        work += _filter_work(stage, batch_size)
        pixels = batch_size * stage.height * stage.width
        rows = plan.SIZES.bias_threads // min(k, plan.SIZES.bias_threads)
        shares = plan.bias_shares(pixels)
        work += bias_work(stage, batch_size, shares, pixels / shares / rows)
    return work


def _conv2d_work(stage: Stage, operation: Operation, channels: int, filters: int, n: int) -> KernelWork:
    """Forward, or backward data with channels and filters exchanged."""
    h, w, forward = stage.height, stage.width, operation is Operation.FORWARD
    tile = plan.conv2d_tile(channels, filters, h, w)
    tiles = tile.pixel_tiles(n, h, w)
    few = isinstance(tile, plan.FewOutputsTile)
    outputs = tile.filters if few else tile.thread_filters  # of a thread
    step = tile.slices if few else tile.chunk
    steps = -(-channels // step)
    # A thread reads a bias once for each output, or for each run of pixels that it owns.
    biases = n * h * w if few else tiles * tile.rows * tile.columns // tile.thread_pixels
    return KernelWork(
        stage.name,
        operation,
        "conv2d_few_outputs_kernel" if few else f"conv2d_kernel[{tile.name}]",
        flops=n * stage.flops,
        least_bytes=float_bytes((n, h, w, channels), (stage.weight_count,), (n, h, w, filters)),
        asked_bytes=float_bytes(
            (tile.halo_pixels_read(n, h, w), channels, -(-filters // tile.filters)),
            (tiles, stage.weight_count),
            (n, h, w, filters),
            (biases if forward else 0, filters),
        ),
        # For three taps of a row: a run of pixels with its halo, and each tap's filters.
        shared_loads_per_fma=(tile.thread_pixels + 2 + 3 * outputs) / (3 * tile.thread_pixels * outputs),
        fmas=steps * (1 if few else step) * 9 * tile.thread_pixels * outputs,
        rounds=(steps,) if few else (steps, steps * step),
    )


def _filter_work(stage: Stage, n: int) -> list[KernelWork]:
    c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
    tile = plan.filter_tile(c, k, h, w)
    shares = plan.filter_shares(tile, n, h, w, c, k)
    halo, pixels = tile.halo_pixels_read(n, h, w), n * h * w
    partials = (shares, stage.weight_count)
    if isinstance(tile, plan.FewChannelsTile):
        few, many = sorted((c, k))
        own = tile.many // tile.threads
        operands = (halo, few, -(-many // tile.many)), (pixels, many, -(-few // tile.few))
        # For a run of pixels and all nine taps: the few channels of the run with its halo.
        loads, products = 3 * (tile.thread_pixels + 2) * tile.few, tile.few * own
        kernel = f"conv2d_narrow_filter_kernel[few {'inputs' if c <= k else 'outputs'}]"
    else:
        operands = (halo, c, -(-k // tile.filters)), (pixels, k, -(-c // tile.channels))
        # For a run of pixels and all nine taps: a window of one channel, and each pixel's filters.
        loads = 3 * (tile.thread_pixels + 2) + tile.thread_pixels * tile.thread_filters
        products = tile.thread_filters
        kernel = f"conv2d_backward_filter_kernel[{tile.name}]"
    tiles = tile.pixel_tiles(n, h, w) / shares  # of a block
    return [
        KernelWork(
            stage.name,
            Operation.BACKWARD_FILTER,
            kernel,
            flops=n * stage.flops,
            least_bytes=float_bytes((pixels, c), (pixels, k), partials),
            asked_bytes=float_bytes(*operands, partials),
            shared_loads_per_fma=loads / (tile.thread_pixels * 9 * products),
            fmas=tiles * tile.rows * tile.columns * 9 * products,
            rounds=(tiles,),
        ),
        sum_work(stage, Operation.BACKWARD_FILTER, shares, stage.weight_count),
    ]
