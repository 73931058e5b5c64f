"""How V5 divides the work on a GPU: parts of a batch, shares of a sum, and the workspace. No device code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import isqrt

from common.architecture import TAPS, Architecture, Stage
from common.device import in_simulator
from versions.v5_winograd_nhwc.plan import method, tiles
from versions.v5_winograd_nhwc.winograd import PRODUCTS

PART_FLOATS = 9_500_000  # of the wider side of a stage, transformed: 64 pictures of conv2 and of conv4
PARTIAL_FLOATS = 5_000_000  # of sums in shares
MULTIPROCESSORS = 132  # of the card that shares are made for
BLOCK = 128  # rows and columns of a product that a multiprocessor computes at a time
BALANCE = 43_000  # floats that memory moves, once each way, while a multiprocessor adds one column to such a block
LANES = 4 if in_simulator() else 32  # with fewer filters, lanes take neighbouring taps
DIRECT_FILTERS = 2  # of a thread, forward
DIRECT_THREADS = 4 if in_simulator() else 128
DIRECT_WINDOWS = 2 if in_simulator() else 16  # of a block, side by side
DIRECT_BLOCKS = 3 if in_simulator() else 512  # forward, with 256 filters each: four for a multiprocessor
DIRECT_SHARES = 3 if in_simulator() else 256  # backward, with 128 filters a block

# Five products along an axis reach the two outputs of a small pixel: that of its neighbour before with tap 0, its own
# three, and that of its neighbour after with tap 2.
REACHING = ((1, 0, 1, 1, 0), (0, 1, 1, 0, 1))
# Gradients to a small pixel's products with the three taps, from those to its two outputs and one on either side.
TAP_GRADIENTS = ((0, 0, 1, 1), (0, 1, 1, 0), (1, 1, 0, 0))


@dataclass(frozen=True)
class Scratch:
    """Floats of each workspace buffer."""

    wide: int
    """Transformed values of the side of a stage that has more channels, or the nine products of small pixels."""
    narrow: int
    """Transformed values of the other side."""
    filters: int
    """Filters, transformed or in another order."""
    partials: int
    """Sums in shares."""


def tap_strides(channels: int) -> tuple[int, int]:
    """Floats from a tap to the next and from a channel to the next, in the nine products of a small pixel.

    Channels lie together, unless there are so few that most lanes would be idle; then it is the order of the filters.
    """
    return (channels, 1) if channels >= LANES else (1, TAPS)


def ordered(stage: Stage) -> bool:
    """Whether the taps of an upsampled map need the filters in another order than theirs."""
    return tap_strides(stage.out_channels) != (1, TAPS)


def small_pixels(stage: Stage) -> int:
    """Pixels of a picture before it was upsampled."""
    return (stage.height // 2) * (stage.width // 2)


def sides(stage: Stage) -> tuple[int, int]:
    """Floats a picture on the wider and on the narrower side, transformed."""
    if method(stage) == "taps":
        return small_pixels(stage) * TAPS * stage.out_channels, 0
    channels = (stage.in_channels, stage.out_channels)
    return PRODUCTS * tiles(stage) * max(channels), PRODUCTS * tiles(stage) * min(channels)


@cache
def scratch(architecture: Architecture, batch_size: int) -> Scratch:
    """The workspace, whose size is bounded unless one picture alone needs more."""
    wide = narrow = 1
    for stage in architecture.stages:
        each = sides(stage)
        # The gradient to the input of a direct stage is no part of training: a picture at a time is enough.
        pictures = 1 if method(stage) == "unfold" else max(1, min(batch_size, PART_FLOATS // each[0]))
        wide, narrow = max(wide, pictures * each[0]), max(narrow, pictures * each[1])
    filters = max(
        (TAPS if method(stage) == "taps" else PRODUCTS) * stage.in_channels * stage.out_channels
        for stage in architecture.stages
    )
    found = Scratch(wide, narrow, filters, PARTIAL_FLOATS)
    return Scratch(
        wide, narrow, filters, max(_most_partials(stage, batch_size, found) for stage in architecture.stages)
    )


def gpu_workspace(architecture: Architecture, batch_size: int) -> dict[str, tuple[int, ...]]:
    """Workspace buffers in floats."""
    found = scratch(architecture, batch_size)
    return {
        "transformed, wide side": (found.wide,),
        "transformed, narrow side": (found.narrow,),
        "transformed filters": (found.filters,),
        "partial sums": (found.partials,),
    }


@cache
def parts(stage: Stage, n: int, space: Scratch) -> list[tuple[int, int]]:
    """Split n pictures evenly into as few parts as the workspace allows: pairs of first picture and count."""
    wide, narrow = sides(stage)
    pictures = min(space.wide // wide, space.narrow // narrow if narrow else n)
    count = -(-n // pictures)
    bounds = [n * i // count for i in range(count + 1)]
    return [(first, last - first) for first, last in pairwise(bounds)]


@cache
def shares(length: int, rows: int, columns: int, batch: int, most_floats: int) -> int:
    """Into how many equal shares to split the sums of a batch of products (rows, length) . (length, columns).

    With too few blocks most of a large card is idle; each further share costs memory traffic.
    """
    blocks, floats = batch * -(-rows // BLOCK) * -(-columns // BLOCK), batch * rows * columns

    def time(share: int) -> float:
        return -(-blocks * share // MULTIPROCESSORS) * (length // share) + share * floats / BALANCE

    most = min(length, max(1, most_floats // floats), 4 * MULTIPROCESSORS)
    return min((share for share in range(1, most + 1) if length % share == 0), key=time)


def filter_shares(stage: Stage, count: int, space: Scratch) -> int:
    """Shares of the filter gradient's sums over the tiles or the small pixels of ``count`` pictures."""
    c, k = stage.in_channels, stage.out_channels
    if method(stage) == "taps":
        return shares(count * small_pixels(stage), TAPS * k, c, 1, space.partials)
    return shares(count * tiles(stage), k, c, PRODUCTS, space.partials)


def data_shares(stage: Stage, n: int, space: Scratch) -> int:
    """Shares of the sums over filters and taps in the gradient to a small map; one if the batch goes in parts."""
    if len(parts(stage, n, space)) > 1:
        return 1
    rows = n * small_pixels(stage)
    return shares(TAPS * stage.out_channels, rows, stage.in_channels, 1, space.partials)


def bias_shares(stage: Stage, count: int, space: Scratch) -> int:
    """Shares of the bias gradient's sum over the rows of a part: both passes add about as many values a thread."""
    rows = count * (small_pixels(stage) if method(stage) == "taps" else tiles(stage))
    return max(1, min(isqrt(8 * rows), rows, space.partials // stage.out_channels))


@dataclass(frozen=True)
class DirectGrid:
    """How a direct stage is divided: into pieces of a row of 2x2 windows."""

    rows: int
    """Rows of windows of a picture."""
    pieces: int
    """Pieces of a row."""
    windows: int
    """Windows of a piece."""

    def number(self, n: int) -> int:
        """Pieces of n pictures."""
        return n * self.rows * self.pieces

    def blocks(self, n: int) -> int:
        """Blocks of the forward pass, for each group of filters; each takes one piece after another."""
        return min(self.number(n), DIRECT_BLOCKS)

    def shares(self, n: int) -> int:
        """Shares of the filter gradient, each the pieces of a block."""
        return min(self.number(n), DIRECT_SHARES)


def direct_grid(stage: Stage) -> DirectGrid:
    """The pieces of a direct stage; windows that pooling drops are none."""
    up = 0 if stage.resample == "maxpool" else 1
    rows, columns = max(1, (stage.height + up) // 2), max(1, (stage.width + up) // 2)
    pieces = -(-columns // DIRECT_WINDOWS)
    return DirectGrid(rows, pieces, -(-columns // pieces))


def _most_partials(stage: Stage, n: int, space: Scratch) -> int:
    """Floats of sums in shares that the stage needs for n pictures."""
    c, k = stage.in_channels, stage.out_channels
    if method(stage) == "unfold":
        return direct_grid(stage).shares(n) * stage.parameter_count
    count = max(count for _, count in parts(stage, n, space))
    bias = bias_shares(stage, count, space) * k
    filters = filter_shares(stage, count, space) * c * k
    if method(stage) == "winograd":
        return max(bias, filters * PRODUCTS)
    data = data_shares(stage, n, space)
    return max(bias, filters * TAPS, data * n * small_pixels(stage) * c if data > 1 else 0)
