"""How V3 divides the planes on the GPU: strips of pixels, groups of filters, shares of sums. No device code.

A strip is a few neighbouring rows of one column of a plane and belongs to one thread. The threads of a block take
strips in the order column, group of rows, picture. A warp is therefore full on 32x32 planes and also on 8x8 planes,
where it covers several pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.architecture import Architecture
from common.device import in_simulator


@dataclass(frozen=True, kw_only=True)
class Strip:
    """What a thread of the convolution kernel computes, and how its block stages the weights."""

    name: str
    rows: int
    filters: int
    """Output channels of a thread, and of its block."""
    chunk: int
    """Input channels whose weights are staged together."""
    threads: int
    """Of a block: each has a strip of its own."""
    filter_lanes: int
    """While weights are staged, the threads are spread over this many filters, at least ``filters``,"""
    line: int
    """and this many neighbouring lanes load neighbouring taps of one filter."""
    registers: int
    """Most registers a thread; the kernel states this number."""
    ffma: float | None = None
    """The least share of multiply-adds among the instructions of the inner loop; the kernel states it."""

    @property
    def bank(self) -> int:
        """Floats from one tap to the next in shared memory: an odd multiple of four.

        Eight taps of four neighbouring filters are then in 32 different banks, and a tap's filters start on 16 bytes.
        """
        return 4 * (-(-self.filters // 4) | 1)

    def strips(self, n: int, height: int, width: int) -> int:
        """Strips that cover n planes."""
        return n * -(-height // self.rows) * width

    def blocks(self, n: int, height: int, width: int) -> int:
        """Blocks that cover n planes, one thread per strip."""
        return -(-self.strips(n, height, width) // self.threads)


@dataclass(frozen=True, kw_only=True)
class FilterStrip:
    """What a thread of the filter gradient sums, and how many rows of a column it processes together."""

    name: str
    rows: int
    """1 or 2."""
    filters: int
    channels: int
    """Input channels of a thread, 1 or 2; the warps of a block take neighbouring groups."""
    threads: int
    registers: int
    """As in ``Strip``, and so is the next."""
    ffma: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that the kernel does not have: its loops over them are written out."""
        if not {self.rows, self.channels} <= {1, 2}:
            raise ValueError(f"a strip has 1 or 2 rows and channels, not {self.rows} and {self.channels}")

    def block_channels(self, warp: int) -> int:
        """Input channels that a block covers."""
        return self.channels * self.threads // warp


@dataclass(frozen=True, kw_only=True)
class Strips:
    """All sizes that kernels and launches use."""

    conv2d: dict[str, Strip]
    filter: dict[str, FilterStrip]
    warp: int
    """Threads that take neighbouring columns in the filter gradient."""
    bias_threads: int
    blocks_wanted: int
    """A sum is split into shares to get about this many blocks: several for each multiprocessor of a large card."""


# 4 rows x 16 filters a thread: 6 loads and 48 shared floats for 192 FMAs. Small planes and few filters have smaller
# strips, which means more threads.
WIDE = Strip(name="wide", rows=4, filters=16, chunk=8, threads=128, filter_lanes=16, line=8, registers=128, ffma=0.76)
SMALL = Strip(name="small", rows=4, filters=8, chunk=8, threads=64, filter_lanes=8, line=8, registers=128, ffma=0.68)
FEW_OUTPUTS = Strip(
    name="few outputs", rows=2, filters=3, chunk=16, threads=128, filter_lanes=4, line=8, registers=80, ffma=0.48
)
# 8 filters x 2 channels x 9 taps a thread: 28 loads for 288 FMAs.
FOR_GPU = Strips(
    conv2d={strip.name: strip for strip in (WIDE, SMALL, FEW_OUTPUTS)},
    filter={
        "wide": FilterStrip(name="wide", rows=2, filters=8, channels=2, threads=128, registers=255, ffma=0.77),
        "few inputs": FilterStrip(
            name="few inputs", rows=2, filters=8, channels=1, threads=96, registers=168, ffma=0.7
        ),
        "few outputs": FilterStrip(
            name="few outputs", rows=2, filters=3, channels=2, threads=128, registers=152, ffma=0.6
        ),
    },
    warp=32,
    bias_threads=128,
    blocks_wanted=1024,
)

# Small sizes for the same code, because simulating a thread is slow.
FOR_SIMULATOR = Strips(
    conv2d={
        "wide": Strip(name="wide", rows=3, filters=2, chunk=2, threads=8, filter_lanes=2, line=2, registers=0),
        "small": Strip(name="small", rows=2, filters=2, chunk=2, threads=4, filter_lanes=2, line=2, registers=0),
        "few outputs": Strip(
            name="few outputs", rows=2, filters=3, chunk=3, threads=8, filter_lanes=4, line=2, registers=0
        ),
    },
    filter={
        "wide": FilterStrip(name="wide", rows=2, filters=2, channels=2, threads=8, registers=0),
        "few inputs": FilterStrip(name="few inputs", rows=2, filters=4, channels=1, threads=12, registers=0),
        "few outputs": FilterStrip(name="few outputs", rows=2, filters=3, channels=2, threads=8, registers=0),
    },
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


def filter_strip(channels: int, filters: int) -> FilterStrip:
    """The strip for the filter gradient."""
    if filters <= FEW:
        return SIZES.filter["few outputs"]
    return SIZES.filter["few inputs" if channels <= FEW else "wide"]


def filter_shares(strip: FilterStrip, n: int, width: int, channels: int, filters: int) -> int:
    """Number of shares of the columns of all pictures; separate blocks sum each share."""
    blocks = -(-filters // strip.filters) * -(-channels // strip.block_channels(SIZES.warp))
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
