"""The bytes that ``gpu_work`` states for global memory, against the loads and stores that the kernels make."""

from collections import Counter

import numpy as np
import pytest

from common.architecture import autoencoder
from common.backend import filter_shape
from common.operations import Operation
from common.plans import activation_shape
from tests.simulator import arrays
from versions.registry import find, names

pytestmark = pytest.mark.simulator


@pytest.fixture
def accesses(monkeypatch):
    """Counts the bytes that all threads load from and store to global memory."""
    counts = Counter()
    load, store = arrays.GlobalArray.__getitem__, arrays.GlobalArray.__setitem__

    def counting_load(array, index):
        counts["bytes"] += array.dtype.itemsize
        return load(array, index)

    def counting_store(array, index, value):
        counts["bytes"] += array.dtype.itemsize
        store(array, index, value)

    monkeypatch.setattr(arrays.GlobalArray, "__getitem__", counting_load)
    monkeypatch.setattr(arrays.GlobalArray, "__setitem__", counting_store)
    return counts


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("size", [(4, 8), (12, 8)])
def test_asked_bytes_are_the_loads_and_stores(name, size, accesses):
    info, n = find(name), 2
    architecture = autoencoder(size, (6, 5))
    backend = info.load("gpu")
    backend.prepare(architecture, n)
    stated = Counter()
    for work in info.gpu_work(architecture, n):
        stated[work.stage, work.operation] += work.asked_bytes or 0  # bytes of cuBLAS are not counted either
    counted = {}
    rng = np.random.default_rng(0)

    def random(shape):
        return backend.upload(rng.standard_normal(shape, np.float32))

    for i, stage in enumerate(architecture.stages):
        c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
        x, y = (random(activation_shape(backend.layout, n, channels, h, w)) for channels in (c, k))
        weights, bias = random(filter_shape(backend.layout, k, c)), random((k,))
        resampled = random(activation_shape(backend.layout, n, k, stage.out_height, stage.out_width))
        operations = {
            Operation.FORWARD: lambda x=x, y=y, w=weights, b=bias: backend.conv2d_forward(x, w, b, y, True),
            Operation.BACKWARD_DATA: lambda x=x, y=y, w=weights: backend.conv2d_backward_data(y, w, x),
            Operation.BACKWARD_FILTER: lambda x=x, y=y, w=weights: backend.conv2d_backward_filter(x, y, w),
            Operation.BACKWARD_BIAS: lambda y=y, b=bias: backend.conv2d_backward_bias(y, b),
        }
        if i == 0:
            del operations[Operation.BACKWARD_DATA]
        if (stage.name, Operation.STAGE_FORWARD) in stated:  # the version fuses what follows the convolution
            del operations[Operation.FORWARD]
            operations[Operation.STAGE_FORWARD] = lambda s=stage, x=x, y=y, w=weights, b=bias, out=resampled: (
                backend.stage_forward(s, x, w, b, out if s.resample else y, {"y": y} if s.resample else {})
            )
        for operation, run in operations.items():
            accesses.clear()
            run()
            counted[stage.name, operation] = accesses["bytes"]
    assert counted == dict(stated)
