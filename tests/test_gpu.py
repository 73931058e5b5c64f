"""Every version on a real GPU; skipped where there is none."""

import json

import numpy as np
import pytest

from common.architecture import autoencoder
from common.device import device_status
from common.verify import verify
from tests.test_cli import convbench
from tests.training import assert_training_parity
from versions.registry import REGISTRY, find, names

STATUS = device_status("gpu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not STATUS.available, reason=f"no GPU: {STATUS.reason}")]


def checks_at_full_size(backend):
    return verify(backend, autoencoder(), batch_sizes=(64, 16))


each_version = pytest.mark.parametrize("name", names())


@each_version
def test_verified_at_the_real_shapes(name):
    failures = [check for check in checks_at_full_size(find(name).load("gpu")) if not check.passed]
    assert failures == []


@each_version
def test_ten_steps_at_full_width(name):
    assert_training_parity(
        find(name).load("gpu"), autoencoder(), steps=10, batch_size=4, samples=18, learning_rate=0.001
    )


@pytest.mark.parametrize("info", [info for info in REGISTRY if info.uses_gemm], ids=lambda info: info.name)
def test_tf32_is_verified_and_is_not_float32(info):
    results = {}
    for math in ("fp32", "tf32"):
        backend = info.load("gpu", math=math)
        assert [check for check in checks_at_full_size(backend) if not check.passed] == []
        rng = np.random.default_rng(0)
        x, w = (backend.upload(rng.standard_normal(shape, np.float32)) for shape in ((2, 8, 8, 8), (16, 8, 3, 3)))
        y, b = backend.upload(np.zeros((2, 16, 8, 8), np.float32)), backend.upload(np.zeros(16, np.float32))
        backend.conv2d_forward(x, w, b, y, False)
        backend.synchronize()
        results[math] = backend.read(y)
    if device_status("gpu").name.startswith("NVIDIA H"):
        assert not np.array_equal(results["fp32"], results["tf32"])


def test_run_on_the_gpu(tmp_path):
    done = convbench("run", "--device=gpu", "--samples=200", "--epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results" / "runs").iterdir()
    data = json.loads(path.read_text())
    assert data["environment"]["gpu"]["name"] == STATUS.name
    assert all(row["verified"] and row["device"] == "gpu" and len(row["epoch_s"]) == 2 for row in data["rows"])
