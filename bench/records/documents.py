"""Results files on the disk: their folder, their names, and their schemas.

A results file is one JSON object that names its schema. It is written whole or not at all, and never overwritten.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.model import ModelT, from_json, to_json
from bench.records.files import create_file
from common.errors import UsageError

PYTEST_BENCHMARK = "pytest-benchmark"


def start_time() -> str:
    """Now, in UTC, to the second, as it stands in file names and records."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H%M%SZ")


def prepare_folder(out: Path) -> Path:
    """Make ``out/runs`` and ``out/charts``; returns the first, the folder for results files.

    Raises UsageError, and makes no folder, if either cannot be written to.
    """
    folders = out / "runs", out / "charts"
    try:
        for folder in folders:
            check_writable(next(path for path in (folder, *folder.parents) if path.exists()))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write results to {folder}: {error.strerror or error}") from error
    return folders[0]


def check_writable(folder: Path) -> None:
    """Write a file into the folder and remove it; OSError if that fails."""
    probe = folder / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()


def write_document(document: Any, folder: Path, stem: str) -> Path:
    """Write a record as ``stem.json``, or ``stem-2.json`` and so on where that is taken; UsageError if that fails."""
    data = f"{to_json(document)}\n".encode()
    try:
        for number in itertools.count(1):
            path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
            try:
                create_file(path, data)
            except FileExistsError:
                continue
            return path
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror or error}") from error


def read_document(
    path: Path, model: type[ModelT], *schemas: str, upgrade: Callable[[dict[str, Any]], None] | None = None
) -> ModelT:
    """Read a record of one of these schemas; UsageError if the file is not one, or breaks a rule of ``model``.

    ``upgrade`` changes the content of a file of the last, oldest schema into that of the first.
    """
    schema, document = read_object(path)
    if schema not in schemas:
        raise UsageError(f"{path} has schema {schema!r}; this reads {' and '.join(map(repr, schemas))}")
    if upgrade and schema == schemas[-1]:
        try:
            upgrade(document)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is not a valid results file: its rows are not as {schema} has them") from error
    return from_json(model, json.dumps(document), path)


def read_object(path: Path) -> tuple[str, dict[str, Any]]:
    """The schema of a file and the object in it; UsageError if it cannot be read, or is no results file.

    A file of pytest-benchmark names no schema; here it has the schema ``PYTEST_BENCHMARK``.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a results file: no JSON ({error})") from error
    if isinstance(found, dict):
        schema = found.get("schema", PYTEST_BENCHMARK if "benchmarks" in found else None)
        if isinstance(schema, str):
            return schema, found
    raise UsageError(f"{path} is not a results file: it names no schema")
