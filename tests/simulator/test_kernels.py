"""Every GPU kernel in the strict simulator (strict.py): indexing, barriers and races, on small shapes.

Run by tests/test_simulator.py.
"""

import functools

import numpy as np
import pytest

from bench.machine.devices import DeviceStatus, device_status
from common import gpu, reference
from common.architecture import autoencoder
from common.device import in_simulator
from common.gpu_jit import kernel_label
from common.network import Network, initial_parameters
from common.verify import convolution_checks, stage_checks, verify
from tests.simulator.labels import kernel_labels
from tests.support.parity import assert_training_parity
from versions.registry import find, names
from versions.v2_tiled_nhwc import plan as v2
from versions.v3_direct_nchw import plan as v3
from versions.v4_im2col_gemm_nchw import plan as v4
from versions.v5_winograd_nhwc import gpu_plan as v5

pytestmark = pytest.mark.simulator
# (N, C, K, H, W), besides verify's: several tiles on every axis with remainders, few channels, tiny pictures.
MORE_SHAPES = (
    (4, 4, 4, 3, 2),
    (3, 4, 4, 5, 9),
    (2, 3, 5, 4, 5),
    (2, 5, 9, 5, 9),
    (1, 9, 5, 6, 3),
    (3, 7, 2, 5, 6),
    (3, 5, 6, 2, 2),
    (2, 33, 19, 7, 3),
    (1, 1, 1, 1, 1),
    (10, 1, 2, 2, 1),  # more pictures than a sum has rows of threads
)
# The same for versions with whole stages only, of which each shape gives five, each in three ways.
STAGE_SHAPES = ((2, 5, 9, 5, 9), (1, 3, 9, 5, 3), (10, 1, 2, 2, 1))
each_version = pytest.mark.parametrize("name", names())


def test_the_simulator_is_never_reported_as_a_gpu():
    assert in_simulator()
    status = device_status("gpu")
    assert status == DeviceStatus("gpu", False, "", status.reason)
    assert "not a GPU" in status.reason


@functools.cache
def verified(name):
    """The failed checks of a version, and all kernels that its checks launched."""
    backend = find(name).load("gpu")
    launched = []
    launch_grid = backend.launch_grid

    def recording(kernel, *rest):
        launched.append(kernel)
        launch_grid(kernel, *rest)

    backend.launch_grid = recording
    checks = verify(backend, small=True)
    rng = np.random.default_rng(3)
    more, one_shape = (STAGE_SHAPES, stage_checks) if backend.whole_stages else (MORE_SHAPES, convolution_checks)
    for shape in more:
        checks += one_shape(backend, shape, rng)
    assert len(checks) > 50
    return [check for check in checks if not check.passed], launched


@each_version
def test_verified(name):
    failures, _ = verified(name)
    assert failures == []


def test_sums_are_split_unevenly():
    """For every kernel with shares, one of the shapes has several shares of different sizes."""
    split = set()
    for n, c, k, height, width in MORE_SHAPES:
        tile = v2.filter_tile(c, k, height, width)
        tiles, shares = tile.pixel_tiles(n, height, width), v2.filter_shares(tile, n, height, width, c, k)
        split |= {tile} if shares > 1 and tiles % shares else set()
        strip, columns = v3.filter_strip(c, k), n * width
        shares = v3.filter_shares(strip, n, width, c, k)
        split |= {strip} if shares > 1 and columns % shares else set()
    tiling = v2.SIZES
    assert split == {tiling.wide_filter, tiling.small_filter, tiling.few_channels, *v3.SIZES.filter.values()}


@each_version
def test_ten_steps(name):
    assert_training_parity(
        find(name).load("gpu"), autoencoder((4, 4), (3, 2)), steps=10, batch_size=2, samples=3, learning_rate=0.05
    )


def test_v4_in_parts(monkeypatch):
    """A workspace that is too small for the batch: uneven parts, and a filter gradient summed over them."""
    architecture = autoencoder((4, 4), (3, 2))
    monkeypatch.setattr(v4, "WORKSPACE_LIMIT_BYTES", 4_200)
    split = [v4.filter_parts(stage, architecture, 5) for stage in architecture.stages]
    assert max(map(len, split)) > 1
    assert len({count for parts in split for _, count in parts}) > 1
    backend = find("v4").load("gpu")
    network = assert_training_parity(backend, architecture, steps=1, batch_size=5, samples=5, learning_rate=0.05)
    assert network.batch_size == 5


def test_v5_in_parts(monkeypatch):
    """Less workspace than the batch needs: uneven parts, and gradients added up over them."""
    architecture, n = autoencoder((4, 4), (5, 4)), 5
    monkeypatch.setattr(v5, "PART_FLOATS", 400)
    v5.scratch.cache_clear()
    try:
        space = v5.scratch(architecture, n)
        split = [v5.parts(stage, n, space) for stage in architecture.stages[1:]]
        assert {len(parts) for parts in split} > {1}
        assert len({count for parts in split for _, count in parts}) > 1
        backend = find("v5").load("gpu")
        assert_training_parity(backend, architecture, steps=1, batch_size=n, samples=n, learning_rate=0.05)
    finally:
        v5.scratch.cache_clear()


def test_loss_with_more_values_than_threads(monkeypatch):
    """Each thread processes several values, as in a real batch."""
    monkeypatch.setattr(gpu, "MOST_LOSS_BLOCKS", 2)
    backend = find("v1").load("gpu")
    backend.prepare(autoencoder((4, 4), (3, 2)), 5)
    rng = np.random.default_rng(0)
    prediction, target = rng.random((2, 5, 6, 7, 3), np.float32)
    assert prediction.size > 2 * 64
    loss, gradient = reference.mse_loss(prediction.astype(np.float64), target.astype(np.float64))
    result, losses = backend.upload(prediction), backend.upload(np.zeros(2, np.float32))
    backend.mse_loss(result, backend.upload(target), result, losses, 1)
    np.testing.assert_allclose(backend.read(losses), [0, loss], rtol=1e-5)
    np.testing.assert_allclose(backend.read(result), gradient, rtol=1e-4, atol=1e-8)


@each_version
def test_a_step_allocates_no_buffers(name):
    backend = find(name).load("gpu")
    architecture = autoencoder((4, 4), (3, 2))
    network = Network(backend, architecture, 2, initial_parameters(architecture, 0))
    images, order = backend.upload(np.zeros((2, 3, 4, 4), np.uint8)), backend.upload(np.zeros(2, np.int32))
    losses = backend.upload(np.zeros(1, np.float32))
    network.step(images, order, 0, 2, 0.1, losses, 0)
    backend.runtime.empty = None  # calling it raises
    network.step(images, order, 0, 2, 0.1, losses, 0)


@each_version
def test_every_kernel_of_the_version_ran(name):
    """Verification launches every kernel that a training step of the real network does, so that none is untested."""
    _, launched = verified(name)
    assert kernel_labels(find(name)) <= {kernel_label(kernel) for kernel in launched}
