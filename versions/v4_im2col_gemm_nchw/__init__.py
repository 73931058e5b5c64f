"""V4, im2col + GEMM, NCHW: the convolution as a matrix product, computed by a tuned library.

Idea (Chellapilla, Puri and Simard, 2006): stack nine shifted copies of each channel of a picture. The result, the
column matrix, has a row for every (channel, tap) and a column for every position. Filters times columns is the
convolution, and cuBLAS (BLAS on the CPU) computes it.

What changed from the direct versions: the inner loops are gone, at the cost of memory. A column matrix is nine times as
large as its picture, so it is built for a part of the batch at a time, in a workspace that stays under 75 MB.

The narrow side: a convolution from C to K channels equals the transposed convolution from K to C channels with flipped
filters w' (each window rotated by 180 degrees, K and C exchanged). So either side can be unfolded. V4 always unfolds
the side with fewer channels. For conv5 (256 -> 3) the column matrix then has 27 rows instead of 2,304, at equal FLOPs:

    ============ ======================== ===========================
    operation    C <= K                   C > K (filters flipped)
    ============ ======================== ===========================
    forward      y = w . im2col(x)        y = col2im(w'^T . x)
    data         dx = col2im(w^T . dy)    dx = w' . im2col(dy)
    filter       dw = dy . im2col(x)^T    dw' = x . im2col(dy)^T
    ============ ======================== ===========================

Layout: pictures (N, C, H, W), filters (K, C, R, S). A picture is already a (C, H*W) matrix and a filter bank a
(K, C*R*S) matrix. Only the flipped filters w' (C, K*R*S) need a copy, once a step.

Who owns what on the GPU: in im2col, one thread per value of the column matrix; in col2im, one thread per value of the
picture, which adds its nine values in a fixed order, without atomics; cuBLAS does the rest. On the CPU each thread
processes one picture at a time with its own column matrix, small enough for the cache, and single-threaded BLAS.

Bytes moved: a column matrix of min(C, K) channels is written once and read once, 72 bytes per position and channel.
The product reads its operands from global memory and works on tiles on the chip.

Run it: ``convbench run --backend v4``
"""

from itertools import pairwise

from common.architecture import TAPS, Architecture, Stage
from common.backend import Device
from common.operations import Operation
from common.work import KernelWork, float_bytes, taps_inside

WORKSPACE_LIMIT_BYTES = 75_000_000


def narrow_channels(stage: Stage) -> int:
    """Channels of the side that is unfolded: the smaller number."""
    return min(stage.in_channels, stage.out_channels)


def flipped(stage: Stage) -> bool:
    """Whether the output is the narrow side: then filters are flipped, and im2col and col2im exchanged."""
    return stage.in_channels > stage.out_channels


def workspace(architecture: Architecture, batch_size: int, device: Device, threads: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats. On the GPU they stay under 75 MB together, unless one picture alone needs more."""
    stages = architecture.stages
    most_weights = max(stage.weight_count for stage in stages)
    if device == "cpu":
        columns = max(TAPS * narrow_channels(stage) * stage.height * stage.width for stage in stages)
        return {
            "columns": (threads, columns),
            "flipped filters": (most_weights,),
            "filter gradient parts": (threads, most_weights),
        }
    positions = max(stage.height * stage.width for stage in stages)
    largest = max(floats_per_picture(stage) for stage in stages)
    fixed = 2 * most_weights + batch_size * max(stage.out_channels for stage in stages) + max(positions, batch_size)
    pictures = max(1, min(batch_size, (WORKSPACE_LIMIT_BYTES // 4 - fixed) // largest))
    # Each stage's batch is split into even parts of as many pictures as fit; a small stage needs fewer parts.
    scratch = max(
        floats_per_picture(stage) * min(batch_size, max(1, pictures * largest // floats_per_picture(stage)))
        for stage in stages
    )
    return {
        "columns": (scratch,),
        "flipped filters": (most_weights,),
        "flipped filter gradient": (most_weights,),
        "bias partial sums": (batch_size * max(stage.out_channels for stage in stages),),
        "ones": (max(positions, batch_size),),
    }


def floats_per_picture(stage: Stage) -> int:
    """Scratch for one picture on the GPU: its column matrix and, for the filter gradient, the other side repacked."""
    wide = max(stage.in_channels, stage.out_channels)
    return (TAPS * narrow_channels(stage) + wide) * stage.height * stage.width


def parts(batch_size: int, pictures_at_once: int) -> list[tuple[int, int]]:
    """Split a batch evenly into as few parts as possible: pairs of first picture and count."""
    count = -(-batch_size // pictures_at_once)
    bounds = [batch_size * i // count for i in range(count + 1)]
    return [(first, last - first) for first, last in pairwise(bounds)]


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU; the bytes that cuBLAS requests are not known."""
    work = []
    for i, stage in enumerate(architecture.stages):
        c, k = stage.in_channels, stage.out_channels
        work += _convolution_work(stage, batch_size, Operation.FORWARD, c, k)
        if i > 0:  # no operation needs the gradient of the pictures
            work += _convolution_work(stage, batch_size, Operation.BACKWARD_DATA, k, c)
        work += _filter_work(stage, batch_size)
        y = batch_size * stage.height * stage.width * k
        moved = float_bytes((y,), (batch_size, k), (k,))
        work.append(KernelWork(stage.name, Operation.BACKWARD_BIAS, "cuBLAS, twice", y, moved, None))
    return work


def _convolution_work(stage: Stage, n: int, operation: Operation, channels: int, filters: int) -> list[KernelWork]:
    """Forward, or backward data with channels and filters exchanged: unfold and multiply, or multiply and fold."""
    forward = operation is Operation.FORWARD
    unfold = channels < filters or (channels == filters and forward)
    pixels, weights = n * stage.height * stage.width, stage.weight_count
    columns, y = pixels * TAPS * min(channels, filters), pixels * filters
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
    if flipped(stage):
        rows.append(("flip_filters_kernel", 0, float_bytes((2 * weights,)), float_bytes((2 * weights,))))
    return [KernelWork(stage.name, Operation.BACKWARD_FILTER, *row) for row in rows]
