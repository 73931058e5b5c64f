"""V5 on the GPU: parts of a batch, shares of long sums, and a workspace that holds them."""

from math import prod

import pytest

from common.architecture import TAPS, autoencoder
from versions.v5_winograd_nhwc import gpu_plan
from versions.v5_winograd_nhwc.plan import method, tiles
from versions.v5_winograd_nhwc.winograd import PRODUCTS

NETWORK = autoencoder()
STAGES = NETWORK.stages


@pytest.mark.parametrize("batch_size", [64, 5])
def test_the_workspace_holds_every_smaller_batch(batch_size):
    space = gpu_plan.scratch(NETWORK, batch_size)
    assert sum(map(prod, gpu_plan.gpu_workspace(NETWORK, batch_size).values())) == sum(vars(space).values())
    for stage in STAGES:
        c, k, (wide, narrow) = stage.in_channels, stage.out_channels, gpu_plan.sides(stage)
        planes = TAPS if method(stage) == "taps" else PRODUCTS
        assert planes * c * k <= space.filters
        for n in range(1, batch_size + 1):
            parts = gpu_plan.parts(stage, n, space)
            assert [first for first, _ in parts] == [sum(count for _, count in parts[:i]) for i in range(len(parts))]
            assert sum(count for _, count in parts) == n
            assert max(count for _, count in parts) * wide <= space.wide
            assert max(count for _, count in parts) * narrow <= space.narrow
            if method(stage) == "unfold":
                assert gpu_plan.direct_grid(stage).shares(n) * stage.parameter_count <= space.partials
                continue
            for _, count in parts:
                assert gpu_plan.filter_shares(stage, count, space) * planes * c * k <= space.partials
                assert gpu_plan.bias_shares(stage, count, space) * k <= space.partials
            if method(stage) == "taps" and (shares := gpu_plan.data_shares(stage, n, space)) > 1:
                assert shares * n * gpu_plan.small_pixels(stage) * c <= space.partials


def test_a_batch_of_64_takes_one_part_in_training():
    space = gpu_plan.scratch(NETWORK, 64)
    assert all(len(gpu_plan.parts(stage, 64, space)) == 1 for stage in STAGES[1:])
    larger = gpu_plan.scratch(NETWORK, 640)
    assert 4 * sum(vars(larger).values()) < 100e6
    assert any(len(gpu_plan.parts(stage, 640, larger)) > 1 for stage in STAGES[1:])


def test_shares_are_equal_and_fill_a_large_card():
    space = gpu_plan.scratch(NETWORK, 64)
    for stage in STAGES[1:]:
        rows = 64 * (gpu_plan.small_pixels(stage) if method(stage) == "taps" else tiles(stage))
        assert rows % gpu_plan.filter_shares(stage, 64, space) == 0
    conv2, conv3, conv4, conv5 = STAGES[1:]
    assert [gpu_plan.filter_shares(stage, 64, space) for stage in (conv2, conv3, conv4, conv5)] == [4, 2, 16, 64]
    assert [gpu_plan.data_shares(stage, 64, space) for stage in (conv4, conv5)] == [4, 1]


def test_a_sum_is_not_split_where_shares_do_not_fit_or_do_not_pay():
    assert gpu_plan.shares(1024, 128, 128, 1, 10**9) > 1
    assert gpu_plan.shares(1024, 128, 128, 1, 128 * 128) == 1
    assert gpu_plan.shares(1024, 128, 128, 1, 1) == 1  # one share is always there
    assert gpu_plan.shares(1021, 128, 128, 1, 10**7) == 1  # a prime
    assert gpu_plan.shares(1024, 128 * 132, 128, 1, 10**9) == 1  # the card is full already


@pytest.mark.parametrize(("filters", "strides"), [(3, (1, 9)), (256, (256, 1))])
def test_few_filters_keep_their_order(filters, strides):
    assert gpu_plan.tap_strides(filters) == strides


def test_the_pieces_of_a_direct_stage_cover_its_windows():
    grid = gpu_plan.direct_grid(STAGES[0])
    assert (grid.rows, grid.pieces, grid.windows) == (16, 1, 16)
    wide = gpu_plan.direct_grid(autoencoder((8, 68)).stages[0])
    assert wide.rows == 4
    assert wide.pieces * wide.windows >= 34
    assert wide.windows <= gpu_plan.DIRECT_WINDOWS
