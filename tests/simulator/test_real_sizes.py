"""The kernels with the tile sizes of a GPU, one or two blocks of each, for errors that small tiles do not show.

A version with separate sizes for the simulator has both in ``plan.py``, as ``FOR_GPU`` and ``FOR_SIMULATOR``.
"""

import importlib
import importlib.util

import numpy as np
import pytest

from bench.kernels.launches import missing_kernels
from common.verify import convolution_checks
from versions.registry import REGISTRY

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
    monkeypatch.setattr(plan, "SIZES", plan.FOR_GPU)
    # Import the module again under another name, so that it builds its kernels with these sizes.
    spec = importlib.util.spec_from_file_location(f"{name}_in_real_sizes", plan.__file__.replace("plan.py", "gpu.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend = module.make_backend()
    launched = []
    launch_grid = backend.launch_grid

    def recording(kernel, *rest):
        launched.append(kernel)
        launch_grid(kernel, *rest)

    backend.launch_grid = recording
    backend.deterministic = False  # one run of each operation is enough here; the small tiles run twice
    for shape in SHAPES:
        checks = convolution_checks(backend, shape, np.random.default_rng(1))
        assert [check for check in checks if not check.passed] == []
    assert missing_kernels(module, launched) == []
