"""The kernels with the tile sizes of a GPU, one or two blocks of each, for errors that small tiles do not show.

A version with separate sizes for the simulator has both in ``plan.py``, as ``FOR_GPU`` and ``FOR_SIMULATOR``.
"""

import importlib
import importlib.util

import numpy as np
import pytest

from common.gpu_jit import kernel_label
from common.verify import convolution_checks
from tests.simulator.labels import kernel_labels
from versions.registry import REGISTRY, find

pytestmark = pytest.mark.simulator

# (N, C, K, H, W): wide and small pictures, more than one step of channels, few channels on either side.
SHAPES = ((1, 9, 10, 2, 9), (2, 10, 9, 3, 5), (1, 3, 10, 9, 5), (1, 9, 3, 2, 9), (1, 5, 4, 9, 3))
PLANS = {
    info.name: plan
    for info in REGISTRY
    if importlib.util.find_spec(f"{info.package}.plan")
    for plan in [importlib.import_module(f"{info.package}.plan")]
    if hasattr(plan, "FOR_GPU")
}


@pytest.mark.parametrize("name", PLANS)
def test_real_sizes(name, monkeypatch):
    plan = PLANS[name]
    assert plan.SIZES is plan.FOR_SIMULATOR
    small = kernel_labels(find(name))
    monkeypatch.setattr(plan, "SIZES", plan.FOR_GPU)
    backend = find(name).load("gpu")
    launched = set()
    launch_grid = backend.launch_grid

    def recording(kernel, *rest):
        launched.add(kernel_label(kernel))
        launch_grid(kernel, *rest)

    backend.launch_grid = recording
    backend.deterministic = False  # one run of each operation is enough here; the small tiles run twice
    for shape in SHAPES:
        checks = convolution_checks(backend, shape, np.random.default_rng(1))
        assert [check for check in checks if not check.passed] == []
    convolutions = {label for label in small if label.startswith("conv2d")}
    assert convolutions
    assert convolutions <= launched
