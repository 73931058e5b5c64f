"""V4's workspace: its bound, even parts of a batch, and that the plan is what is allocated."""

import pytest

from common.architecture import autoencoder
from versions.registry import find
from versions.v4_im2col_gemm_nchw.plan import WORKSPACE_LIMIT_BYTES, floats_per_picture, parts, workspace


def total_bytes(shapes):
    sizes = []
    for shape in shapes.values():
        size = 4
        for side in shape:
            size *= side
        sizes.append(size)
    return sum(sizes)


@pytest.mark.parametrize("batch_size", [1, 16, 64, 512])
def test_the_gpu_workspace_stays_below_75_mb(batch_size):
    shapes = workspace(autoencoder(), batch_size, "gpu", 1)
    assert total_bytes(shapes) <= WORKSPACE_LIMIT_BYTES == 75_000_000
    # It is not empty either: one picture of every stage fits for any batch size.
    assert all(shapes["columns"][0] >= floats_per_picture(stage) for stage in autoencoder().stages)


def test_the_cpu_workspace_is_a_few_megabytes_a_thread():
    assert total_bytes(workspace(autoencoder(), 64, "cpu", 2)) < 10e6


def test_the_cpu_allocates_what_is_planned():
    backend = find("v4").load("cpu")
    backend.prepare(autoencoder((8, 8), (6, 4)), 3)
    shapes = workspace(autoencoder((8, 8), (6, 4)), 3, "cpu", backend.threads)
    assert [backend._columns.shape, backend._flipped.shape, backend._partials.shape] == list(shapes.values())


@pytest.mark.parametrize(("batch_size", "at_once"), [(64, 64), (64, 63), (64, 20), (5, 2), (1, 9), (7, 1)])
def test_parts_are_even_and_cover_the_batch(batch_size, at_once):
    split = parts(batch_size, at_once)
    assert [n for first, count in split for n in range(first, first + count)] == list(range(batch_size))
    counts = [count for _, count in split]
    assert max(counts) <= at_once
    assert max(counts) - min(counts) <= 1
    assert len(split) == -(-batch_size // at_once)
