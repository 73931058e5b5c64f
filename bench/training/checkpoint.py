"""Checkpoint files: the parameters as safetensors, and in the metadata everything else that training needs to continue.

The tensors have canonical names and axes, ``conv1.weight`` (K, C, R, S) and ``conv1.bias`` (K,), so that every version,
and PyTorch, can read them. The metadata holds the other fields of a ``Checkpoint`` as JSON texts. A SHA-256 over the
contents detects damage; the format itself detects only a truncated file. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from bench.model import adapter, from_json
from bench.records.files import replace_file
from bench.records.training import Checkpoint, NetworkSettings
from common.architecture import Architecture
from common.errors import UsageError
from common.network import Network, parameter_shapes
from versions.registry import find

SCHEMA = "convbench-checkpoint/1"
NOT_JSON = ("schema", "format", "sha256")
"""Metadata that is plain text; the rest is JSON."""


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write atomically. Raises OSError if that fails; ``path`` is then unchanged."""
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in checkpoint.parameters.items()}
    metadata = {**metadata_of(checkpoint), "schema": SCHEMA, "format": "pt"}  # "pt" is for PyTorch's tools
    metadata["sha256"] = _digest(metadata, tensors)
    try:
        content = safetensors.numpy.save(tensors, metadata)
    except safetensors.SafetensorError as error:  # the format limits the size of the metadata
        raise OSError(errno.EFBIG, f"the checkpoint does not fit its format: {error}") from error
    replace_file(path, content)


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Every field but the parameters, as JSON texts."""
    values = adapter(Checkpoint).dump_python(checkpoint, mode="json", by_alias=True)
    return {name: json.dumps(value, allow_nan=False) for name, value in values.items()}


def load_checkpoint(path: Path, architecture: Architecture) -> Checkpoint:
    """Read a checkpoint of ``architecture``.

    Raises UsageError, which names the file, if it is missing or damaged, or if its architecture is a different one.
    """
    metadata, tensors = _read(path)
    schema = metadata.get("schema")
    if schema != SCHEMA:
        raise UsageError(f"{path} is not one of the suite's checkpoints: its schema is {schema!r}, not {SCHEMA!r}")
    if metadata.get("sha256") != _digest(metadata, tensors):
        raise UsageError(f"{path} is damaged: its contents do not match their SHA-256")
    try:
        text = json.dumps({name: json.loads(text) for name, text in metadata.items() if name not in NOT_JSON})
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a valid checkpoint: {error}") from error
    checkpoint = from_json(Checkpoint, text, path, "checkpoint")
    if checkpoint.architecture != architecture:
        stages = zip_longest(checkpoint.architecture.stages, architecture.stages)
        theirs, ours = next(pair for pair in stages if pair[0] != pair[1])
        raise UsageError(f"{path} is of another architecture: {theirs} there, {ours} here")
    _check_parameters(path, tensors, architecture)
    return replace(checkpoint, parameters=tensors)


def load_network(settings: NetworkSettings, architecture: Architecture, parameters: dict[str, np.ndarray]) -> Network:
    """A network with these parameters (canonical order)."""
    backend = find(settings.backend).load(settings.device, precision=settings.precision, threads=settings.threads)
    return Network(backend, architecture, settings.batch_size, parameters)


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file."""
    try:
        path.open("rb").close()  # the library reports a file that may not be read as missing
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return file.metadata() or {}, tensors
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    # The last three: a number type that NumPy does not have.
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged or no safetensors file: {error}") from error


def _digest(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over the metadata, the digest itself left out, and over each tensor's name, type, shape and bytes."""
    digest = sha256(json.dumps({**metadata, "sha256": None}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, value.dtype.str, value.shape]).encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def _check_parameters(path: Path, tensors: dict[str, np.ndarray], architecture: Architecture) -> None:
    """Raise UsageError unless these are finite parameters of the architecture."""
    expected = {name: f"float32 {shape}" for name, shape in parameter_shapes(architecture, "NCHW").items()}
    found = {name: f"{value.dtype} {value.shape}" for name, value in tensors.items()}
    if found != expected:
        raise UsageError(f"{path} is not a valid checkpoint: its tensors are {found}, not {expected}")
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise UsageError(f"{path} is not a valid checkpoint: {name} has values that are not finite")
