"""Predicted times: what the model in ``bench/kernels/predict.py`` computes and the tables draw. None is measured."""

from __future__ import annotations

from dataclasses import dataclass

from common.operations import Operation


@dataclass(frozen=True)
class Prediction:
    """The predicted time of one kernel for one operation of a training step, over all of its launches."""

    stage: str
    operation: Operation
    kernel: str
    launches: int
    compute_s: float
    """To issue its instructions or to load what they need, and at least to do its FLOPs at the card's peak."""
    bytes_s: float
    """To move each operand once."""
    time_s: float
    """The largest of both and of the overhead of a launch, launch by launch."""
    at_least: bool = False
    """Whether its machine code has a hot loop whose turns the version does not state: then it takes longer."""

    @property
    def limit(self) -> str:
        """What takes the longest: ``compute``, ``memory`` or ``launch``."""
        if self.time_s > 1.001 * max(self.compute_s, self.bytes_s):
            return "launch"
        return "compute" if self.compute_s > self.bytes_s else "memory"


@dataclass(frozen=True)
class StepPrediction:
    """The predictions of a training step on one card, and what they assume."""

    card: str
    parts: list[Prediction]
    assumptions: list[str]
