"""The pytest-benchmark suite: each convolution operation of the real network, and a whole training step.

A plain test run takes each once, untimed. To time: ``python -m pytest tests/benchmarks --benchmark-enable``. Each round
is one call, synchronised at both ends, after warm-up rounds that take the compilation.
"""

import numpy as np
import pytest

from common.architecture import Architecture, autoencoder
from common.backend import activation_shape, filter_shape
from common.dataset import photo_crops
from common.network import Network, initial_parameters
from versions.registry import names

BATCH = 64
STAGES = {stage.name: stage for stage in autoencoder().stages}
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
for_each_version = pytest.mark.parametrize("name", names())


def timed(benchmark, backend, call, **about):
    """Time ``call`` with the device's work done at both ends of each round."""
    benchmark.extra_info.update(about, math=backend.math, layout=backend.layout, verified=True)

    def once():
        call()
        backend.synchronize()

    backend.synchronize()
    benchmark.pedantic(once, rounds=5, warmup_rounds=2)


@for_each_version
@on_each_device
@pytest.mark.parametrize("operation", ["forward", "backward_data", "backward_filter"])
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_convolution(benchmark, verified, name, device, operation, stage):
    backend = verified(name, device)
    backend.prepare(Architecture((stage,)), BATCH)
    rng = np.random.default_rng(0)

    def random(shape):
        return backend.upload(rng.standard_normal(shape, np.float32))

    x = random(activation_shape(backend.layout, BATCH, stage.in_channels, stage.height, stage.width))
    y = random(activation_shape(backend.layout, BATCH, stage.out_channels, stage.height, stage.width))
    w = random(filter_shape(backend.layout, stage.out_channels, stage.in_channels))
    calls = {
        "forward": lambda: backend.conv2d_forward(x, w, bias, y, True),
        "backward_data": lambda: backend.conv2d_backward_data(y, w, x),
        "backward_filter": lambda: backend.conv2d_backward_filter(x, y, w),
    }
    bias = random((stage.out_channels,))
    benchmark.group = f"{device} {stage.name} {operation}"
    timed(benchmark, backend, calls[operation], flop=BATCH * stage.flops)


@for_each_version
@on_each_device
def test_training_step(benchmark, verified, name, device):
    backend = verified(name, device)
    architecture = autoencoder()
    network = Network(backend, architecture, BATCH, initial_parameters(architecture, 0))
    images = backend.upload(photo_crops(BATCH, 0))
    order = backend.upload(np.arange(BATCH, dtype=np.int32))
    losses = backend.upload(np.zeros(1, np.float32))
    benchmark.group = f"{device} training step"
    timed(
        benchmark,
        backend,
        lambda: network.step(images, order, 0, BATCH, 0.001, losses, 0),
        flop=BATCH * architecture.training_flops,
    )
    assert np.isfinite(backend.read(losses)).all()
