"""A training run of a tiny network in a process of its own, to be killed: ``python -m tests.support.tiny_training OUT EPOCHS``.

It goes on from OUT's checkpoint if there is one. With NUMBA_DISABLE_JIT=1 nothing is compiled, so it begins at once.
"""

import sys
from pathlib import Path

import numpy as np

from bench.training.data import TrainingData
from bench.training.folder import LAST, check_resumable, find_start, locked
from bench.training.run import TrainConfig, TrainingRun
from common.architecture import autoencoder
from versions.registry import find

ARCHITECTURE = autoencoder((8, 8), (3, 2))


def tiny_data(train=7, held_out=3):
    pictures = np.random.default_rng(0).integers(0, 256, (train + held_out, 3, 8, 8), np.uint8)
    return TrainingData(pictures[:train], pictures[train:] if held_out else None, "random", "random pictures")


def tiny_config(epochs, backend="v1", **changes):
    settings = {"device": "cpu", "math": "fp32", "threads": 1, "batch_size": 2, "learning_rate": 0.1, "seed": 0}
    return TrainConfig(find(backend), epochs=epochs, checkpoint_steps=1, **{**settings, **changes})


def train_tiny(out, config, data=None, listener=None):
    """Begin, or go on; returns the run."""
    data = data or tiny_data()
    with locked(out):
        start = find_start(out, ARCHITECTURE, resume=(out / LAST).exists())
        if start:
            check_resumable(start, config.seed, config.batch_size, data, out / LAST)
        run = TrainingRun(config, data, ARCHITECTURE, out, start, listener)
        run.run()
    return run


if __name__ == "__main__":
    train_tiny(Path(sys.argv[1]), tiny_config(int(sys.argv[2])))
