"""The features of a trained network: its latents as an array, and the linear probe, a classifier trained on them.

Every version can run the parameters of a checkpoint, whichever version wrote it. The features belong to the network and
not to the backend, and the probe shows that.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.records.files import clear_drafts, create_file, draft_of, publish
from bench.training.checkpoint import load_checkpoint
from bench.training.settings import NetworkSettings
from common.architecture import Architecture
from common.device import usable_cores
from common.errors import RunError, UsageError
from common.network import Network, initial_parameters
from common.training import Pictures, forward_batches

FEATURES = ("pooled", "whole")


def latents(network: Network, pictures: Pictures) -> Iterator[np.ndarray]:
    """Encode all pictures in order: float32 (n, values of a latent) in C, H, W order, a batch at a time."""
    for part in forward_batches(network, pictures, network.architecture.latent_stages):
        yield part.reshape(len(part), -1)


def write_array(path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> None:
    """Write ``parts``, one after another, to a new ``.npy`` file of this shape.

    One part is in memory at a time. Parts are written and not memory-mapped: a full disk then raises an error, where a
    mapping would end the process with a signal. Readers can map the file with ``np.load(path, mmap_mode="r")``. Raises
    RunError, and leaves no file, if it cannot be written; UsageError if the file exists or its folder does not.
    """
    check_new(path)
    clear_drafts(path)
    draft = draft_of(path)
    try:
        with _named_errors(path):
            with draft.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
                written = 0
                for part in parts:
                    file.write(np.ascontiguousarray(part, dtype).data)
                    written += len(part)
                if written != shape[0]:
                    raise RunError(f"{path} needs {shape[0]:,} rows, but {written:,} were computed")
                file.flush()
                os.fsync(file.fileno())
            publish(draft, path)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def write_new(path: Path, data: bytes) -> None:
    """Write a new file atomically; errors as in ``write_array``."""
    check_new(path)
    with _named_errors(path):
        create_file(path, data)


def check_new(path: Path) -> None:
    """Raise UsageError if the name is taken, or if its folder does not exist."""
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: choose another name")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Inside, an OSError becomes an error that names ``path``."""
    try:
        yield
    except FileExistsError:
        raise UsageError(f"{path} exists: choose another name") from None
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


# The linear probe -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeResult:
    """The accuracy of a linear classifier on some features."""

    features: str
    dimensions: int
    accuracy: float
    interval: tuple[float, float]
    """Wilson's 95 % interval, for the number of test pictures."""
    converged: bool


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
    network = settings.network(architecture, named["untrained network"])
    for name, parameters in named.items():
        network.write_parameters(parameters)
        yield _fit(name, *(_features(network, images, features) for images in sets), *labels)


def _features(network: Network, images: np.ndarray, kind: str) -> np.ndarray:
    """Float32 (N, values): the latents of pictures, whole, or the mean of each channel."""
    channels, height, width = network.architecture.latent_shape
    values = np.empty((len(images), channels * (1 if kind == "pooled" else height * width)), np.float32)
    first = 0
    for batch in latents(network, images):
        found = batch.reshape(len(batch), channels, -1).mean(axis=2) if kind == "pooled" else batch
        values[first : first + len(found)] = found
        first += len(found)
    return values


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
