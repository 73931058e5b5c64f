"""Every version on a real GPU; skipped where there is none."""

import json

import numpy as np
import pytest

from bench.machine.devices import device_status
from bench.training.checkpoint import load_checkpoint
from bench.training.data import load_training_data
from bench.training.folder import LAST
from common.architecture import autoencoder
from common.dataset import photo_crops
from common.network import Network, initial_parameters
from common.training import Evaluator, Trainer
from common.verify import verify
from tests.commands.test_cli import convbench
from tests.support.parity import assert_training_parity
from tests.support.tiny_training import ARCHITECTURE, tiny_config, train_tiny
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
    for precision in ("fp32", "tf32"):
        backend = info.load("gpu", precision=precision)
        assert [check for check in checks_at_full_size(backend) if not check.passed] == []
        rng = np.random.default_rng(0)
        x, w = (backend.upload(rng.standard_normal(shape, np.float32)) for shape in ((2, 8, 8, 8), (16, 8, 3, 3)))
        y, b = backend.upload(np.zeros((2, 16, 8, 8), np.float32)), backend.upload(np.zeros(16, np.float32))
        backend.conv2d_forward(x, w, b, y, False)
        backend.synchronize()
        results[precision] = backend.read(y)
    if device_status("gpu").name.startswith("NVIDIA H"):
        assert not np.array_equal(results["fp32"], results["tf32"])


@each_version
def test_two_runs_with_one_seed_are_bitwise_equal(name):
    ends = []
    for _ in range(2):
        backend = find(name).load("gpu")
        architecture = autoencoder()
        network = Network(backend, architecture, 64, initial_parameters(architecture, 0))
        trainer = Trainer(network, photo_crops(200, 0), learning_rate=0.001, seed=0)
        trainer.run_epoch()
        trainer.run_epoch()
        ends.append((trainer.read_losses(), network.read_parameters()))
    assert backend.deterministic, "the backend says that it is not deterministic; skip it here"
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    for parameter, value in ends[0][1].items():
        np.testing.assert_array_equal(ends[1][1][parameter], value, err_msg=parameter)


@each_version
def test_replayed_steps_give_the_bits_of_plain_ones(name):
    """Two epochs with a smaller last batch: the first step of each batch size is recorded, the others are replayed."""
    ends = []
    for replay in (True, False):
        backend = find(name).load("gpu")
        if not replay:
            backend.replayed = lambda owner, name, work: work()
        architecture = autoencoder()
        network = Network(backend, architecture, 32, initial_parameters(architecture, 0))
        trainer = Trainer(network, photo_crops(80, 0), learning_rate=0.001, seed=0)
        trainer.run_epoch()
        trainer.run_epoch()
        ends.append((trainer.read_losses(), network.read_parameters()))
    if not backend.deterministic:
        pytest.skip("this version's results differ from run to run")
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    for parameter, value in ends[0][1].items():
        np.testing.assert_array_equal(ends[1][1][parameter], value, err_msg=parameter)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_times_a_vector(transposed):
    from common.gpu import CudaRuntime, Operand

    runtime = CudaRuntime("fp32")
    rng = np.random.default_rng(0)
    hosts = [rng.standard_normal(shape, np.float32) for shape in ((70, 50) if transposed else (50, 70), 71, 52)]
    a, x, y = (runtime.empty(host.shape, np.float32) for host in hosts)
    for buffer, host in zip((a, x, y), hosts, strict=True):
        runtime.write(buffer, host)
    expected = hosts[2].copy()
    expected[2:] = (hosts[0].T if transposed else hosts[0]) @ hosts[1][1:]
    for _ in range(2):
        runtime.gemv(50, 70, Operand(a, transposed=transposed), Operand(x, 1), Operand(y, 2))
        np.testing.assert_allclose(runtime.read(y), expected, rtol=1e-4, atol=1e-4)


@each_version
def test_training_resumes_from_the_cpu_on_the_gpu(tmp_path, name):
    """One run starts on V1 on the CPU and continues on the GPU; it must agree with one on the CPU alone."""
    train_tiny(tmp_path / "cpu", tiny_config(4, "v1"))
    expected = load_checkpoint(tmp_path / "cpu" / LAST, ARCHITECTURE)
    out = tmp_path / "mixed"
    train_tiny(out, tiny_config(2, "v1"))
    train_tiny(out, tiny_config(3, name, device="gpu"))
    train_tiny(out, tiny_config(4, name, device="gpu"))
    found = load_checkpoint(out / LAST, ARCHITECTURE)
    start = initial_parameters(ARCHITECTURE, 0)
    for parameter, value in expected.parameters.items():
        moved = np.linalg.norm(value - start[parameter])
        assert np.linalg.norm(found.parameters[parameter] - value) <= 2e-3 * moved, parameter


def test_streamed_pictures_train_to_the_same_bits_on_the_gpu(tmp_path):
    np.save(tmp_path / "pictures.npy", photo_crops(200, 0))
    architecture = autoencoder()
    ends = []
    for stream in (False, True):
        data = load_training_data(str(tmp_path / "pictures.npy"), tmp_path, 150, 20, 0, stream=stream)
        network = Network(find("v4").load("gpu"), architecture, 64, initial_parameters(architecture, 0))
        trainer = Trainer(network, data.train, learning_rate=0.001, seed=0)
        trainer.run_epoch()
        ends.append((trainer.read_losses(), Evaluator(network, data.held_out).mse()))
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_run_on_the_gpu(tmp_path):
    done = convbench("run", "--device=gpu", "--samples=200", "--epochs=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results" / "runs").iterdir()
    data = json.loads(path.read_text())
    assert data["environment"]["gpu"]["name"] == STATUS.name
    assert all(row["verified"] and row["device"] == "gpu" and len(row["epoch_s"]) == 2 for row in data["rows"])
