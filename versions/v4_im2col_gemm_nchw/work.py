"""What V4's kernels cost on the GPU: FLOPs and bytes; the bytes that cuBLAS requests are not known."""

from __future__ import annotations

from common.architecture import TAPS, Architecture, Stage
from common.operations import Operation
from common.work import KernelWork, float_bytes, sum_kernel, sum_rows, taps_inside
from versions.v4_im2col_gemm_nchw.plan import filter_parts, flipped, fuses_resampling, narrow_channels


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU, those of a part of the batch taken together.

    Where the forward pass of a stage is fused, it includes what follows the convolution.
    """
    work = []
    for i, stage in enumerate(architecture.stages):
        c, k = stage.in_channels, stage.out_channels
        forward = Operation.STAGE_FORWARD if fuses_resampling(stage) else Operation.FORWARD
        work += _convolution_work(stage, batch_size, forward, c, k)
        if i > 0:  # no operation needs the gradient of the pictures
            work += _convolution_work(stage, batch_size, Operation.BACKWARD_DATA, k, c)
        work += _filter_work(stage, batch_size, architecture)
        y = batch_size * stage.height * stage.width * k
        moved = float_bytes((y,), (batch_size, k), (k,))
        work.append(KernelWork(stage.name, Operation.BACKWARD_BIAS, "cuBLAS, twice", y, moved, None))
    return work


def _convolution_work(stage: Stage, n: int, operation: Operation, channels: int, filters: int) -> list[KernelWork]:
    """Forward, or backward data with channels and filters exchanged: unfold and multiply, or multiply and fold."""
    forward = operation is not Operation.BACKWARD_DATA
    unfold = channels < filters or (channels == filters and forward)
    pixels, weights = n * stage.height * stage.width, stage.weight_count
    columns, y = pixels * TAPS * min(channels, filters), pixels * filters
    resample = stage.resample if operation is Operation.STAGE_FORWARD else None
    out = n * filters * stage.out_height * stage.out_width if resample else 0
    threads = y // 4 if resample == "maxpool" else y
    biases = threads if forward else 0
    follows = ", ".join(filter(None, ("product" if unfold else "fold", forward and "bias", resample)))
    rows = []

    def row(kernel: str, flops: int, least: int, asked: int | None) -> None:
        rows.append(KernelWork(stage.name, operation, kernel, flops, least, asked))

    if unfold != forward:
        row("flip_filters_kernel", 0, float_bytes((2 * weights,)), float_bytes((2 * weights,)))
    if unfold:
        read = n * taps_inside(stage.height, stage.width) * channels
        row("im2col_kernel", 0, float_bytes((pixels, channels), (columns,)), float_bytes((read,), (columns,)))
        row("cuBLAS", n * stage.flops, float_bytes((weights,), (columns,), (y,)), None)
        if forward:
            moved = float_bytes((2 * y,), (out,))
            row(f"finish_kernel[{follows}]", 2 * y, moved + float_bytes((filters,)), moved + float_bytes((biases,)))
    else:
        read = n * taps_inside(stage.height, stage.width) * filters
        row("cuBLAS", n * stage.flops, float_bytes((weights,), (pixels, channels), (columns,)), None)
        moved = float_bytes((read,), (y,), (out,))
        row(f"finish_kernel[{follows}]", read, moved, moved + float_bytes((biases,)))
    return rows


def _filter_work(stage: Stage, n: int, architecture: Architecture) -> list[KernelWork]:
    """A gradient for each picture, and their sums, part by part."""
    narrow, wide = narrow_channels(stage), max(stage.in_channels, stage.out_channels)
    pixels, weights = n * stage.height * stage.width, stage.weight_count
    columns = pixels * TAPS * narrow
    read = n * taps_inside(stage.height, stage.width) * narrow

    def row(kernel: str, flops: int, least: int, asked: int | None) -> KernelWork:
        return KernelWork(stage.name, Operation.BACKWARD_FILTER, kernel, flops, least, asked)

    rows = [
        row("im2col_kernel", 0, float_bytes((pixels, narrow), (columns,)), float_bytes((read,), (columns,))),
        row("cuBLAS", n * stage.flops, float_bytes((columns,), (pixels, wide), (n, weights)), None),
    ]
    counts = [count for _, count in filter_parts(stage, architecture, n)]
    for kernel in dict.fromkeys(sum_kernel(count, weights) for count in counts):
        shares = [count for count in counts if sum_kernel(count, weights) == kernel]
        # The first part's sum is stored, those of the others are added to it.
        stored = sum_kernel(counts[0], weights) == kernel
        moved = float_bytes((sum(shares) + 2 * len(shares) - stored, weights))
        loads = sum(shares) / len(shares) / sum_rows(shares[0], weights)
        rows.append(
            KernelWork(stage.name, Operation.BACKWARD_FILTER, kernel, sum(shares) * weights, moved, moved, loads=loads)
        )
    if flipped(stage):
        rows.append(row("flip_filters_kernel", 0, float_bytes((2 * weights,)), float_bytes((2 * weights,))))
    return rows
