"""The features of a trained network: its latents, and the linear probe, a classifier trained on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.records.training import NetworkSettings
from bench.training.checkpoint import load_checkpoint, load_network
from common.architecture import Architecture
from common.device import usable_cores
from common.errors import UsageError
from common.network import Network, initial_parameters
from common.training import Pictures, forward_batches

FEATURES = ("pooled", "whole")


@dataclass(frozen=True)
class ProbeResult:
    """The accuracy of a linear classifier on some features."""

    features: str
    dimensions: int
    accuracy: float
    interval: tuple[float, float]
    """Wilson's 95 % interval, for the number of test pictures."""
    converged: bool


def latents(network: Network, pictures: Pictures) -> Iterator[np.ndarray]:
    """Encode all pictures in order: float32 (n, values of a latent) in C, H, W order, a batch at a time."""
    for part in forward_batches(network, pictures, network.architecture.latent_stages):
        yield part.reshape(len(part), -1)


def probe_checkpoints(
    paths: list[Path],
    architecture: Architecture,
    settings: NetworkSettings,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    features: str,
    seed: int,
) -> Iterator[ProbeResult]:
    """Fit a classifier on raw pixels, on an untrained network's latents and on each checkpoint's; yield each result.

    ``train`` and ``test`` are pictures (N, 3, H, W) uint8 and their labels (N,). ``features`` is ``whole``, every value
    of the latent, or ``pooled``, the mean of each channel. UsageError if all training labels are the same, and for an
    invalid checkpoint.
    """
    if len(np.unique(train[1])) < 2:
        raise UsageError("all training pictures are of one class: give more --samples")
    loaded = {str(path): load_checkpoint(path, architecture).parameters for path in paths}
    sets = (train[0], test[0])
    labels = (train[1], test[1])
    raw = (images.reshape(len(images), -1).astype(np.float32) / 255 for images in sets)
    yield _fit("raw pixels", *raw, *labels)
    named = {"untrained network": initial_parameters(architecture, seed), **loaded}
    network = load_network(settings, architecture, named["untrained network"])
    for name, parameters in named.items():
        network.write_parameters(parameters)
        yield _fit(name, *(_features(network, images, features) for images in sets), *labels)


def _features(network: Network, images: np.ndarray, kind: str) -> np.ndarray:
    """Float32 (N, values): the latents of pictures, whole, or the mean of each channel."""
    parts = latents(network, images)
    if kind == "pooled":
        channels = network.architecture.latent_shape[0]
        parts = (part.reshape(len(part), channels, -1).mean(axis=2) for part in parts)
    return np.concatenate(list(parts))


def _fit(
    name: str, train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray
) -> ProbeResult:
    """Standardise, fit a logistic regression, and measure its accuracy on the test pictures."""
    from scipy.stats import binomtest
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    # Strong regularisation: there can be more features than pictures.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(usable_cores(), user_api="blas"):
        warnings.simplefilter("always")
        model.fit(train, train_labels)
        correct = int((model.predict(test) == test_labels).sum())
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    interval = binomtest(correct, len(test)).proportion_ci(0.95, method="wilson")
    accuracy = correct / len(test)
    return ProbeResult(name, train.shape[1], accuracy, (float(interval.low), float(interval.high)), converged)
