"""How V2 cuts the work on the GPU into tiles: sizes, shares of sums, workspace. No device code.

While a tile is staged, the lanes of a warp cover eight neighbouring channels and four neighbouring pixels or filters.
They store to different banks if the distance between two channels in shared memory is an odd multiple of four floats;
the padding makes it one. With other numbers of channels (conv1, conv5) some bank conflicts remain.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.architecture import Architecture
from common.device import in_simulator
from common.work import halo_extent


@dataclass(frozen=True, kw_only=True)
class Tile:
    """The pixels of a block, and what is common to all kernels."""

    rows: int
    columns: int
    thread_pixels: int
    """Neighbouring pixels of a row that a thread processes together."""
    threads: int
    """Of a block."""
    registers: int
    """Most registers a thread; the kernel states this number."""
    ffma: float | None = None
    """The least share of multiply-adds among the instructions of the inner loop; the kernel states it."""

    @property
    def halo_pixels(self) -> int:
        """Pixels of a tile with its border of one pixel."""
        return (self.rows + 2) * (self.columns + 2)

    @property
    def plane(self) -> int:
        """Floats from one channel of the staged input to the next, where the pixels of a channel are together."""
        return padded(self.halo_pixels)

    def pixel_tiles(self, n: int, height: int, width: int) -> int:
        """Tiles that cover n pictures."""
        return n * -(-height // self.rows) * -(-width // self.columns)

    def halo_pixels_read(self, n: int, height: int, width: int) -> int:
        """Pixels inside the picture that all tiles read; a pixel in several halos counts several times."""
        return n * halo_extent(height, self.rows) * halo_extent(width, self.columns)


@dataclass(frozen=True, kw_only=True)
class ConvolutionTile(Tile):
    """A block of the convolution kernel: pixels x filters, in steps of ``chunk`` input channels."""

    name: str
    filters: int
    """Output channels of a block."""
    chunk: int
    """Input channels that are in shared memory together."""
    thread_filters: int
    vector: int
    """How many of a thread's filters are neighbours: 4 can be one load, 1 lets a warp store whole sectors."""

    @property
    def bank(self) -> int:
        """Floats from one tap of the staged filters to the next; nine of them lie between two channels."""
        return padded(self.filters)


@dataclass(frozen=True, kw_only=True)
class FewOutputsTile(Tile):
    """A block of the convolution kernel for few output channels: its threads split the input channels."""

    filters: int
    slices: int
    """Threads that share a run of pixels, each for one of so many neighbouring input channels."""


@dataclass(frozen=True, kw_only=True)
class FilterTile(Tile):
    """A block of the filter gradient: filters x channels, in steps of a tile of pixels of dy."""

    name: str
    filters: int
    channels: int
    """Input channels of a block, one for each of neighbouring lanes."""
    thread_filters: int
    vector: int
    """As in ``ConvolutionTile``."""


@dataclass(frozen=True, kw_only=True)
class FewChannelsTile(Tile):
    """A block of the filter gradient where x or dy has few channels."""

    few: int
    """Channels of that side,"""
    many: int
    """and of the other: a multiple of the threads."""


def padded(floats: int) -> int:
    """The next odd multiple of four."""
    return 4 * (-(-floats // 4) | 1)


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """All sizes that kernels and launches use."""

    wide: ConvolutionTile
    small: ConvolutionTile
    few_inputs: ConvolutionTile
    few_outputs: FewOutputsTile
    wide_filter: FilterTile
    small_filter: FilterTile
    few_channels: FewChannelsTile
    bias_threads: int
    bias_pixels: int
    """Pixels of a share of the bias gradient, at least."""
    blocks_wanted: int
    """A sum is split into shares to get about this many blocks: several for each multiprocessor of a large card."""


# 8x8 outputs a thread: 34 shared floats for 192 FMAs. On 8x8 pictures there would be too few blocks, so a thread takes
# 4x4. With three input channels there is one step only, and stores limit the speed.
FOR_GPU = Tiling(
    wide=ConvolutionTile(
        name="wide", rows=8, columns=16, filters=64, chunk=8, thread_pixels=8, thread_filters=8, vector=4,
        threads=128, registers=128, ffma=0.85,
    ),
    small=ConvolutionTile(
        name="small", rows=8, columns=8, filters=32, chunk=8, thread_pixels=4, thread_filters=4, vector=4,
        threads=128, registers=128, ffma=0.68,
    ),
    few_inputs=ConvolutionTile(
        name="few inputs", rows=8, columns=16, filters=64, chunk=3, thread_pixels=8, thread_filters=8, vector=1,
        threads=128, registers=128, ffma=0.76,
    ),
    few_outputs=FewOutputsTile(
        rows=8, columns=16, filters=3, slices=8, thread_pixels=8, threads=128, registers=128, ffma=0.7
    ),
    wide_filter=FilterTile(
        name="wide", rows=4, columns=16, filters=64, channels=16, thread_pixels=4, thread_filters=8, vector=4,
        threads=128, registers=168, ffma=0.82,
    ),
    small_filter=FilterTile(
        name="small", rows=8, columns=8, filters=64, channels=16, thread_pixels=4, thread_filters=8, vector=4,
        threads=128, registers=168, ffma=0.82,
    ),
    few_channels=FewChannelsTile(
        rows=4, columns=16, few=3, many=256, thread_pixels=2, threads=128, registers=128, ffma=0.6
    ),
    bias_threads=256,
    bias_pixels=64,
    blocks_wanted=512,
)  # fmt: skip

# Small sizes for the same code, because simulating a thread is slow. As in the real sizes, the input tile of one kind
# ends where the next channel's begins, the last load reaches past the tile, and sums are split unevenly.
FOR_SIMULATOR = Tiling(
    wide=ConvolutionTile(
        name="wide", rows=2, columns=4, filters=4, chunk=2, thread_pixels=2, thread_filters=2, vector=2,
        threads=8, registers=0,
    ),
    small=ConvolutionTile(
        name="small", rows=3, columns=2, filters=2, chunk=2, thread_pixels=2, thread_filters=1, vector=1,
        threads=6, registers=0,
    ),
    few_inputs=ConvolutionTile(
        name="few inputs", rows=2, columns=4, filters=4, chunk=3, thread_pixels=2, thread_filters=2, vector=1,
        threads=8, registers=0,
    ),
    few_outputs=FewOutputsTile(rows=2, columns=4, filters=3, slices=2, thread_pixels=2, threads=8, registers=0),
    wide_filter=FilterTile(
        name="wide", rows=3, columns=4, filters=4, channels=4, thread_pixels=2, thread_filters=2, vector=2,
        threads=8, registers=0,
    ),
    small_filter=FilterTile(
        name="small", rows=3, columns=2, filters=4, channels=2, thread_pixels=2, thread_filters=2, vector=1,
        threads=4, registers=0,
    ),
    few_channels=FewChannelsTile(rows=3, columns=4, few=3, many=8, thread_pixels=2, threads=4, registers=0),
    bias_threads=8,
    bias_pixels=8,
    blocks_wanted=7,
)  # fmt: skip

SIZES = FOR_SIMULATOR if in_simulator() else FOR_GPU


def conv2d_tile(channels: int, filters: int, height: int, width: int) -> ConvolutionTile | FewOutputsTile:
    """The tile for a convolution from ``channels`` to ``filters``; for backward data the two are exchanged."""
    if filters <= SIZES.few_outputs.filters:
        return SIZES.few_outputs
    if channels <= SIZES.few_inputs.chunk:
        return SIZES.few_inputs
    return SIZES.small if _fits(SIZES.small, height, width) else SIZES.wide


def filter_tile(channels: int, filters: int, height: int, width: int) -> FilterTile | FewChannelsTile:
    """The tile for the filter gradient."""
    if min(channels, filters) <= SIZES.few_channels.few:
        return SIZES.few_channels
    return SIZES.small_filter if _fits(SIZES.small_filter, height, width) else SIZES.wide_filter


def _fits(tile: Tile, height: int, width: int) -> bool:
    return height <= tile.rows and width <= tile.columns


def filter_blocks(tile: FilterTile | FewChannelsTile, channels: int, filters: int) -> int:
    """Blocks that cover all filters and channels once."""
    if isinstance(tile, FewChannelsTile):
        few, many = sorted((channels, filters))
        return -(-few // tile.few) * -(-many // tile.many)
    return -(-filters // tile.filters) * -(-channels // tile.channels)


def filter_shares(
    tile: FilterTile | FewChannelsTile, n: int, height: int, width: int, channels: int, filters: int
) -> int:
    """Number of shares of the pixel tiles; separate blocks sum each share."""
    blocks = filter_blocks(tile, channels, filters)
    return max(1, min(tile.pixel_tiles(n, height, width), SIZES.blocks_wanted // blocks))


def bias_shares(pixels: int) -> int:
    """Number of shares of the pixels in the bias gradient."""
    return max(1, min(pixels // SIZES.bias_pixels, SIZES.blocks_wanted))


def gpu_workspace(architecture: Architecture, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats: the partial sums of one gradient at a time."""
    floats = 0
    for stage in architecture.stages:
        # A smaller batch has no more shares.
        c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
        shares = filter_shares(filter_tile(c, k, h, w), batch_size, h, w, c, k)
        floats = max(floats, shares * stage.weight_count, bias_shares(batch_size * h * w) * k)
    return {"partial gradients": (floats,)}
