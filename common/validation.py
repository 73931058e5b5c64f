"""Conditions on what is given, the content of files and the numbers of options, and how it is said if not met."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UsageError


@contextmanager
def validating(path: Path, kind: str = "results file") -> Iterator[None]:
    """Inside, whatever the content of ``path`` makes fail becomes a UsageError that names the file and the reason."""
    try:
        yield
    except UsageError:  # which says it already
        raise
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
        raise UsageError(f"{path} is not a valid {kind}: {reason}") from error


def want(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition is met."""
    if not condition:
        raise ValueError(message)


def all_texts(values: Any) -> bool:
    """Whether it is a list of nothing but texts."""
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any) -> bool:
    """Whether it is a whole number that is not negative; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_number(name: str, value: int | None, least: int) -> None:
    """Raise UsageError for a number that is too small; None is a default yet to come."""
    if value is not None and value < least:
        raise UsageError(f"{name} {value}: must {f'be at least {least}' if least else 'not be negative'}")
