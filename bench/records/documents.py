"""Results files on the disk: where they go, how one gets a name of its own, and how its kind is told.

A results file is one JSON object that names its schema. It is written whole or not at all, and never overwritten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.model import ModelT, from_json, to_json
from bench.records.files import create_file
from common.errors import UsageError


def start_time() -> str:
    """Now, in UTC, to the second, as files are named and records dated."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")


def prepare_folder(out: Path) -> Path:
    """Make ``out/runs`` and ``out/charts`` and prove that they can be written to; UsageError otherwise.

    Returns the folder for results files. What was made on the way to a failure is removed again.
    """
    made: list[Path] = []
    for folder in (out / "runs", out / "charts"):
        try:
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    path.mkdir()
                    made.append(path)
            check_writable(folder)
        except OSError as error:
            for path in reversed(made):
                path.rmdir()
            raise UsageError(f"cannot write results to {folder}: {error.strerror or error}") from error
    return out / "runs"


def check_writable(folder: Path) -> None:
    """Write a file into the folder and remove it; OSError if that fails."""
    probe = folder / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()


def write_document(document: Any, folder: Path, stem: str) -> Path:
    """Write a record as ``stem.json``, or ``stem-2.json`` and so on where that is taken; whole or not at all.

    Raises UsageError if the folder cannot be written to.
    """
    text = document if isinstance(document, str) else to_json(document)
    try:
        for suffix in ("", *(f"-{i}" for i in range(2, 100))):
            path = folder / f"{stem}{suffix}.json"
            try:
                create_file(path, (text + "\n").encode())
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}") from error
    raise UsageError(f"{folder} already holds a hundred results named {stem}")


def read_document(
    path: Path,
    model: type[ModelT],
    *schemas: str,
    upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> ModelT:
    """Read a record of one of these schemas; UsageError if the file is not one, or breaks a rule of ``model``.

    ``upgrade`` turns the content of an older schema into that of the newest.
    """
    data = read_bytes(path)
    schema = schema_of(path, data)
    if schema not in schemas:
        raise UsageError(f"{path} has schema {schema!r}; this reads {' and '.join(map(repr, schemas))}")
    if upgrade:
        try:
            data = json.dumps(upgrade(read_object(path, data))).encode()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is not a valid results file: its rows are not as {schema} has them") from error
    return from_json(model, data, path)


def read_bytes(path: Path) -> bytes:
    """The content of a file; UsageError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def read_object(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object that a file holds; UsageError if it holds none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a results file: no JSON ({error})") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a results file: it names no schema")
    return found


def schema_of(path: Path, data: bytes) -> str:
    """The schema that a file names; UsageError if it names none."""
    schema = read_object(path, data).get("schema")
    if not isinstance(schema, str):
        raise UsageError(f"{path} is not a results file: it names no schema")
    return schema
