"""V4, im2col + GEMM, NCHW: the convolution as a matrix product, left to the best matrix product there is.

The idea (Chellapilla, Puri and Simard, 2006): lay the nine shifted copies of a picture's channels under one another.
The result, the column matrix, has a row for every (channel, tap) and a column for every position; filters times
columns is the convolution, and cuBLAS (BLAS on the CPU) is very good at products.

What changed from the direct versions: the inner loops are gone, bought with memory. A column matrix holds nine times
its picture, so it is built for a part of the batch at a time, in a workspace that stays under 75 MB.

The narrow side: a convolution from C to K channels is the transposed convolution from K to C with each filter turned
by 180 degrees, so either side's picture can be the one that is unfolded. V4 always unfolds the side with fewer
channels, which for conv5 (256 -> 3) makes the column matrix 27 rows high instead of 2,304 at the same FLOPs:

    ============ ======================== ===========================
    operation    C <= K                   C > K (filters turned)
    ============ ======================== ===========================
    forward      y = w . im2col(x)        y = col2im(w'^T . x)
    data         dx = col2im(w^T . dy)    dx = w' . im2col(dy)
    filter       dw = dy . im2col(x)^T    dw' = x . im2col(dy)^T
    ============ ======================== ===========================

Layout: pictures (N, C, H, W), filters (K, C, R, S): a picture is already a (C, H*W) matrix and a filter bank a
(K, C*R*S) one, so nothing is transposed but the turned filters w' (C, K*R*S), once a step.

Who owns what on the GPU: im2col, one thread per value of the column matrix; col2im, one thread per value of the
picture, which adds its nine values in a fixed order (no atomics); cuBLAS the rest. On the CPU each thread takes a
picture at a time through its own column matrix, small enough for the cache, with single-threaded BLAS.

Bytes moved: a column matrix of min(C, K) channels is written once and read once, 72 bytes per position and channel;
the product itself reads each operand once from global memory and works from on-chip tiles.

Run it: ``convbench run --backend v4``
"""

from itertools import pairwise

from common.architecture import TAPS, Architecture, Stage
from common.backend import Device
from common.work import KernelWork, float_bytes, taps_inside

WORKSPACE_LIMIT_BYTES = 75_000_000


def narrow_channels(stage: Stage) -> int:
    """Channels of the side that is unfolded."""
    return min(stage.in_channels, stage.out_channels)


def turned(stage: Stage) -> bool:
    """Whether the narrow side is the output, so that the filters are turned and im2col and col2im swap places."""
    return stage.in_channels > stage.out_channels


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats. On the GPU they stay under 75 MB together, unless one picture alone needs more."""
    stages = architecture.stages
    most_weights = max(stage.weight_count for stage in stages)
    if device == "cpu":
        columns = max(TAPS * narrow_channels(stage) * stage.height * stage.width for stage in stages)
        return {
            "columns": (threads, columns),
            "turned filters": (most_weights,),
            "filter gradient parts": (threads, most_weights),
        }
    positions = max(stage.height * stage.width for stage in stages)
    largest = max(floats_per_picture(stage) for stage in stages)
    fixed = 2 * most_weights + batch_size * max(stage.out_channels for stage in stages) + max(positions, batch_size)
    pictures = max(1, min(batch_size, (WORKSPACE_LIMIT_BYTES // 4 - fixed) // largest))
    # Even parts of each stage's batch, as many pictures as fit: a small stage goes through in fewer parts.
    scratch = max(
        floats_per_picture(stage) * min(batch_size, max(1, pictures * largest // floats_per_picture(stage)))
        for stage in stages
    )
    return {
        "columns": (scratch,),
        "turned filters": (most_weights,),
        "turned filter gradient": (most_weights,),
        "bias partial sums": (batch_size * max(stage.out_channels for stage in stages),),
        "ones": (max(positions, batch_size),),
    }


def floats_per_picture(stage: Stage) -> int:
    """Scratch for one picture on the GPU: its column matrix, and for the filter gradient the other side, repacked."""
    wide = max(stage.in_channels, stage.out_channels)
    return (TAPS * narrow_channels(stage) + wide) * stage.height * stage.width


def parts(batch_size: int, pictures_at_once: int) -> list[tuple[int, int]]:
    """Split a batch evenly into as few parts as fit: pairs of first picture and count."""
    count = -(-batch_size // pictures_at_once)
    bounds = [batch_size * i // count for i in range(count + 1)]
    return [(first, last - first) for first, last in pairwise(bounds)]


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU; what cuBLAS asks of global memory is its own affair."""
    work = []
    for i, stage in enumerate(architecture.stages):
        c, k = stage.in_channels, stage.out_channels
        work += _convolution_work(stage, batch_size, "forward", c, k)
        if i > 0:  # nothing needs the gradient to the pictures themselves
            work += _convolution_work(stage, batch_size, "backward data", k, c)
        work += _filter_work(stage, batch_size)
        y = batch_size * stage.height * stage.width * k
        moved = float_bytes((y,), (batch_size, k), (k,))
        work.append(KernelWork(stage.name, "backward bias", "cuBLAS, twice", y, moved, None))
    return work


def _convolution_work(stage: Stage, n: int, operation: str, channels: int, filters: int) -> list[KernelWork]:
    """Forward, or backward data with channels and filters exchanged: unfold and multiply, or multiply and fold."""
    forward = operation == "forward"
    unfold = channels < filters or (channels == filters and forward)
    pixels, weights = n * stage.height * stage.width, stage.weight_count
    columns, y = pixels * TAPS * min(channels, filters), pixels * filters
    rows = []

    def row(kernel: str, flops: int, least: int, asked: int | None) -> None:
        rows.append(KernelWork(stage.name, operation, kernel, flops, least, asked))

    if unfold != forward:
        row("turn_filters_kernel", 0, float_bytes((2 * weights,)), float_bytes((2 * weights,)))
    if unfold:
        read = n * taps_inside(stage.height, stage.width) * channels
        row("im2col_kernel", 0, float_bytes((pixels, channels), (columns,)), float_bytes((read,), (columns,)))
        row("cuBLAS", n * stage.flops, float_bytes((weights,), (columns,), (y,)), None)
        if forward:
            row("bias_relu_kernel", 2 * y, float_bytes((2 * y,), (filters,)), float_bytes((3 * y,)))
    else:
        read = n * taps_inside(stage.height, stage.width) * filters
        row("cuBLAS", n * stage.flops, float_bytes((weights,), (pixels, channels), (columns,)), None)
        biases = y if forward else 0
        row("col2im_kernel", read, float_bytes((read,), (y,)), float_bytes((read,), (biases,), (y,)))
    return rows


def _filter_work(stage: Stage, n: int) -> list[KernelWork]:
    narrow, wide = sorted((stage.in_channels, stage.out_channels))
    pixels, weights = n * stage.height * stage.width, stage.weight_count
    columns, packed = pixels * TAPS * narrow, pixels * wide
    read = n * taps_inside(stage.height, stage.width) * narrow
    rows = [
        ("im2col_kernel", 0, float_bytes((pixels, narrow), (columns,)), float_bytes((read,), (columns,))),
        ("repack_kernel", 0, float_bytes((2 * packed,)), float_bytes((2 * packed,))),
        ("cuBLAS", n * stage.flops, float_bytes((columns,), (packed,), (weights,)), None),
    ]
    if turned(stage):
        rows.append(("turn_filters_kernel", 0, float_bytes((2 * weights,)), float_bytes((2 * weights,))))
    return [KernelWork(stage.name, "backward filter", *row) for row in rows]
