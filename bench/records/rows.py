"""What every measured row has, whatever was measured: which version, where, and whether it passed its checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from bench.model import CHECKED, Count


@dataclass(config=CHECKED)
class VersionRow:
    """One version, or one peer, in a results file."""

    backend: str
    label: str
    device: str
    layout: str
    precision: Annotated[str, Field(alias="math")]
    verified: bool = False
    reason: str = ""
    """Why the row has no result; empty where it has one."""
    checks: Count = 0
    """How many checks were made against the reference."""
    deterministic: bool | None = None
    """Whether the same step gave the same bits twice; None where that was not tested."""
    id: str = ""
    """Unique in its file: the backend's name, and for a second row of the same backend ``v4#2``."""

    def __post_init__(self) -> None:
        """A row is called by its backend's name unless told otherwise."""
        self.id = self.id or self.backend


def check_rows(rows: Iterable[VersionRow], order: list[list[str]]) -> None:
    """Raise ValueError unless there are rows, with ids of their own, and ``order`` names them, each once a round."""
    ids = [row.id for row in rows]
    if not ids:
        raise ValueError("it has no rows")
    if len(set(ids)) < len(ids):
        raise ValueError("two rows have the same id")
    for turn in order:
        if len({*turn}) < len(turn) or not {*turn} <= {*ids}:
            raise ValueError("the order must name rows, each once a round")
