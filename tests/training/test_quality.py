"""Every version reaches PyTorch's losses from the same weights on the same batches: here, and in a results file."""

import re

import numpy as np
import pytest

from bench.machine.devices import ROOT
from bench.measure.peers import TorchForm, TorchTrainer, find_peer
from bench.records.run import read_run
from common.architecture import autoencoder
from common.dataset import photo_crops
from common.network import Network, initial_parameters
from common.training import Trainer
from versions.registry import find, names

TOLERANCE = 1e-4
"""Relative, between the losses of a version and PyTorch: for each step here, for each epoch in the results file."""

EPOCHS, BATCH, LEARNING_RATE = 3, 16, 0.001


def losses(trainer, read):
    found = []
    for _ in range(EPOCHS):
        trainer.run_epoch()
        found.extend(read())
    return np.array(found)


@pytest.fixture(scope="module")
def torch_losses():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: peers)")
    threads = torch.get_num_threads()
    architecture = autoencoder()
    form = TorchForm(find_peer("torch-eager"), "cpu", "fp32", threads)
    trainer = TorchTrainer(form, architecture, initial_parameters(architecture, 0), learning_rate=LEARNING_RATE)
    trainer.load(photo_crops(72, 0), batch_size=BATCH, seed=0)
    return losses(trainer, lambda: trainer._losses.numpy().copy())


@pytest.mark.parametrize("name", names())
def test_losses_equal_those_of_pytorch(name, torch_losses):
    architecture = autoencoder()
    network = Network(find(name).load("cpu"), architecture, BATCH, initial_parameters(architecture, 0))
    trainer = Trainer(network, photo_crops(72, 0), learning_rate=LEARNING_RATE, seed=0)
    found = losses(trainer, trainer.read_losses)
    assert len(found) == len(torch_losses) == EPOCHS * 5  # the last batch has eight
    np.testing.assert_allclose(found, torch_losses, rtol=TOLERANCE)
    assert found[-1] < 0.5 * found[0]


def test_the_results_of_2048_cifar10_pictures():
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    name, said = re.search(r"\(\.\./(results/runs/[^)]+)\), at most (\S+) parts in a million", text).groups()
    record = read_run(ROOT / name)
    assert (record.config.data, record.config.samples) == ("cifar10", 2048)
    rows = {row.id: row for row in record.rows if row.finished}
    assert rows.keys() >= {*names(), "torch-eager"}
    expected = np.array(rows["torch-eager"].loss)
    assert len(expected) >= 3
    apart = max(np.abs(np.array(rows[version].loss) / expected - 1).max() for version in names())
    assert apart < TOLERANCE
    assert said == f"{1e6 * apart:.1f}"
