"""Every GPU kernel in Numba's simulator: indexing and barriers, on tiny shapes. Run by tests/test_simulator.py."""

import numpy as np
import pytest

import versions.v4_im2col_gemm_nchw as v4
from common import gpu, reference
from common.architecture import autoencoder
from common.device import DeviceStatus, device_status, in_simulator
from common.network import Network, initial_parameters
from common.verify import verify
from tests.training import assert_training_parity
from versions.registry import find, names

pytestmark = pytest.mark.simulator
each_version = pytest.mark.parametrize("name", names())


def test_this_is_the_simulator_and_never_a_gpu():
    assert in_simulator()
    status = device_status("gpu")
    assert status == DeviceStatus("gpu", False, "", status.reason)
    assert "not a GPU" in status.reason


@each_version
def test_verified(name):
    failures = [check for check in verify(find(name).load("gpu"), small=True) if not check.passed]
    assert failures == []


@each_version
def test_ten_steps(name):
    assert_training_parity(
        find(name).load("gpu"), autoencoder((4, 4), (3, 2)), steps=10, batch_size=2, samples=3, learning_rate=0.05
    )


def test_v4_in_parts(monkeypatch):
    """A workspace too small for the batch: parts, an uneven last one, and a filter gradient summed over them."""
    architecture = autoencoder((4, 4), (3, 2))
    monkeypatch.setattr(v4, "WORKSPACE_LIMIT_BYTES", 7_500)
    backend = find("v4").load("gpu")
    backend.prepare(architecture, 5)
    widest = v4.workspace(architecture, 5, "gpu", 1)["columns"][0]
    assert widest < 5 * max(v4.floats_per_picture(stage) for stage in architecture.stages)
    network = assert_training_parity(backend, architecture, steps=1, batch_size=5, samples=5, learning_rate=0.05)
    split = [len(parts) for parts in backend._parts.values()]
    assert max(split) > 1
    assert network.batch_size == 5


def test_loss_with_more_values_than_threads(monkeypatch):
    """Each thread takes several values, as in a real batch."""
    monkeypatch.setattr(gpu, "MOST_PARTIALS", 64)
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
    backend.runtime.empty = None  # to call it now would raise
    network.step(images, order, 0, 2, 0.1, losses, 0)


@each_version
def test_every_kernel_of_the_version_ran(name):
    """Nothing compiled for the GPU goes untested: each kernel of the module is launched by a training step."""
    from importlib import import_module

    from common import gpu_kernels

    info = find(name)
    backend = info.load("gpu")
    launched = set()
    bind = backend.runtime.bind

    def recording(kernel, grid, block):
        launched.add(id(kernel))
        return bind(kernel, grid, block)

    backend.runtime.bind = recording
    architecture = autoencoder((4, 4), (3, 2))
    network = Network(backend, architecture, 1, initial_parameters(architecture, 0))
    images = backend.upload(np.zeros((1, 3, 4, 4), np.uint8))
    network.step(images, backend.upload(np.zeros(1, np.int32)), 0, 1, 0.1, backend.upload(np.zeros(1, np.float32)), 0)
    module = import_module(f"{info.package}.gpu")
    layout = info.layout.lower()
    shared = {
        name: value
        for name, value in vars(gpu_kernels).items()
        if name.endswith("_kernel") and not (name.startswith("gather") and layout not in name)
    }
    own = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    missed = [name for name, kernel in {**shared, **own}.items() if id(kernel) not in launched]
    assert missed == []
