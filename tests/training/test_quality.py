"""Every version learns what PyTorch learns from the same weights and batches: here in small, and in a kept record."""

import re

import numpy as np
import pytest

from bench.machine.devices import ROOT
from bench.measure.peers import TorchTrainer, find_peer
from bench.records.run import read_record
from common.architecture import autoencoder
from common.dataset import photo_crops
from common.network import Network, initial_parameters
from common.training import Trainer
from versions.registry import find, names

TOLERANCE = 1e-4
"""Relative, between the losses of any version and PyTorch's: every step here, every epoch in the record."""

SETTINGS = {"learning_rate": 0.001, "seed": 0}
EPOCHS, BATCH = 3, 16


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
    trainer = TorchTrainer(
        find_peer("torch-eager"), architecture, initial_parameters(architecture, 0), photo_crops(72, 0),
        device="cpu", math="fp32", threads=threads, batch_size=BATCH, **SETTINGS,
    )  # fmt: skip
    return losses(trainer, lambda: trainer._losses.numpy().copy())


@pytest.mark.parametrize("name", names())
def test_losses_lie_on_pytorchs(name, torch_losses):
    architecture = autoencoder()
    network = Network(find(name).load("cpu"), architecture, BATCH, initial_parameters(architecture, 0))
    trainer = Trainer(network, photo_crops(72, 0), **SETTINGS)
    found = losses(trainer, trainer.read_losses)
    assert len(found) == len(torch_losses) == EPOCHS * 5  # the last batch has eight
    np.testing.assert_allclose(found, torch_losses, rtol=TOLERANCE)
    assert found[-1] < 0.5 * found[0]


def test_the_record_of_2048_real_pictures():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stated = r"PyTorch's from the\nsame weights.*\((results/runs/[^)]+)\), at most (\S+) parts in a million"
    name, said = re.search(stated, text).groups()
    record = read_record(ROOT / name)
    assert (record.config["data"], record.config["samples"]) == ("cifar10", 2048)
    rows = {row.id: row for row in record.rows if row.finished}
    assert rows.keys() >= {*names(), "torch-eager"}
    expected = np.array(rows["torch-eager"].loss)
    assert len(expected) >= 3
    apart = max(np.abs(np.array(rows[version].loss) / expected - 1).max() for version in names())
    assert apart < TOLERANCE
    assert said == f"{1e6 * apart:.1f}"
