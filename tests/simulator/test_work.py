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


def single_operations(backend, stage, n, random, *, fused):
    """What a version made of operations computes in a stage; ``fused`` tells whether its forward pass is one."""
    c, k, h, w = stage.in_channels, stage.out_channels, stage.height, stage.width
    x, y = (random(activation_shape(backend.layout, n, channels, h, w)) for channels in (c, k))
    weights, bias = random(filter_shape(backend.layout, k, c)), random((k,))
    resampled = random(activation_shape(backend.layout, n, k, stage.out_height, stage.out_width))
    operations = {
        Operation.FORWARD: lambda data: backend.conv2d_forward(x, weights, bias, y, True),
        Operation.BACKWARD_DATA: lambda data: backend.conv2d_backward_data(y, weights, x),
        Operation.BACKWARD_FILTER: lambda data: backend.conv2d_backward_filter(x, y, weights),
        Operation.BACKWARD_BIAS: lambda data: backend.conv2d_backward_bias(y, bias),
    }
    if fused:
        del operations[Operation.FORWARD]
        out, kept = (resampled, {"y": y}) if stage.resample else (y, {})
        operations[Operation.STAGE_FORWARD] = lambda data: backend.stage_forward(stage, x, weights, bias, out, kept)
    return operations


def whole_stage(backend, stage, n, random):
    """The two passes of a stage of a version that has whole stages only."""
    c, k, scale = stage.in_channels, stage.out_channels, 2 if stage.upsampled else 1
    plan = backend.stage_plan(stage, n)
    x, out = random((n, stage.height // scale, stage.width // scale, c)), random(plan.output.shape)
    weights, bias = random(filter_shape(backend.layout, k, c)), random((k,))
    kept = {name: backend.upload(np.zeros(buffer.shape, buffer.dtype)) for name, buffer in plan.kept.items()}

    def backward(data):
        backend.stage_backward(stage, x, weights, out, kept, weights, bias, x if data else None)

    return {
        Operation.STAGE_FORWARD: lambda data: backend.stage_forward(stage, x, weights, bias, out, kept),
        Operation.STAGE_BACKWARD: backward,
    }


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
        operations = (
            whole_stage(backend, stage, n, random)
            if info.whole_stages
            else single_operations(backend, stage, n, random, fused=(stage.name, Operation.STAGE_FORWARD) in stated)
        )
        for operation, run in operations.items():
            if i == 0 and operation is Operation.BACKWARD_DATA:
                continue
            accesses.clear()
            run(data=i > 0)
            counted[stage.name, operation] = accesses["bytes"]
    assert counted == dict(stated)
