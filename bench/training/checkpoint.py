"""Checkpoints: parameters in safetensors, with everything that training needs to go on.

The tensors have canonical names and axes, ``conv1.weight`` (K, C, R, S) and ``conv1.bias`` (K,), whatever the
backend's own layout is (the format itself sorts them by name): any version takes up what any other wrote, and so does
PyTorch. The metadata, texts as the format wants them, says the rest. A digest over names, shapes, values and metadata
is part of it: the format notices a file that was cut short but not a bit that flipped. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from bench.records.files import replace_file
from common.architecture import Architecture
from common.errors import UsageError
from common.network import parameter_shapes
from common.training import Position
from common.validation import all_texts, is_count, is_number, validating, want

SCHEMA = "convbench-checkpoint/1"
NOT_JSON = ("schema", "format", "sha256")
"""Metadata that is text as it stands; the rest is JSON."""


@dataclass(frozen=True)
class Checkpoint:
    """Parameters in canonical order, and where in which training they are from."""

    parameters: dict[str, np.ndarray]
    architecture: Architecture
    position: Position
    seed: int
    """Of the initial weights, and with the epoch's number of the order of its pictures."""
    order_sha256: str
    """Of the order of the epoch under way: a NumPy that shuffles otherwise cannot go on with it."""
    batch_size: int
    samples: int
    learning_rate: float
    data: dict[str, Any]
    """``source``, ``held_out`` (how many pictures) and ``sha256``, of a sample of all of them."""
    asked: dict[str, Any]
    """What the run was begun with and goes on with: ``epochs``, ``checkpoint_steps``, ``data``, ``data_dir``."""
    backend: str
    device: str
    math: str
    threads: int
    commit: str
    epoch_seconds: float
    """Spent so far on the epoch under way."""
    history: list[dict[str, Any]]
    """The figures of each whole epoch."""
    best: dict[str, Any] | None
    """``epoch`` and ``mse`` of the best one."""


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write atomically; OSError if that fails, after which ``path`` is what it was."""
    try:
        data = checkpoint_bytes(checkpoint)
    except safetensors.SafetensorError as error:  # metadata larger than the format allows
        raise OSError(errno.EFBIG, f"the checkpoint does not fit its format: {error}") from error
    replace_file(path, data)


def checkpoint_bytes(checkpoint: Checkpoint) -> bytes:
    """The file's content."""
    values = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in values.pop("parameters").items()}
    position = values.pop("position")
    values["architecture"] = asdict(checkpoint.architecture)
    values |= {"epoch": position.epoch, "step": position.step, "losses": position.losses}
    metadata = {name: json.dumps(value, allow_nan=False) for name, value in values.items()}
    metadata |= {"schema": SCHEMA, "format": "pt"}  # by which PyTorch's tools know the file for one of theirs
    metadata["sha256"] = _digest(metadata, tensors)
    return safetensors.numpy.save(tensors, metadata)


def load_checkpoint(path: Path, architecture: Architecture) -> Checkpoint:
    """Read one that was written for ``architecture``.

    Raises UsageError, naming the file, if there is none, if it is damaged, or if it is of another architecture.
    """
    metadata, tensors = _read(path)
    schema = metadata.get("schema")
    if schema != SCHEMA:
        raise UsageError(f"{path} is not one of the suite's checkpoints: its schema is {schema!r}, not {SCHEMA!r}")
    if metadata.get("sha256") != _digest(metadata, tensors):
        raise UsageError(f"{path} is damaged: its content is not what was written (SHA-256)")
    with validating(path, "checkpoint"):
        values = {name: json.loads(text) for name, text in metadata.items() if name not in NOT_JSON}
        found = values.pop("architecture")
        if found != json.loads(json.dumps(asdict(architecture))):
            raise UsageError(f"{path} is of another architecture: {_differing(found, architecture)}")
        position = Position(values.pop("epoch"), values.pop("step"), tuple(values.pop("losses")))
        checkpoint = Checkpoint(tensors, architecture, position, **values)
        _check(checkpoint)
    return checkpoint


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file."""
    if not path.is_file():
        raise UsageError(f"cannot read {path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        path.open("rb").close()  # the library calls every refusal a missing file
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return file.metadata() or {}, tensors
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    # The last three: a type of number that NumPy does not have.
    except (safetensors.SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged or no safetensors file: {error}") from error


def _digest(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over all of the metadata but the digest itself, and over every tensor's name, type, shape and bytes."""
    digest = sha256(json.dumps({**metadata, "sha256": None}, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(json.dumps([name, value.dtype.str, value.shape]).encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def _differing(found: Any, architecture: Architecture) -> str:
    """What tells two architectures apart, in words."""
    wanted = asdict(architecture)["stages"]
    stages = found.get("stages") if isinstance(found, dict) else None
    if not isinstance(stages, list) or len(stages) != len(wanted):
        return f"it does not have the {len(wanted)} stages of this one"
    for theirs, ours in zip(stages, wanted, strict=True):
        if theirs != ours:
            return f"{ours['name']} is {theirs} there and {ours} here"
    return "its stages are the same, but not all of it is"


def _check(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless everything is there and of its kind."""

    shapes = parameter_shapes(checkpoint.architecture, "NCHW")
    want(checkpoint.parameters.keys() == shapes.keys(), f"its tensors are not {', '.join(shapes)}")
    for name, shape in shapes.items():
        value = checkpoint.parameters[name]
        want(value.shape == shape and value.dtype == np.float32, f"{name} is {value.dtype} {value.shape}, not {shape}")
        want(bool(np.isfinite(value).all()), f"{name} has values that are not finite")
    position = checkpoint.position
    want(is_count(position.epoch) and is_count(position.step), "epoch and step must be counts")
    want(is_count(checkpoint.seed), "the seed must be a count")
    for count in (checkpoint.batch_size, checkpoint.samples, checkpoint.threads):
        want(is_count(count) and count > 0, "batch size, samples and threads must be at least 1")
    want(position.step < -(-checkpoint.samples // checkpoint.batch_size), "the epoch has no such step")
    want(
        len(position.losses) == position.step and all(map(is_number, position.losses)), "its losses are not the steps'"
    )
    want(is_number(checkpoint.learning_rate) and checkpoint.learning_rate > 0, "the learning rate must be positive")
    want(is_number(checkpoint.epoch_seconds) and checkpoint.epoch_seconds >= 0, "its time must be a number")
    texts = (checkpoint.order_sha256, checkpoint.backend, checkpoint.device, checkpoint.math, checkpoint.commit)
    want(all_texts(texts), "backend, device, math, commit and digests must be texts")
    data = checkpoint.data
    want(all_texts([data["source"], data["sha256"]]), "the data's names must be texts")
    want(is_count(data["held_out"]), "held-out pictures must be a count")
    asked = checkpoint.asked
    want(all_texts([asked["data"], asked["data_dir"]]), "where its data was must be texts")
    want(is_count(asked["epochs"]) and is_count(asked["checkpoint_steps"]), "epochs asked for must be a count")
    want(isinstance(checkpoint.history, list) and len(checkpoint.history) == position.epoch, "an epoch has no figures")
    for row in checkpoint.history:
        for key in ("epoch", "step", "learning_rate", "train_mse", "epoch_s", "images_per_s"):
            want(is_number(row[key]), f"{key} of an epoch is no number")
        want(row["held_out_mse"] is None or is_number(row["held_out_mse"]), "a held-out error is no number")
        want(all_texts([row["backend"], row["device"]]), "an epoch's backend and device must be texts")
        want(isinstance(row["curve"], list) and all(map(is_number, row["curve"])), "a loss is no number")
    if checkpoint.best is not None:
        want(is_count(checkpoint.best["epoch"]) and is_number(checkpoint.best["mse"]), "the best epoch has no figure")
