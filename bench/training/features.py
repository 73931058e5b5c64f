"""What a trained network is good for: its latents as an array, and how much a linear classifier sees in them.

Parameters come from a checkpoint, whichever version wrote it, and any version can run them: the features are the
network's, not the backend's, and the probe shows that.
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
from common.architecture import Architecture
from common.backend import Device, Math
from common.errors import RunError, UsageError
from common.network import Network, initial_parameters
from common.training import Pictures, forward_batches
from versions.registry import BackendInfo

FEATURES = ("pooled", "whole")


@dataclass(frozen=True)
class Runner:
    """The version, and where it runs."""

    backend: BackendInfo
    device: Device
    math: Math
    threads: int
    batch_size: int

    def network(self, architecture: Architecture, parameters: dict[str, np.ndarray]) -> Network:
        """A network with these parameters (canonical order)."""
        backend = self.backend.load(self.device, math=self.math, threads=self.threads)
        return Network(backend, architecture, self.batch_size, parameters)


def latents(network: Network, pictures: Pictures) -> Iterator[np.ndarray]:
    """Encode all pictures in order: float32 (n, values of a latent) in C, H, W order, a batch at a time."""
    for part in forward_batches(network, pictures, network.architecture.latent_stages):
        yield part.reshape(len(part), -1)


def write_array(path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str) -> None:
    """Write ``parts``, one after another, as ``path``, a ``.npy`` file of this shape; never over another file.

    One part is in memory at a time. The parts are written, not mapped: a full disk is then an error that can be told,
    where a mapping would kill the process. Readers map the file with ``np.load(path, mmap_mode="r")``. RunError, and no
    file, if it cannot be written; UsageError if the name is taken or impossible.
    """
    check_new(path)
    clear_drafts(path)
    draft = draft_of(path)
    try:
        with draft.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
            written = 0
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).data)
                written += len(part)
            if written != shape[0]:
                raise RunError(f"{path} was to have {shape[0]:,} rows and came to {written:,}")
            file.flush()
            os.fsync(file.fileno())
        publish(draft, path)
    except FileExistsError:
        raise UsageError(f"{path} exists: choose another name") from None
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def write_new(path: Path, data: bytes) -> None:
    """Write a new file, whole or not at all; errors as ``write_array``."""
    check_new(path)
    try:
        create_file(path, data)
    except FileExistsError:
        raise UsageError(f"{path} exists: choose another name") from None
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def check_new(path: Path) -> None:
    """Raise UsageError if there is something of that name, or no folder for it."""
    if os.path.lexists(path):
        raise UsageError(f"{path} exists: choose another name")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")


# The probe ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """How a linear classifier does on some features."""

    features: str
    dimensions: int
    accuracy: float
    interval: tuple[float, float]
    """Wilson's 95 % interval, for the number of test pictures."""
    converged: bool


def probe_checkpoints(
    paths: list[Path],
    architecture: Architecture,
    runner: Runner,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    features: str,
    seed: int,
) -> Iterator[Probe]:
    """Fit a classifier on raw pixels, on the untrained network's latents and on each checkpoint's; yield each result.

    ``train`` and ``test`` are pictures (N, 3, H, W) uint8 and their labels (N,). ``features`` is ``whole``, every value
    of the latent, or ``pooled``, the mean of each channel. UsageError for labels that a classifier cannot learn from,
    and for a bad checkpoint.
    """
    if len(np.unique(train[1])) < 2:
        raise UsageError("the pictures to learn from are all of one class: take more --samples")
    loaded = {str(path): load_checkpoint(path, architecture).parameters for path in paths}
    sets = (train[0], test[0])
    labels = (train[1], test[1])
    raw = (images.reshape(len(images), -1).astype(np.float32) / 255 for images in sets)
    yield _fit("raw pixels", *raw, *labels)
    named = {"untrained network": initial_parameters(architecture, seed), **loaded}
    network = runner.network(architecture, named["untrained network"])
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


def _fit(name: str, train: np.ndarray, test: np.ndarray, train_labels: np.ndarray, test_labels: np.ndarray) -> Probe:
    """Standardise, fit a logistic regression, and count how many test pictures it gets right."""
    from scipy.stats import binomtest
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    from common.device import usable_cores

    # Strong regularisation: there can be more features than pictures.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    with warnings.catch_warnings(record=True) as caught, threadpool_limits(usable_cores(), user_api="blas"):
        warnings.simplefilter("always")
        model.fit(train, train_labels)
        right = int((model.predict(test) == test_labels).sum())
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    interval = binomtest(right, len(test)).proportion_ci(0.95, method="wilson")
    return Probe(name, train.shape[1], right / len(test), (float(interval.low), float(interval.high)), converged)
