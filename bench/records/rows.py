"""What the files of ``convbench run`` and ``convbench layers`` have in common, and the rows in them."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from bench.machine.ceilings import Ceilings
from bench.machine.conditions import ConditionsAround
from bench.machine.environment import Environment
from bench.model import CHECKED, Count, Positive


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
    error_factor: Positive = 1.0
    """What the tolerances of a direct sum were multiplied by: a version's own error bound. 1 in older files."""
    id: str = ""
    """Unique in its file: the backend's name, and for a second row of the same backend ``v4#2``."""

    def __post_init__(self) -> None:
        """Use the backend's name as id if no other is given."""
        self.id = self.id or self.backend


def _measured_conditions(value: Any) -> Any:
    return None if value == {} else value


@dataclass(config=CHECKED)
class Measurement:
    """A file of measured rows; the kinds of files give ``config`` and ``rows`` their types."""

    environment: Environment
    config: Any
    rows: list[Any]
    started: str
    ceilings: Ceilings | None = None
    """In the arithmetic that was asked for."""
    conditions: Annotated[ConditionsAround | None, BeforeValidator(_measured_conditions)] = None
    """None where the measurement ended before they were read twice; earlier files say ``{}``."""
    warnings: list[str] = field(default_factory=list)
    order: list[list[str]] = field(default_factory=list)
    """Ids of the rows as they were timed, a list for each round, shuffled anew each time; empty in older files."""
    notes: dict[str, str] = field(default_factory=dict)
    """What the fields mean, in older files; it is in ``results/README.md``."""

    @model_validator(mode="after")
    def _check_rows(self) -> Measurement:
        ids = [row.id for row in self.rows]
        if not ids:
            raise ValueError("it has no rows")
        if len(set(ids)) < len(ids):
            raise ValueError("two rows have the same id")
        for turn in self.order:
            if len({*turn}) < len(turn) or not {*turn} <= {*ids}:
                raise ValueError("the order must name rows, each once a round")
        return self
