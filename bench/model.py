"""Dataclasses that check their own content, and how they are read from JSON and written.

Types and bounds stand in a field's annotation, conditions between fields in a pydantic ``model_validator``. Nothing
else checks a file.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from common.errors import UsageError

CHECKED = ConfigDict(extra="forbid", allow_inf_nan=False, validate_by_name=True, serialize_by_alias=True)
"""For ``pydantic.dataclasses.dataclass(config=CHECKED)``: no unknown field, no NaN, no infinity."""

MOST = 2**63 - 1
LONGEST_VALUE = 40  # characters of a wrong value that an error repeats
Count = Annotated[int, Field(ge=0, le=MOST)]
AtLeastOne = Annotated[int, Field(ge=1, le=MOST)]
Whole = Annotated[int, Field(ge=-MOST, le=MOST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

ModelT = TypeVar("ModelT")


@functools.cache
def adapter(model: type[ModelT]) -> TypeAdapter[ModelT]:
    """Reads and writes ``model``; made once."""
    return TypeAdapter(model)


def to_json(value: Any) -> str:
    """The JSON text of a checked dataclass."""
    # The standard library writes the text, so that a NaN is an error and figures have Python's digits.
    return json.dumps(adapter(type(value)).dump_python(value, mode="json", by_alias=True), indent=1, allow_nan=False)


def from_json(model: type[ModelT], data: bytes | str, path: Path, kind: str = "results file") -> ModelT:
    """Read ``model`` from the content of ``path``; UsageError names the file, the first faulty field and the fault."""
    try:
        return adapter(model).validate_json(data, strict=True)
    except ValidationError as error:
        raise UsageError(f"{path} is not a valid {kind}: {_first_fault(error)}") from error


def _first_fault(error: ValidationError) -> str:
    """The first fault in one line: ``rows.0.epoch_s.1: Input should be greater than 0, not 0``."""
    fault = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ").replace("\n", " ")
    if message.startswith("Input should") and isinstance(fault["input"], str | float | int | None):
        message += f", not {repr(fault['input'])[:LONGEST_VALUE]}"
    others = error.error_count() - 1
    more = f" (and {others} more {'fault' if others == 1 else 'faults'})" if others else ""
    return f"{place}: {message}{more}" if place else f"{message}{more}"
