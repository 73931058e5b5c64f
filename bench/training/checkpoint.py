"""Checkpoints: parameters in a safetensors file, with everything that is needed to continue training.

The tensors have canonical names and axes, ``conv1.weight`` (K, C, R, S) and ``conv1.bias`` (K,), and not the layout of
the backend: every version, and PyTorch, can continue from a checkpoint that another version wrote. The
metadata holds the ``TrainingState``, each field as JSON text. A SHA-256 over the contents detects damage; the format
itself detects only a truncated file. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from bench.model import CHECKED, adapter, from_json
from bench.records.files import replace_file
from bench.records.training import TrainingState
from common.architecture import Architecture
from common.errors import UsageError
from common.network import parameter_shapes
from common.training import Position

SCHEMA = "convbench-checkpoint/1"
NOT_JSON = ("schema", "format", "sha256")
"""Metadata that is plain text; the rest is JSON."""


@dataclass(config=ConfigDict(**CHECKED, arbitrary_types_allowed=True), frozen=True, kw_only=True)
class Checkpoint(TrainingState):
    """The state of a training run with the network's parameters, in canonical order."""

    parameters: dict[str, np.ndarray]
    architecture: Architecture

    @property
    def position(self) -> Position:
        """Where the trainer continues."""
        return Position(self.epoch, self.step, self.losses)


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write atomically. Raises OSError if that fails; ``path`` is then unchanged."""
    metadata = {name: json.dumps(value, allow_nan=False) for name, value in state_values(checkpoint).items()}
    metadata["architecture"] = json.dumps(asdict(checkpoint.architecture))
    try:
        data = checkpoint_bytes(metadata, checkpoint.parameters)
    except safetensors.SafetensorError as error:  # metadata larger than the format allows
        raise OSError(errno.EFBIG, f"the checkpoint exceeds a limit of its format: {error}") from error
    replace_file(path, data)


def state_values(state: TrainingState) -> dict[str, Any]:
    """The fields of the state as JSON values, by their keys in the metadata."""
    return adapter(TrainingState).dump_python(state, mode="json", by_alias=True)


def checkpoint_bytes(metadata: dict[str, str], parameters: dict[str, np.ndarray]) -> bytes:
    """The file's content; schema and digest are added to the metadata."""
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in parameters.items()}
    metadata = {**metadata, "schema": SCHEMA, "format": "pt"}  # "pt" is how PyTorch's tools recognise the file
    metadata["sha256"] = _digest(metadata, tensors)
    return safetensors.numpy.save(tensors, metadata)


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
        values = {name: json.loads(text) for name, text in metadata.items() if name not in NOT_JSON}
        found = values.pop("architecture", None)
        state_json = json.dumps(values).encode()
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a valid checkpoint: {error}") from error
    if found != json.loads(json.dumps(asdict(architecture))):
        raise UsageError(f"{path} is of another architecture: {_difference(found, architecture)}")
    state = from_json(TrainingState, state_json, path, "checkpoint")
    fault = _parameter_fault(tensors, architecture)
    if fault:
        raise UsageError(f"{path} is not a valid checkpoint: {fault}")
    return Checkpoint(**vars(state), parameters=tensors, architecture=architecture)


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file."""
    if not path.is_file():
        raise UsageError(f"cannot read {path}: {'not a file' if path.exists() else 'no such file'}")
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


def _difference(found: Any, architecture: Architecture) -> str:
    """The first difference between a stored architecture and this one, in words."""
    expected = asdict(architecture)["stages"]
    stages = found.get("stages") if isinstance(found, dict) else None
    if not isinstance(stages, list) or len(stages) != len(expected):
        return f"it does not have the {len(expected)} stages of this one"
    for theirs, ours in zip(stages, expected, strict=True):
        if theirs != ours:
            return f"{ours['name']} is {theirs} there and {ours} here"
    return "its stages are the same, but it has other fields"


def _parameter_fault(parameters: dict[str, np.ndarray], architecture: Architecture) -> str:
    """Why these are not parameters of the architecture; empty if they are."""
    shapes = parameter_shapes(architecture, "NCHW")
    if parameters.keys() != shapes.keys():
        return f"its tensors are not {', '.join(shapes)}"
    for name, shape in shapes.items():
        value = parameters[name]
        if value.shape != shape or value.dtype != np.float32:
            return f"{name} is {value.dtype} {value.shape}, not float32 {shape}"
        if not np.isfinite(value).all():
            return f"{name} has values that are not finite"
    return ""
