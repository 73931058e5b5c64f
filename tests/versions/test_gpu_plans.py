"""V2's tiles and V3's strips on the GPU: sizes, shares that fit into the workspace, and the work of a step."""

from math import prod

import pytest

from common.architecture import Stage, autoencoder
from common.network import flat_offsets, parameter_shapes, plan_activations
from common.operations import Operation
from common.work import CEILING_BYTES_PER_S, CEILING_FLOP_PER_S, KernelWork, halo_extent, taps_inside
from versions.registry import REGISTRY, names
from versions.v2_tiled_nhwc import plan as v2
from versions.v3_direct_nchw import plan as v3

STAGES = autoencoder().stages
MOST_SHARED_BYTES = 48 * 1024


@pytest.mark.parametrize("tile", [v2.SIZES.wide, v2.SIZES.small, v2.SIZES.few_inputs], ids=lambda tile: tile.name)
def test_v2_convolution_tiles(tile):
    assert tile.threads == tile.rows * tile.columns // tile.thread_pixels * tile.filters // tile.thread_filters
    assert tile.columns % tile.thread_pixels == 0
    assert tile.filters % tile.thread_filters == tile.thread_filters % tile.vector == 0
    assert tile.thread_pixels * tile.thread_filters >= 16
    # Eight channels at distances of an odd multiple of four floats, with four pixels or filters each, use all 32 banks.
    assert tile.plane % 8 == tile.bank % 8 == 4
    assert 4 * tile.chunk * (tile.plane + 9 * tile.bank) <= MOST_SHARED_BYTES


@pytest.mark.parametrize("tiling", [v2.FOR_GPU, v2.FOR_SIMULATOR], ids=["gpu", "simulator"])
def test_v2_filter_tiles(tiling):
    for tile in (tiling.wide_filter, tiling.small_filter):
        assert tile.threads == tile.channels * tile.filters // tile.thread_filters
        assert tile.columns % tile.thread_pixels == 0
        assert tile.threads % tile.filters == tile.threads % tile.channels == 0
        # The pixels of dy that a block loads together are neighbours in a row.
        assert tile.columns % (tile.threads // tile.filters) == 0


def test_v2_tiles_for_few_channels():
    tile = v2.SIZES.few_outputs
    assert tile.threads == tile.rows * tile.columns // tile.thread_pixels * tile.slices
    assert v2.SIZES.few_channels.many % v2.SIZES.few_channels.threads == 0


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_v2_tiles_have_no_idle_part_in_the_real_network(stage):
    c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
    for channels, filters in ((c, k), (k, c)):
        tile = v2.conv2d_tile(channels, filters, h, w)
        covered = tile.pixel_tiles(1, h, w) * tile.rows * tile.columns * -(-filters // tile.filters) * tile.filters
        assert covered == h * w * filters
        assert channels % (tile.slices if isinstance(tile, v2.FewOutputsTile) else tile.chunk) == 0
    tile = v2.filter_tile(c, k, h, w)
    blocks = v2.filter_blocks(tile, c, k)
    few = isinstance(tile, v2.FewChannelsTile)
    assert blocks * (tile.few * tile.many if few else tile.filters * tile.channels) == c * k
    assert 500 <= blocks * v2.filter_shares(tile, 64, h, w, c, k) <= v2.SIZES.blocks_wanted


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_v3_strips_leave_no_thread_idle_in_the_real_network(stage):
    c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
    for filters in (k, c):
        strip = v3.conv2d_strip(filters, h)
        assert strip.blocks(64, h, w) * strip.threads * strip.rows == 64 * h * w
        assert filters % strip.filters == 0
        assert strip.threads % v3.SIZES.warp == 0
        # A warp stages eight taps of each of four filters, and a line of lanes loads neighbouring taps.
        assert strip.threads % (strip.line * strip.filter_lanes) == 0
        assert strip.filters <= strip.filter_lanes
        assert strip.bank % 8 == 4
    strip = v3.filter_strip(c, k)
    assert (c % strip.block_channels(v3.SIZES.warp), k % strip.filters) == (0, 0)
    assert strip.threads % v3.SIZES.warp == 0
    assert 64 * w % v3.SIZES.warp == 0


def test_v3_bias_threads_are_a_power_of_two():
    assert v3.SIZES.bias_threads & (v3.SIZES.bias_threads - 1) == 0


@pytest.mark.parametrize("plan", [v2, v3], ids=["v2", "v3"])
@pytest.mark.parametrize("batch_size", [1, 2, 16, 63, 64, 500])
def test_the_workspace_holds_the_shares_of_every_smaller_batch(plan, batch_size):
    (floats,) = plan.gpu_workspace(autoencoder(), batch_size)["partial gradients"]
    for stage in STAGES:
        c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
        for n in range(1, batch_size + 1):
            if plan is v2:
                shares = v2.filter_shares(v2.filter_tile(c, k, h, w), n, h, w, c, k)
                bias_shares = v2.bias_shares(n * h * w)
            else:
                shares = v3.filter_shares(v3.filter_strip(c, k), n, w, c, k)
                bias_shares = v3.bias_shares(n, k)
            assert shares * stage.weight_count <= floats
            assert bias_shares * k <= floats


@pytest.mark.parametrize("info", REGISTRY, ids=names())
def test_gpu_memory_is_bounded(info):
    """At most 300 MB for the real network at batch 64; for V5, which keeps no full-size map, half of that."""
    architecture = autoencoder()
    _, parameters = flat_offsets(parameter_shapes(architecture, info.layout))
    activations = plan_activations(architecture, 64, info.layout, info.stage_plan)
    workspace = sum(prod(shape) for shape in info.workspace(architecture, 64, "gpu", 1).values())
    total = 4 * (2 * parameters + workspace) + sum(plan.bytes for plan in activations)
    assert total < (150e6 if info.name == "v5" else 300e6)


@pytest.mark.parametrize("info", REGISTRY, ids=names())
def test_the_flops_of_all_kernels_are_those_of_a_training_step(info):
    architecture = autoencoder()
    work = info.gpu_work(architecture, 64)
    # The convolutions only; second passes, im2col and col2im have few FLOPs, and the maximum leaves them out.
    convolutions = (
        Operation.FORWARD, Operation.STAGE_FORWARD, Operation.STAGE_BACKWARD, Operation.BACKWARD_DATA,
        Operation.BACKWARD_FILTER,
    )  # fmt: skip
    main = {}
    for row in [row for row in work if row.operation in convolutions]:
        main[row.stage, row.operation] = max(main.get((row.stage, row.operation), 0), row.flops)
    assert sum(main.values()) == 64 * info.training_flops(architecture)
    for row in work + info.shared_gpu_work(architecture, 64):
        assert row.least_bytes > 0
        assert row.asked_bytes is None or row.asked_bytes >= row.least_bytes, row
        assert row.bound_s == max(row.flops / CEILING_FLOP_PER_S, row.least_bytes / CEILING_BYTES_PER_S)


def test_bound_by_names_the_ceiling():
    kernel = "s", Operation.FORWARD, "k"
    assert KernelWork(*kernel, flops=67 * 10**12, least_bytes=4, asked_bytes=4).bound_by == "FLOPs"
    assert KernelWork(*kernel, flops=67, least_bytes=4 * 10**12, asked_bytes=None).bound_by == "memory"


@pytest.mark.parametrize(("length", "tile"), [(1, 1), (1, 4), (7, 3), (8, 8), (32, 8), (5, 1)])
def test_halo_extent_counts_positions(length, tile):
    counted = 0
    for first in range(0, length, tile):
        counted += sum(0 <= position < length for position in range(first - 1, first + tile + 1))
    # If the last tile reaches past the end, the positions there are not read either.
    assert halo_extent(length, tile) == counted


def test_taps_inside_counts_pairs():
    height, width = 3, 5
    inside = [
        (h, w, r, s)
        for h in range(height)
        for w in range(width)
        for r in range(3)
        for s in range(3)
        if 0 <= h + r - 1 < height and 0 <= w + s - 1 < width
    ]
    assert taps_inside(height, width) == len(inside)


def test_a_stage_of_one_pixel_has_a_tile_and_a_strip():
    stage = Stage("tiny", 1, 1, 1, 1)
    assert v2.conv2d_tile(1, 1, 1, 1).pixel_tiles(1, stage.height, stage.width) == 1
    assert v3.conv2d_strip(1, 1).blocks(1, stage.height, stage.width) == 1


@pytest.mark.parametrize(("rows", "channels"), [(3, 1), (2, 4)])
def test_v3_filter_strips_of_other_sizes_are_refused(rows, channels):
    with pytest.raises(ValueError, match=f"1 or 2 rows and channels, not {rows} and {channels}"):
        v3.FilterStrip(name="tall", rows=rows, filters=8, channels=channels, threads=128, registers=255)
