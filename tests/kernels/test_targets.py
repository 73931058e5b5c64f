"""The targets by name, and the occupancy that is computed from their limits."""

import pytest

from bench.kernels.targets import TARGETS, find_targets, occupancy, target_name
from common.errors import UsageError

# Computed by hand from the limits in the programming guide.
OCCUPANCIES = [
    ((9, 0, "a"), 256, 32, 0, 1.0),  # 8 blocks of 8 warps
    ((9, 0, "a"), 256, 33, 0, 0.75),  # 40 registers a thread are given: 51 warps, 48 by fours, 6 blocks
    ((9, 0, "a"), 128, 128, 0, 0.25),  # 16 warps, 4 blocks
    ((9, 0, "a"), 128, 64, 48 * 1024, 0.25),  # 49 KiB a block: 4 of them in 228
    ((8, 0), 128, 64, 40 * 1024, 0.25),  # 41 KiB a block: 4 of them in 164
    ((7, 5), 128, 64, 32 * 1024, 0.25),  # 2 blocks of 4 warps, of 32
    ((7, 5), 32, 32, 0, 0.5),  # 16 blocks at most
    ((10, 0), 1024, 65, 0, 0.0),  # 28 warps, and the block has 32
    ((9, 0, "a"), 33, 32, 0, 1.0),  # two warps a block, 32 blocks
]


@pytest.mark.parametrize(("target", "threads", "registers", "shared", "share"), OCCUPANCIES)
def test_occupancy_is_what_the_limits_allow(target, threads, registers, shared, share):
    assert occupancy(target, threads, registers, shared) == share


def test_targets_by_name():
    assert find_targets("all") == TARGETS
    assert [target_name(target) for target in find_targets("sm_100")] == ["sm_100"]
    with pytest.raises(UsageError, match="unknown target 'sm_91': choose from sm_75, sm_80, sm_90a, sm_100 or all"):
        find_targets("sm_91")
