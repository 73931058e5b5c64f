"""Training that moves from the CPU to the GPU's kernels and back: the same run, within rounding."""

import numpy as np
import pytest

from bench.training.checkpoint import load_checkpoint
from bench.training.folder import LAST
from bench.training.run import TrainingRun
from common.network import initial_parameters
from common.training import Position
from tests.support.tiny_training import ARCHITECTURE, tiny_config, tiny_data, train_tiny

pytestmark = pytest.mark.simulator


def loaded(out):
    return load_checkpoint(out / LAST, ARCHITECTURE)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Three epochs of two steps on the CPU."""
    out = tmp_path_factory.mktemp("expected")
    train_tiny(out, tiny_config(3, "v1"), tiny_data(train=4, held_out=1))
    return loaded(out)


def test_from_the_cpu_to_the_gpu_and_back(tmp_path, monkeypatch, expected):
    """V1 on the CPU, then one epoch of V4's GPU kernels, stopped half-way, then V1 on the CPU again."""
    monkeypatch.setattr(TrainingRun, "_draw_losses", lambda run: None)
    data = tiny_data(train=4, held_out=1)
    train_tiny(tmp_path, tiny_config(1, "v1"), data)
    run = TrainingRun(tiny_config(2, "v4", device="gpu"), data, ARCHITECTURE, tmp_path, loaded(tmp_path))
    run.stop()
    assert run.run() is False
    assert loaded(tmp_path).device == "gpu"
    assert loaded(tmp_path).position.step == 1
    train_tiny(tmp_path, tiny_config(2, "v4", device="gpu"), data)
    train_tiny(tmp_path, tiny_config(3, "v1"), data)
    found = loaded(tmp_path)
    assert [(row.backend, row.device) for row in found.history] == [("v1", "cpu"), ("v4", "gpu"), ("v1", "cpu")]
    assert found.position == Position(3, 0)
    start = initial_parameters(ARCHITECTURE, 0)
    for name, value in expected.parameters.items():
        moved = np.linalg.norm(value - start[name])
        assert np.linalg.norm(found.parameters[name] - value) <= 2e-3 * moved, name
    for ours, theirs in zip(found.history, expected.history, strict=True):
        assert ours.train_mse == pytest.approx(theirs.train_mse, rel=2e-5)
        assert ours.held_out_mse == pytest.approx(theirs.held_out_mse, rel=2e-5)


def test_resuming_on_the_gpu_gives_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingRun, "_draw_losses", lambda run: None)
    data = tiny_data(train=3, held_out=1)
    config = tiny_config(1, "v4", device="gpu")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_tiny(whole, config, data)
    stopped.mkdir()
    run = TrainingRun(config, data, ARCHITECTURE, stopped)
    run.stop()
    assert run.run() is False
    train_tiny(stopped, config, data)
    for name, value in loaded(whole).parameters.items():
        np.testing.assert_array_equal(loaded(stopped).parameters[name], value, err_msg=name)
