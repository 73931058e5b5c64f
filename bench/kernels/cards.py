"""The cards that times are predicted for, with the figures of their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import UsageError


@dataclass(frozen=True)
class Card:
    """What a prediction needs to know of a card."""

    name: str
    multiprocessors: int
    lanes: int
    """Multiply-adds in float32 that a multiprocessor does in a cycle."""
    clock_hz: float
    """The boost clock."""
    bytes_per_s: float
    """Of global memory."""
    source: str

    @property
    def fmas_per_s(self) -> float:
        """Multiply-adds in float32 of the whole card."""
        return self.multiprocessors * self.lanes * self.clock_hz


CARDS = (
    Card("T4", 40, 64, 1.59e9, 320e9, 'NVIDIA, "Turing GPU Architecture" (2018), appendix on the T4'),
    Card("A100", 108, 64, 1.41e9, 2039e9, 'NVIDIA, "A100 80GB SXM" data sheet (2021); "A100 Architecture" (2020)'),
    Card("H100", 132, 128, 1.98e9, 3350e9, 'NVIDIA, "H100 SXM" data sheet (2023); the clock follows from its TFLOP/s'),
    Card("H200", 132, 128, 1.98e9, 4800e9, 'NVIDIA, "H200 SXM" data sheet (2024); the clock follows from its TFLOP/s'),
)


def find_card(name: str) -> Card:
    """The card of that name; UsageError lists the known ones."""
    for card in CARDS:
        if card.name == name:
            return card
    raise UsageError(f"unknown card {name!r}: choose from {', '.join(card.name for card in CARDS)}")
