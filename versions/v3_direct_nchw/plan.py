"""How V3 divides the planes on the GPU: strips of pixels, groups of filters, and what they cost. No device code.

A strip is a few neighbouring rows of one column of a plane and belongs to one thread. The threads of a block take
strips in the order column, group of rows, picture. A warp is therefore full on 32x32 planes and also on 8x8 planes,
where it covers several pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.architecture import Architecture, Stage
from common.device import in_simulator
from common.operations import Operation
from common.work import KernelWork, bias_work, float_bytes, halo_extent, sum_work


@dataclass(frozen=True)
class Strip:
    """What a thread computes, and the number of threads in a block."""

    name: str
    rows: int
    filters: int
    """Output channels a thread computes."""
    threads: int
    registers: int
    """Most registers a thread; its kernels state this number."""
    chunk: int = 1
    """Input channels whose weights are staged together."""
    channels: int = 1
    """Input channels a thread covers in the filter gradient; the warps of a block take neighbouring groups."""

    def strips(self, n: int, height: int, width: int) -> int:
        """Strips that cover n planes."""
        return n * -(-height // self.rows) * width

    def blocks(self, n: int, height: int, width: int) -> int:
        """Blocks that cover n planes, one thread per strip."""
        return -(-self.strips(n, height, width) // self.threads)

    @property
    def block_channels(self) -> int:
        """Input channels that a block covers in the filter gradient."""
        return self.channels * self.threads // SIZES.warp


@dataclass(frozen=True)
class Strips:
    """All sizes that kernels and launches use."""

    conv2d: dict[str, Strip]
    filter: dict[str, Strip]
    warp: int
    """Threads that take neighbouring columns in the filter gradient."""
    bias_threads: int
    blocks_wanted: int
    """A sum is split into shares to get about this many blocks: several for each multiprocessor of a large card."""


def by_name(*strips: Strip) -> dict[str, Strip]:
    """The strips by name."""
    return {strip.name: strip for strip in strips}


# 4 rows x 16 filters a thread: 6 loads and 48 shared floats for 192 FMAs. Small planes and few filters have smaller
# strips, which means more threads; an 8x8 stage still has too few to fill a large card.
FOR_GPU = Strips(
    conv2d=by_name(
        Strip("wide", 4, 16, 128, 128, chunk=8),
        Strip("small", 4, 8, 64, 128, chunk=8),
        Strip("few outputs", 2, 3, 128, 80, chunk=16),
    ),
    filter=by_name(
        Strip("wide", 2, 8, 128, 168, channels=1),
        Strip("few inputs", 2, 8, 96, 168, channels=1),
        Strip("few outputs", 2, 3, 128, 152, channels=2),
    ),
    warp=32,
    bias_threads=128,
    blocks_wanted=1024,
)

# Small sizes for the same code, because simulating a thread is slow.
FOR_SIMULATOR = Strips(
    conv2d=by_name(
        Strip("wide", 3, 2, 8, 0, chunk=2),
        Strip("small", 2, 2, 4, 0, chunk=2),
        Strip("few outputs", 2, 3, 8, 0, chunk=3),
    ),
    filter=by_name(
        Strip("wide", 2, 2, 8, 0, channels=2),
        Strip("few inputs", 2, 4, 12, 0, channels=1),
        Strip("few outputs", 2, 3, 8, 0, channels=2),
    ),
    warp=4,
    bias_threads=8,
    blocks_wanted=8,
)

SIZES = FOR_SIMULATOR if in_simulator() else FOR_GPU
FEW = 3  # a convolution with at most this many channels on one side has its own strips


def conv2d_strip(filters: int, height: int) -> Strip:
    """The strip for a convolution to ``filters`` channels; in backward data these are the stage's input channels."""
    if filters <= FEW:
        return SIZES.conv2d["few outputs"]
    small = SIZES.conv2d["small"]
    return small if height <= 2 * small.rows else SIZES.conv2d["wide"]


def filter_strip(channels: int, filters: int) -> Strip:
    """The strip for the filter gradient."""
    if filters <= FEW:
        return SIZES.filter["few outputs"]
    return SIZES.filter["few inputs" if channels <= FEW else "wide"]


def filter_shares(strip: Strip, n: int, width: int, channels: int, filters: int) -> int:
    """Number of shares of the columns of all pictures; separate blocks sum each share."""
    blocks = -(-filters // strip.filters) * -(-channels // strip.block_channels)
    return max(1, min(-(-n * width // SIZES.warp), SIZES.blocks_wanted // blocks))


def bias_shares(n: int, filters: int) -> int:
    """Number of shares of the pictures in the bias gradient."""
    return max(1, min(n, SIZES.blocks_wanted // filters))


def gpu_workspace(architecture: Architecture, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats: the partial sums of one gradient at a time."""
    floats = 0
    for stage in architecture.stages:
        # A smaller batch has no more shares.
        c, k = stage.in_channels, stage.out_channels
        shares = filter_shares(filter_strip(c, k), batch_size, stage.width, c, k)
        floats = max(floats, shares * stage.weight_count, bias_shares(batch_size, k) * k)
    return {"partial gradients": (floats,)}


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU, computed from the strips above."""
    work = []
    for i, stage in enumerate(architecture.stages):
        c, k = stage.in_channels, stage.out_channels
        work.append(_conv2d_work(stage, Operation.FORWARD, c, k, batch_size))
        if i > 0:  # no operation needs the gradient of the pictures
            work.append(_conv2d_work(stage, Operation.BACKWARD_DATA, k, c, batch_size))
        work += _filter_work(stage, batch_size)
        work += bias_work(stage, batch_size, bias_shares(batch_size, k))
    return work


def _window_reads(n: int, height: int, width: int, rows: int) -> int:
    """Pixels that the strips of n planes read: the rows of each, one above and one below, in three columns."""
    return n * halo_extent(height, rows) * (3 * width - 2)


def _conv2d_work(stage: Stage, operation: Operation, channels: int, filters: int, n: int) -> KernelWork:
    """Forward, or backward data with channels and filters exchanged."""
    h, w, forward = stage.height, stage.width, operation is Operation.FORWARD
    strip = conv2d_strip(filters, h)
    least = float_bytes((n, channels, h, w), (stage.weight_count,), (n, filters, h, w))
    asked = float_bytes(
        (_window_reads(n, h, w, strip.rows), channels, -(-filters // strip.filters)),
        (strip.blocks(n, h, w), stage.weight_count),
        (n, filters, h, w),
        (strip.blocks(n, h, w) * strip.threads if forward else 0, filters),  # biases, once a thread
    )
    # A weight read from shared memory is used for every row of the strip.
    kernel = f"{'CONV2D' if forward else 'FLIPPED'}_KERNELS[{strip.name}]"
    return KernelWork(stage.name, operation, kernel, n * stage.flops, least, asked, 1 / strip.rows)


def _filter_work(stage: Stage, n: int) -> list[KernelWork]:
    c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
    strip = filter_strip(c, k)
    shares = filter_shares(strip, n, w, c, k)
    partials = (shares, stage.weight_count)
    least = float_bytes((n, c, h, w), (n, k, h, w), partials)
    asked = float_bytes(
        (_window_reads(n, h, w, strip.rows), c, -(-k // strip.filters)),
        (n * h * w, k, -(-c // strip.block_channels) * strip.threads // SIZES.warp),
        partials,
    )
    kernel = f"FILTER_KERNELS[{strip.name}]"
    return [
        KernelWork(stage.name, Operation.BACKWARD_FILTER, kernel, n * stage.flops, least, asked),
        sum_work(stage, Operation.BACKWARD_FILTER, shares, stage.weight_count),
    ]
