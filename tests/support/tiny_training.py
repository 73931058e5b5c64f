"""Training runs of a tiny network; ``python -m tests.support.tiny_training OUT EPOCHS`` is one in a separate process.

It resumes from the checkpoint in OUT if there is one. With NUMBA_DISABLE_JIT=1 nothing is compiled, so it starts fast.
"""

import sys
from pathlib import Path

import numpy as np

from bench.records.training import Requested, TrainSettings
from bench.training.data import TrainingData
from bench.training.folder import LAST, find_start, locked
from bench.training.run import TrainingRun
from common.architecture import autoencoder

ARCHITECTURE = autoencoder((8, 8), (3, 2))


def tiny_data(train=7, held_out=3):
    pictures = np.random.default_rng(0).integers(0, 256, (train + held_out, 3, 8, 8), np.uint8)
    return TrainingData(pictures[:train], pictures[train:], "random", "random pictures")


def tiny_config(epochs, backend="v1", *, checkpoint_steps=1, **changes):
    settings = {"device": "cpu", "precision": "fp32", "threads": 1, "batch_size": 2, "learning_rate": 0.1, "seed": 0}
    asked = Requested(epochs, checkpoint_steps, "", "")
    return TrainSettings(backend=backend, asked=asked, **{**settings, **changes})


def train_tiny(out, config, data=None, **options):
    """Begin a run or resume it; returns the run."""
    data = data or tiny_data()
    with locked(out):
        start = find_start(out, ARCHITECTURE, resume=(out / LAST).exists())
        run = TrainingRun(config, data, ARCHITECTURE, out, start)
        run.run(**options)
    return run


if __name__ == "__main__":
    train_tiny(Path(sys.argv[1]), tiny_config(int(sys.argv[2])))
