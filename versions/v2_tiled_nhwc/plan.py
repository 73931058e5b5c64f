"""How V2 cuts the work on the GPU into tiles: sizes, launch shapes, workspace, and what they cost. No device code.

While a tile is loaded, the lanes of a warp cover eight neighbouring channels and four neighbouring pixels or filters.
They store to different banks if the distance between two channels in shared memory is an odd multiple of four floats;
the padding makes it one. With other numbers of channels (conv1, conv5) some bank conflicts remain.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.architecture import Architecture, Stage
from common.device import in_simulator
from common.operations import Operation
from common.work import KernelWork, bias_work, float_bytes, halo_extent, sum_work

AT_ONCE = 4  # loads of a thread that are in flight together


@dataclass(frozen=True)
class Tile:
    """What a block computes, and the part of it that a thread keeps in registers."""

    name: str
    rows: int
    columns: int
    """Rows and columns are pixels of the output, or of dy for the filter gradient."""
    filters: int
    """Output channels a block computes."""
    threads: int
    registers: int
    """Most registers a thread; its kernels state this number."""
    chunk: int = 1
    """Input channels a step; all of them are in shared memory together."""
    channels: int = 1
    """Input channels a block covers in the filter gradient."""
    thread_pixels: int = 1
    """Neighbouring pixels of a row that a thread processes together."""
    thread_filters: int = 1
    vector: int = 1
    """How many of a thread's filters are neighbours: 4 can be one load, 1 lets a warp store whole sectors."""

    @property
    def pitch(self) -> int:
        """Columns of a tile with its halo."""
        return self.columns + 2

    @property
    def halo_pixels(self) -> int:
        """Pixels of a tile with its halo."""
        return (self.rows + 2) * self.pitch

    @property
    def plane(self) -> int:
        """Floats from one channel of the input tile to the next."""
        return padded(self.halo_pixels)

    @property
    def bank(self) -> int:
        """Floats from one tap of the weight tile to the next; nine of them lie between two channels."""
        return padded(self.filters)

    def pixel_tiles(self, n: int, height: int, width: int) -> int:
        """Tiles that cover n pictures."""
        return n * -(-height // self.rows) * -(-width // self.columns)

    def halo_pixels_read(self, n: int, height: int, width: int) -> int:
        """Pixels inside the picture that all tiles read; a pixel in several halos counts several times."""
        return n * halo_extent(height, self.rows) * halo_extent(width, self.columns)


def padded(floats: int) -> int:
    """The next odd multiple of four."""
    return 4 * (-(-floats // 4) | 1)


@dataclass(frozen=True)
class Tiling:
    """All sizes that kernels and launches use."""

    conv2d: dict[str, Tile]
    few_outputs: Tile
    filter: dict[str, Tile]
    few_channels: Tile
    bias_threads: int
    blocks_wanted: int
    """A sum is split into shares to get about this many blocks: several for each multiprocessor of a large card."""


def by_name(*tiles: Tile) -> dict[str, Tile]:
    """The tiles by name."""
    return {tile.name: tile for tile in tiles}


# 8x8 outputs a thread: 34 shared floats for 192 FMAs. On 8x8 pictures there would be too few blocks, so a thread takes
# 4x4. With three input channels there is one step only, and stores limit the speed.
FOR_GPU = Tiling(
    conv2d=by_name(
        Tile("wide", 8, 16, 64, 128, 128, chunk=8, thread_pixels=8, thread_filters=8, vector=4),
        Tile("small", 8, 8, 32, 128, 128, chunk=8, thread_pixels=4, thread_filters=4, vector=4),
        Tile("few inputs", 8, 16, 64, 128, 128, chunk=3, thread_pixels=8, thread_filters=8, vector=1),
    ),
    few_outputs=Tile("few outputs", 8, 16, 3, 128, 128, chunk=8, thread_pixels=8),
    filter=by_name(
        Tile("wide", 4, 16, 64, 128, 128, channels=16, thread_pixels=4, thread_filters=8, vector=4),
        Tile("small", 8, 8, 64, 128, 128, channels=16, thread_pixels=4, thread_filters=8, vector=4),
    ),
    few_channels=Tile("few channels", 4, 16, 3, 128, 128, channels=256, thread_pixels=2),
    bias_threads=256,
    blocks_wanted=512,
)

# Small sizes for the same code, because simulating a thread is slow. As in the real sizes, the input tile of one kind
# ends where the next channel's begins, the last load reaches past the tile, and sums are split unevenly.
FOR_SIMULATOR = Tiling(
    conv2d=by_name(
        Tile("wide", 2, 4, 4, 8, 0, chunk=2, thread_pixels=2, thread_filters=2, vector=2),
        Tile("small", 3, 2, 2, 6, 0, chunk=2, thread_pixels=2, thread_filters=1, vector=1),
        Tile("few inputs", 2, 4, 4, 8, 0, chunk=3, thread_pixels=2, thread_filters=2, vector=1),
    ),
    few_outputs=Tile("few outputs", 2, 4, 3, 8, 0, chunk=2, thread_pixels=2),
    filter=by_name(
        Tile("wide", 3, 4, 4, 8, 0, channels=4, thread_pixels=2, thread_filters=2, vector=2),
        Tile("small", 3, 2, 4, 4, 0, channels=2, thread_pixels=2, thread_filters=2, vector=1),
    ),
    few_channels=Tile("few channels", 3, 4, 3, 4, 0, channels=8, thread_pixels=2),
    bias_threads=8,
    blocks_wanted=7,
)

SIZES = FOR_SIMULATOR if in_simulator() else FOR_GPU


def conv2d_tile(channels: int, filters: int, height: int, width: int) -> Tile:
    """The tile for a convolution from ``channels`` to ``filters``; for backward data the two are exchanged."""
    if filters <= SIZES.few_outputs.filters:
        return SIZES.few_outputs
    if channels <= SIZES.conv2d["few inputs"].chunk:
        return SIZES.conv2d["few inputs"]
    return SIZES.conv2d[_fitting(SIZES.conv2d["small"], height, width)]


def filter_tile(channels: int, filters: int, height: int, width: int) -> Tile:
    """The tile for the filter gradient."""
    if min(channels, filters) <= SIZES.few_channels.filters:
        return SIZES.few_channels
    return SIZES.filter[_fitting(SIZES.filter["small"], height, width)]


def _fitting(small: Tile, height: int, width: int) -> str:
    return "small" if height <= small.rows and width <= small.columns else "wide"


def filter_blocks(tile: Tile, channels: int, filters: int) -> int:
    """Blocks that cover all filters and channels once."""
    if tile is SIZES.few_channels:
        few, many = sorted((channels, filters))
        return -(-few // tile.filters) * -(-many // tile.channels)
    return -(-filters // tile.filters) * -(-channels // tile.channels)


def filter_shares(tile: Tile, n: int, height: int, width: int, channels: int, filters: int) -> int:
    """Number of shares of the pixel tiles; separate blocks sum each share."""
    blocks = filter_blocks(tile, channels, filters)
    return max(1, min(tile.pixel_tiles(n, height, width), SIZES.blocks_wanted // blocks))


def bias_shares(pixels: int) -> int:
    """Number of shares of the pixels in the bias gradient."""
    return max(1, min(pixels // SIZES.bias_threads, SIZES.blocks_wanted))


def gpu_workspace(architecture: Architecture, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats: the partial sums of one gradient at a time."""
    floats = 0
    for stage in architecture.stages:
        # A smaller batch has no more shares.
        c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
        shares = filter_shares(filter_tile(c, k, h, w), batch_size, h, w, c, k)
        floats = max(floats, shares * stage.weight_count, bias_shares(batch_size * h * w) * k)
    return {"partial gradients": (floats,)}


def gpu_work(architecture: Architecture, batch_size: int) -> list[KernelWork]:
    """Every convolution kernel of a training step on the GPU, computed from the tiles above."""
    work = []
    for i, stage in enumerate(architecture.stages):
        c, k = stage.in_channels, stage.out_channels
        work.append(_conv2d_work(stage, Operation.FORWARD, c, k, batch_size))
        if i > 0:  # no operation needs the gradient of the pictures
            work.append(_conv2d_work(stage, Operation.BACKWARD_DATA, k, c, batch_size))
        work += _filter_work(stage, batch_size)
        work += bias_work(stage, batch_size, bias_shares(batch_size * stage.height * stage.width))
    return work


def _conv2d_work(stage: Stage, operation: Operation, channels: int, filters: int, n: int) -> KernelWork:
    """Forward, or backward data with channels and filters exchanged."""
    h, w, forward = stage.height, stage.width, operation is Operation.FORWARD
    tile = conv2d_tile(channels, filters, h, w)
    least = float_bytes((n, h, w, channels), (stage.weight_count,), (n, h, w, filters))
    few = tile is SIZES.few_outputs
    biases = 0
    if forward:  # once for each output, or for each run of pixels that a thread owns
        biases = n * h * w if few else tile.pixel_tiles(n, h, w) * tile.rows * tile.columns // tile.thread_pixels
    asked = float_bytes(
        (tile.halo_pixels_read(n, h, w), channels, -(-filters // tile.filters)),
        (tile.pixel_tiles(n, h, w), stage.weight_count),
        (n, h, w, filters),
        (biases, filters),
    )
    # For three taps of a row: a run of pixels with its halo, and each tap's filters.
    outputs = tile.filters if few else tile.thread_filters
    loads = tile.thread_pixels + 2 + 3 * outputs
    per_fma = loads / (3 * tile.thread_pixels * outputs)
    if few:
        kernel = "few_outputs_kernel" if forward else "flipped_few_outputs_kernel"
    else:
        kernel = f"{'CONV2D' if forward else 'FLIPPED'}_KERNELS[{tile.name}]"
    return KernelWork(stage.name, operation, kernel, n * stage.flops, least, asked, per_fma)


def _filter_work(stage: Stage, n: int) -> list[KernelWork]:
    c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
    tile = filter_tile(c, k, h, w)
    shares = filter_shares(tile, n, h, w, c, k)
    halo, pixels = tile.halo_pixels_read(n, h, w), n * h * w
    partials = (shares, stage.weight_count)
    if tile is SIZES.few_channels:
        few, many = sorted((c, k))
        own = tile.channels // tile.threads
        operands = (halo, few, -(-many // tile.channels)), (pixels, many, -(-few // tile.filters))
        # For a run of pixels and all nine taps: the few channels of the run with its halo.
        loads, fmas = 3 * (tile.thread_pixels + 2) * tile.filters, tile.thread_pixels * 9 * tile.filters * own
        kernel = "few_inputs_filter_kernel" if c <= k else "few_outputs_filter_kernel"
    else:
        operands = (halo, c, -(-k // tile.filters)), (pixels, k, -(-c // tile.channels))
        # For a run of pixels and all nine taps: a window of one channel, and each pixel's filters.
        loads = 3 * (tile.thread_pixels + 2) + tile.thread_pixels * tile.thread_filters
        fmas = tile.thread_pixels * 9 * tile.thread_filters
        kernel = f"FILTER_KERNELS[{tile.name}]"
    least = float_bytes((pixels, c), (pixels, k), partials)
    asked = float_bytes(*operands, partials)
    return [
        KernelWork(stage.name, Operation.BACKWARD_FILTER, kernel, n * stage.flops, least, asked, loads / fmas),
        sum_work(stage, Operation.BACKWARD_FILTER, shares, stage.weight_count),
    ]
